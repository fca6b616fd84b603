from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex, TypeAlias

import torch
from typing_extensions import disjoint_base

__all__ = ["CacheConfig", "Chunk", "Group", "Window", "itemsize"]

_DType: TypeAlias = torch.dtype | str

def itemsize(dtype: _DType) -> int:
    """Bytes of one element of `dtype`: a `torch.dtype`, or its name with or without the leading "torch.".

    Raises:
        TypeError: not a dtype that a cache can hold. These are the 8-bit floats that have a sign and a zero, int8,
            uint8, float16, bfloat16, float32 and float64.
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

@disjoint_base
class CacheConfig:
    """The shape of a paged KV cache, and the sizes that follow from it. Immutable, hashable, picklable.

    A block holds the K and V of `block_size` consecutive tokens for the layers of one group; with the default, one
    group, for every layer. Sizes are exact: what does not fit in 64 bits is an OverflowError that names the product.

    All arguments are given by name: heads, dims and layers are integers alike, and in the wrong order they would make a
    config of the same size for another model.

    Args:
        num_layers: layers that have a cache.
        num_kv_heads: heads of K and V in each layer (on this device, where they are split over several).
        head_dim: elements of one head of K.
        num_gpu_blocks: blocks in the pool.
        block_size: tokens in a block.
        v_head_dim: elements of one head of V; None for `head_dim`.
        groups: the layers by how far they attend; each layer in exactly one group. None for one group of all layers
            that attends to everything. Groups share the pool, so a block is as large as the largest group needs and
            shorter groups leave places empty.
        layer_shapes: (num_kv_heads, head_dim, v_head_dim) of each layer, where layers differ; the fields of those names
            are then the largest of each. None for layers that are all alike. A group's layers lie in its block one
            after the other in the order of the group, each in as many bytes as it needs.

    Every number is an integer in 1..2**31-1. Two configs are equal when they are of one class and all fields are.
    A subclass that takes more arguments overrides `__new__`, as one of `int` or `tuple` does.

    Raises:
        TypeError: a field that is not an integer (a bool is none), or groups that are not `Group` objects.
        ValueError: a field out of bounds; groups that name a layer twice, leave one out or name one that is not there.

    Example:
        >>> config = CacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, num_gpu_blocks=1024)
        >>> config.memory_bytes("bfloat16")
        2147483648
    """
    def __new__(
        cls,
        *,
        num_layers: SupportsIndex,
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_gpu_blocks: SupportsIndex,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
    ) -> Self: ...
    @classmethod
    def for_capacity(
        cls,
        *,
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_layers: SupportsIndex,
        max_seq_len: SupportsIndex,
        max_batch_size: SupportsIndex,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
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
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_layers: SupportsIndex,
        memory_bytes: SupportsIndex | str,
        dtype: _DType,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
    ) -> Self:
        """A config with as many whole blocks of `dtype` as fit into `memory_bytes`: bytes, or text such as "8GiB".

        Its own `memory_bytes(dtype)` is never more than was given, and with one block more it would be. To keep that
        true, memory for more than 2**31-1 blocks is an error: block ids are int32, and larger blocks use all of it.

        Raises:
            TypeError, ValueError: as the class does, for `memory_bytes` outside 0..2**63-1, where not even one block
                fits, and where more than 2**31-1 do.
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
    def layer_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(num_kv_heads, head_dim, v_head_dim) of each layer: a tuple of `num_layers` tuples."""
    @property
    def layers_per_group(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Slots in the pool, num_gpu_blocks * block_size: a token takes one in each group."""
    def token_bytes(self, dtype: _DType) -> int:
        """Bytes of one slot: num_kv_heads * (head_dim + v_head_dim) * itemsize * layers_per_group.

        With `layer_shapes` it is what the group needs whose layers need the most, each by its own shape.

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
    def num_blocks_for(self, num_tokens: SupportsIndex) -> int:
        """Blocks of one group that `num_tokens` tokens of one sequence take: ceil(num_tokens / block_size).

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**63-1.
        """
    def replace(self, **fields: Any) -> Self:
        """The same config but for the fields given, checked as a new one.

        What followed another field still does: `v_head_dim` where it equals `head_dim`, the one group of all layers,
        and shapes that are all alike. A subclass with fields of its own overrides this with `__new__`.

        Raises:
            TypeError, ValueError: as the class does; an unknown field is a TypeError.
        """
    def __replace__(self, /, **fields: Any) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
