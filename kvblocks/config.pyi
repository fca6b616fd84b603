from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, SupportsIndex, TypeAlias

import torch
from typing_extensions import disjoint_base

__all__ = [
    "CacheConfig",
    "Chunk",
    "Group",
    "LayerTensor",
    "State",
    "Window",
    "blocks_held",
    "itemsize",
    "key_value",
    "tensor_itemsize",
]

_DType: TypeAlias = torch.dtype | str

def itemsize(dtype: _DType) -> int:
    """Bytes of one element of `dtype`: a `torch.dtype`, or its name with or without the leading "torch.".

    Raises:
        TypeError: not a dtype that a cache can hold. These are the 8-bit floats that have a sign and a zero, int8,
            uint8, float16, bfloat16, float32 and float64.
    """

def tensor_itemsize(dtype: _DType) -> int:
    """Bytes of one element of a `LayerTensor` that has a dtype of its own: as `itemsize`, and of int32 and int64.

    Raises:
        TypeError: another dtype.
    """

@dataclass(frozen=True)
class Window:
    """Attention to the last `size` tokens, the token itself counted.

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is outside 1..2**31-1.
    """

    size: int
    def __post_init__(self) -> None: ...

@dataclass(frozen=True)
class Chunk:
    """Attention within one chunk: a token sees those of its own `size` consecutive tokens that are not after it.

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is outside 1..2**31-1.
    """

    size: int
    def __post_init__(self) -> None: ...

def blocks_held(
    reach: Window | Chunk | None, num_tokens: SupportsIndex, block_size: SupportsIndex, step_tokens: SupportsIndex = 1
) -> int:
    """Blocks of one layer group that a sequence holds at most on its way to `num_tokens` tokens.

    Its steps may begin anywhere, and so a window lies anywhere against the borders of blocks. A chunk begins at a
    multiple of its size.

    Args:
        reach: how far the group attends: None for everything, a `Window` or a `Chunk`.
        num_tokens: of the sequence, 0 to 2**63-1.
        block_size: tokens in a block, 1 to 2**31-1.
        step_tokens: tokens that one step writes for the sequence, at most; 1 to 2**31-1.

    Raises:
        TypeError, ValueError: a number that is no integer or out of bounds, or another reach.
    """

@dataclass(frozen=True)
class State:
    """A state of fixed size for each sequence, which every pass overwrites: linear attention, Mamba, convolutions.

    One of the `groups` of a `BlockManager`. A state that stands at a multiple of `every` tokens is kept as a
    checkpoint, from which a prefix hit can go on.

    Raises:
        TypeError: `every` is not an integer.
        ValueError: `every` is outside 1..2**31-1.
    """

    every: int = 256
    def __post_init__(self) -> None: ...

@dataclass(frozen=True)
class Group:
    """Layers that share one block table, because they attend equally far.

    Args:
        reach: None for everything, a `Window` or a `Chunk`.
        layers: the ids of the layers, from 0; each once. Kept as a tuple in the order given.

    Raises:
        TypeError: a reach or a layer id of the wrong type.
        ValueError: no layers, a layer twice, or an id outside 0..2**31-2.
    """

    reach: Window | Chunk | None
    layers: tuple[int, ...]
    def __post_init__(self) -> None: ...

@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer keeps: for every token, or once for a sequence.

    Args:
        name: of the tensor, such as "key", "value" or "latent"; a layer has no two of one name. "key" and "value" are
            what attention reads: a layer that has both gives them the same heads and the same dtype.
        shape: of what is kept for a token, (heads, dim); or of what is kept for a sequence, any dims.
        dtype: a `torch.dtype` or its name, kept as the name: one that a cache can hold, int32 or int64; None for the
            dtype of the cache.
        per: "token" or "sequence".

    Raises:
        TypeError: a name that is not text, a shape that is not of integers, or another dtype.
        ValueError: an empty name, a number outside 1..2**31-1, a token's shape that is not (heads, dim), no dims, or
            another `per`.

    Example:
        >>> LayerTensor("latent", (1, 576)), LayerTensor("conv", (1536, 3), "float32", per="sequence").dtype
        (LayerTensor(name='latent', shape=(1, 576), dtype=None, per='token'), 'float32')
    """

    name: str
    shape: tuple[int, ...]
    dtype: _DType | None = None
    per: Literal["token", "sequence"] = "token"
    def __post_init__(self) -> None: ...

def key_value(num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> tuple[LayerTensor, LayerTensor]:
    """What a layer of attention keeps: "key" and "value" for every token, in the dtype of the cache.

    Args:
        num_kv_heads, head_dim: of K, 1 to 2**31-1.
        v_head_dim: elements of one head of V; None for `head_dim`.

    Raises:
        TypeError, ValueError: as for `LayerTensor`.
    """

@disjoint_base
class CacheConfig:
    """The shape of a paged KV cache, and the sizes that follow from it. Immutable, hashable, picklable.

    A block holds what the layers of one group keep of `block_size` consecutive tokens; with the default, one group, of
    every layer. Sizes are exact: what does not fit in 64 bits is an OverflowError that names the product.

    All arguments are given by name: heads, dims and layers are integers alike, and in the wrong order they would make a
    config of the same size for another model.

    Args:
        num_layers: layers that have a cache, each with K and V of the same shape.
        num_kv_heads: heads of K and V in each layer (on this device, where they are split over several).
        head_dim: elements of one head of K.
        num_gpu_blocks: blocks in the pool.
        block_size: tokens in a block.
        v_head_dim: elements of one head of V; None for `head_dim`.
        groups: the layers by how far they attend; each layer that keeps something for a token in exactly one group.
            None for one group of all of them that attends to everything. Groups share the pool, so a block is as large
            as the largest group needs and shorter groups leave places empty.
        layers: the tensors of each layer, instead of the numbers above: where layers differ, or keep something else
            than K and V. A group's layers lie in its block one after the other in the order of the group, each in as
            many bytes as it needs. `num_kv_heads`, `head_dim` and `v_head_dim` are then the largest of all tensors
            named "key" and "value", and 0 where there are none. Layers that are all alike, with K and V in the dtype
            of the cache, make the same config as the numbers do.

    Every number is an integer in 1..2**31-1. Two configs are equal when they are of one class and all fields are.
    A subclass that takes more arguments overrides `__new__`, as one of `int` or `tuple` does.

    Raises:
        TypeError: a field that is not an integer (a bool is none), groups or layers that are not of `Group` or
            `LayerTensor` objects, or layers and the numbers that stand for them both.
        ValueError: a field out of bounds; groups that name a layer twice, leave one out or name one that is not there;
            a layer without tensors, or with two of one name; layers that keep nothing for a token.

    Example:
        >>> config = CacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, num_gpu_blocks=1024)
        >>> config.memory_bytes("bfloat16")
        2147483648
        >>> sparse = (*key_value(8, 128), LayerTensor("index", (1, 64), "float8_e4m3fn"))
        >>> CacheConfig(layers=[sparse, key_value(8, 128)], num_gpu_blocks=1024).token_bytes("bfloat16")
        8256
    """
    def __new__(
        cls,
        *,
        num_gpu_blocks: SupportsIndex,
        num_layers: SupportsIndex | None = None,
        num_kv_heads: SupportsIndex | None = None,
        head_dim: SupportsIndex | None = None,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layers: Iterable[Iterable[LayerTensor]] | None = None,
    ) -> Self: ...
    @classmethod
    def for_capacity(
        cls,
        *,
        max_seq_len: SupportsIndex,
        max_batch_size: SupportsIndex,
        num_kv_heads: SupportsIndex | None = None,
        head_dim: SupportsIndex | None = None,
        num_layers: SupportsIndex | None = None,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layers: Iterable[Iterable[LayerTensor]] | None = None,
    ) -> Self:
        """A config whose pool holds `max_batch_size` sequences of `max_seq_len` tokens at once.

        `num_gpu_blocks` is ceil(max_seq_len / block_size) * max_batch_size, and that for each group: what a windowed
        group can give back early is not counted on.

        Raises:
            TypeError, ValueError: as the class does, and for `max_seq_len` and `max_batch_size` likewise; also when
                more than 2**31-1 blocks would be needed.
        """
    @classmethod
    def for_memory(
        cls,
        *,
        memory_bytes: SupportsIndex | str,
        dtype: _DType,
        num_kv_heads: SupportsIndex | None = None,
        head_dim: SupportsIndex | None = None,
        num_layers: SupportsIndex | None = None,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layers: Iterable[Iterable[LayerTensor]] | None = None,
        num_states: SupportsIndex = 0,
    ) -> Self:
        """A config with as many whole blocks of `dtype` as fit into `memory_bytes`: bytes, or text such as "8GiB".

        Its own `memory_bytes(dtype)` is never more than was given, and with one block more it would be. To keep that
        true, memory for more than 2**31-1 blocks is an error: block ids are int32, and larger blocks use all of it.

        Args:
            memory_bytes: for blocks and states together.
            dtype: of all tensors that have none of their own.
            num_states: slots for what layers keep for a sequence, `state_bytes(dtype)` each, taken off first.

        All others are as for the class.

        Raises:
            TypeError, ValueError: as the class does, for `memory_bytes` outside 0..2**63-1, `num_states` outside
                0..2**31-2, where not even one block fits, and where more than 2**31-1 do.
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: one block is more than 2**63-1 bytes.
        """
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_gpu_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def groups(self) -> tuple[Group, ...]:
        """The layer groups, a tuple of `Group`. By default one, of every layer, that attends to everything."""
    @property
    def layers(self) -> tuple[tuple[LayerTensor, ...], ...]:
        """The `LayerTensor` objects of each layer: a tuple of `num_layers` tuples."""
    @property
    def layers_per_group(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Slots in the pool, num_gpu_blocks * block_size: a token takes one in each group."""
    def token_bytes(self, dtype: _DType) -> int:
        """Bytes of one slot: num_kv_heads * (head_dim + v_head_dim) * itemsize * layers_per_group.

        With `layers` it is what the group needs whose layers need the most, each tensor by its own shape and dtype.

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
    def block_bytes(self, dtype: _DType) -> int:
        """Bytes of one block: block_size * token_bytes(dtype).

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
    def memory_bytes(self, dtype: _DType) -> int:
        """Bytes of the whole pool: num_gpu_blocks * block_bytes(dtype).

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
    def state_bytes(self, dtype: _DType) -> int:
        """Bytes that all layers keep once for a sequence: those of one slot of state. 0 where no layer keeps any.

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
    def num_blocks_for(self, num_tokens: SupportsIndex) -> int:
        """Blocks of one group that `num_tokens` tokens of one sequence take: ceil(num_tokens / block_size).

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**63-1.
        """
    def replace(self, **fields: Any) -> Self:
        """The same config but for the fields given, checked as a new one.

        What followed another field still does: `v_head_dim` where it equals `head_dim`, and the one group of all
        layers. `layers` takes the place of the numbers that stand for layers. A subclass with fields of its own
        overrides this with `__new__`.

        Raises:
            TypeError, ValueError: as the class does; an unknown field is a TypeError.
        """
    def __replace__(self, /, **fields: Any) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
