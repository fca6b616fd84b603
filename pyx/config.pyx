"""How large a paged KV cache is: its shape, and its sizes exact to the byte.

No tensors, no allocation, no bookkeeping of blocks; imports `kvblocks.sizes` and the standard library, and knows a
torch dtype by name.
"""

from copyreg import __newobj_ex__
from dataclasses import dataclass

from kvblocks.arguments import MISSING, check_arguments
from kvblocks.sizes import checked_integer, parse_size, shown

cimport cython
from libc.stdint cimport INT32_MAX, INT64_MAX, int64_t

from core.reach cimport most_in_chunk, most_in_window

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


# The dtypes that can hold K and V, and their bytes. float8_e8m0fnu cannot: it has neither a sign nor a zero.
cdef dict _ITEMSIZE = {
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}


# What a tensor beside K and V can hold as well.
cdef dict _INTEGERS = {"int32": 4, "int64": 8}


# The numbers by which layers that are all alike, each with K and V, are given; `layers` takes their place.
cdef tuple _ALIKE = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim")


cdef int64_t _bounded(str name, object value, int64_t low, int64_t high) except? -1:
    """`value` as an integer in `low..high`: TypeError for anything but an integer, ValueError outside."""
    if type(value) is int and low <= value <= high:
        return value
    return checked_integer(name, value, low, high)


cdef int64_t _times(int64_t a, int64_t b) noexcept nogil:
    """a * b, or -1 where that does not fit. `a` and `b` are positive, or `a` is the -1 of a product before."""
    if a < 0 or a > INT64_MAX // b:
        return -1
    return a * b


cdef object _too_large(str name, list factors):
    product = 1
    for _, value in factors:
        product *= value
    terms = " * ".join([f"{factor}={value}" for factor, value in factors])
    return OverflowError(f"{name} = {terms} = {product} does not fit in 64 bits; at most {INT64_MAX} is counted")


cdef str _dtype_name(object dtype):
    """The name of a `torch.dtype`, or of one given by its name; "" for anything else."""
    cdef type kind = type(dtype)
    if isinstance(dtype, str) or (kind.__module__ == "torch" and kind.__name__ == "dtype"):
        return str(dtype).removeprefix("torch.")
    return ""


cpdef int64_t itemsize(object dtype) except -1:
    """Bytes of one element of `dtype`: a `torch.dtype`, or its name with or without the leading "torch.".

    Raises:
        TypeError: not a dtype that a cache can hold. These are the 8-bit floats that have a sign and a zero, int8,
            uint8, float16, bfloat16, float32 and float64.
    """
    size = _ITEMSIZE.get(_dtype_name(dtype))
    if size is None:
        raise TypeError(
            f"dtype={shown(dtype)} cannot hold a cache; give a torch.dtype or its name: {', '.join(_ITEMSIZE)}"
        )
    return size


cpdef int64_t tensor_itemsize(object dtype) except -1:
    """Bytes of one element of a `LayerTensor` that has a dtype of its own: as `itemsize`, and of int32 and int64.

    Raises:
        TypeError: another dtype.
    """
    size = _INTEGERS.get(_dtype_name(dtype))
    return itemsize(dtype) if size is None else size


@dataclass(frozen=True)
class Window:
    """Attention to the last `size` tokens, the token itself counted.

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is outside 1..2**31-1.
    """

    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", _bounded("Window.size", self.size, 1, INT32_MAX))


@dataclass(frozen=True)
class Chunk:
    """Attention within one chunk: a token sees those of its own `size` consecutive tokens that are not after it.

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is outside 1..2**31-1.
    """

    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", _bounded("Chunk.size", self.size, 1, INT32_MAX))


def blocks_held(reach, num_tokens, block_size, step_tokens=1):
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
    cdef int64_t tokens = _bounded("num_tokens", num_tokens, 0, INT64_MAX)
    cdef int64_t size = _bounded("block_size", block_size, 1, INT32_MAX)
    cdef int64_t step = _bounded("step_tokens", step_tokens, 1, INT32_MAX)
    cdef int64_t everything = tokens // size + (tokens % size != 0)
    if reach is None:
        return everything
    if isinstance(reach, Window):
        return min(everything, most_in_window(reach.size, step, size))
    if isinstance(reach, Chunk):
        return min(everything, most_in_chunk(reach.size, step, size))
    raise TypeError(f"reach={shown(reach)}; give None, a Window or a Chunk")


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

    def __post_init__(self):
        object.__setattr__(self, "every", _bounded("State.every", self.every, 1, INT32_MAX))


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

    def __post_init__(self):
        if self.reach is not None and not isinstance(self.reach, (Window, Chunk)):
            raise TypeError(f"Group.reach={shown(self.reach)}; give None, a Window or a Chunk")
        if isinstance(self.layers, (str, bytes)):
            raise TypeError(f"Group.layers={shown(self.layers)}; give the ids of the layers")
        try:
            given = tuple(self.layers)
        except TypeError:
            raise TypeError(f"Group.layers={shown(self.layers)}; give the ids of the layers") from None
        layers = tuple([_bounded("Group.layers", layer, 0, INT32_MAX - 1) for layer in given])
        if not layers:
            raise ValueError("Group.layers is empty; a group has at least one layer")
        if len(set(layers)) < len(layers):
            raise ValueError(f"Group.layers={shown(layers)} names a layer twice")
        object.__setattr__(self, "layers", layers)


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
    dtype: str | None = None
    per: str = "token"

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"LayerTensor.name={shown(self.name)} is of type {type(self.name).__name__}; give text")
        if not self.name:
            raise ValueError("LayerTensor.name is empty; a tensor of a layer is found by its name")
        if self.per not in ("token", "sequence"):
            raise ValueError(f"LayerTensor.per={shown(self.per)} is neither 'token' nor 'sequence'")
        try:
            given = () if isinstance(self.shape, (str, bytes)) else tuple(self.shape)
        except TypeError:
            given = ()
        if not given or (self.per == "token" and len(given) != 2):
            wanted = "(heads, dim)" if self.per == "token" else "a tuple of sizes"
            raise (ValueError if given else TypeError)(f"LayerTensor.shape={shown(self.shape)}; give {wanted}")
        shape = tuple([_bounded("LayerTensor.shape", number, 1, INT32_MAX) for number in given])
        object.__setattr__(self, "shape", shape)
        if self.dtype is not None:
            tensor_itemsize(self.dtype)
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))


def key_value(num_kv_heads, head_dim, v_head_dim=None):
    """What a layer of attention keeps: "key" and "value" for every token, in the dtype of the cache.

    Args:
        num_kv_heads, head_dim: of K, 1 to 2**31-1.
        v_head_dim: elements of one head of V; None for `head_dim`.

    Raises:
        TypeError, ValueError: as for `LayerTensor`.
    """
    value = head_dim if v_head_dim is None else v_head_dim
    return LayerTensor("key", (num_kv_heads, head_dim)), LayerTensor("value", (num_kv_heads, value))


cdef tuple _checked_layers(object given):
    """The layers, each a tuple of `LayerTensor` of different names; at least one keeps something for a token."""
    try:
        layers = tuple([tuple(layer) for layer in given])
    except TypeError:
        raise TypeError(f"layers={shown(given)}; give the LayerTensor objects of each layer") from None
    for i, layer in enumerate(layers):
        named = {}
        for tensor in layer:
            if not isinstance(tensor, LayerTensor):
                raise TypeError(f"layers[{i}] holds {shown(tensor)} of type {type(tensor).__name__}; "
                                "give LayerTensor objects")
            if tensor.name in named:
                raise ValueError(f"layers[{i}] names {tensor.name!r} twice; a tensor is found by its name")
            named[tensor.name] = tensor
        if not named:
            raise ValueError(f"layers[{i}] is empty; leave out layers that keep nothing")
        key, value = named.get("key"), named.get("value")
        if key is not None and value is not None:
            if key.per != value.per or key.dtype != value.dtype or key.shape[0] != value.shape[0]:
                raise ValueError(f"layers[{i}] has {key!r} and {value!r}; attention reads heads of one number and "
                                 "dtype: make them alike, or name them otherwise")
    if not any([tensor.per == "token" for layer in layers for tensor in layer]):
        raise ValueError(f"layers={shown(layers)} keep nothing for a token, so there are no blocks; give a layer that "
                         "does")
    return layers


cdef bint _is_paged(tuple layer) except -1:
    """Whether a layer keeps something for each token, and so takes part in a group."""
    for tensor in layer:
        if tensor.per == "token":
            return True
    return False


cdef object _tensor_bytes(object tensor, int64_t size):
    """Bytes of what is kept for one token or sequence, where the cache's dtype has `size` bytes; of any size."""
    numbers = 1
    for number in tensor.shape:
        numbers *= number
    return numbers * (size if tensor.dtype is None else tensor_itemsize(tensor.dtype))


cdef tuple _checked_groups(object given, int64_t num_layers, tuple layers):
    """The groups, in which every layer that keeps something for a token has exactly one place.

    `layers` is None where all do.
    """
    try:
        groups = tuple(given)
    except TypeError:
        raise TypeError(f"groups={shown(given)}; give Group objects, or None for one group of all layers") from None
    seen = set()
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"groups holds {shown(group)} of type {type(group).__name__}; give Group objects")
        for layer in group.layers:
            if layer >= num_layers:
                raise ValueError(
                    f"groups names layer {layer}; with num_layers={num_layers} the ids are 0..{num_layers - 1}"
                )
            if layer in seen:
                raise ValueError(f"groups names layer {layer} twice; a layer belongs to one group")
            if layers is not None and not _is_paged(layers[layer]):
                raise ValueError(f"groups names layer {layer}, which keeps nothing for a token; leave it out")
            seen.add(layer)
    if len(seen) < num_layers:
        for layer in range(num_layers):
            if layer not in seen and (layers is None or _is_paged(layers[layer])):
                raise ValueError(
                    f"groups leaves out layer {layer} of num_layers={num_layers}; each belongs to a group"
                )
    return groups


cdef dict _checked_call(type cls, str name, dict needed, dict numbers, object layers, tuple more, dict unknown):
    """The numbers of a call of a constructor beside the class itself; a TypeError says what is wrong with the call.

    They stand for layers that are all alike, and are needed without `layers`.
    """
    check_arguments(f"{cls.__name__}.{name}", needed | (numbers if layers is None else {}), more, unknown)
    return {number: None if value is MISSING else value for number, value in numbers.items()}


cdef class CacheConfig:
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

    def __cinit__(
        self,
        *more,
        num_gpu_blocks=MISSING,
        num_layers=MISSING,
        num_kv_heads=MISSING,
        head_dim=MISSING,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layers=None,
        **unknown,
    ):
        needed = {"num_gpu_blocks": num_gpu_blocks}
        if layers is None:
            needed = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim} | needed
        check_arguments(type(self).__name__, needed, more, unknown)
        # Not __init__: an object that exists has been checked, and calling __init__ again cannot change it.
        if layers is None:
            self.num_layers = _bounded("num_layers", num_layers, 1, INT32_MAX)
            self.num_kv_heads = _bounded("num_kv_heads", num_kv_heads, 1, INT32_MAX)
            self.head_dim = _bounded("head_dim", head_dim, 1, INT32_MAX)
            self.v_head_dim = self.head_dim if v_head_dim is None else _bounded("v_head_dim", v_head_dim, 1, INT32_MAX)
            self.layers_per_group = self.num_layers
        else:
            for name, value in zip(_ALIKE, (num_layers, num_kv_heads, head_dim, v_head_dim), strict=True):
                if value is not None and value is not MISSING:
                    raise TypeError(f"{name}={shown(value)} is given beside layers, which say it; give one of the two")
            self._take_layers(_checked_layers(layers))
        self.num_gpu_blocks = _bounded("num_gpu_blocks", num_gpu_blocks, 1, INT32_MAX)
        self.block_size = _bounded("block_size", block_size, 1, INT32_MAX)
        if groups is not None:
            checked = _checked_groups(groups, self.num_layers, self._layers)
            self.layers_per_group = max([len(group.layers) for group in checked])
            if checked != self.groups:
                self._groups = checked

    cdef int _take_layers(self, tuple layers) except -1:
        """Be a config of these layers; those that numbers can give are kept as numbers."""
        cdef list keys = [tensor.shape for layer in layers for tensor in layer if tensor.name == "key"]
        cdef list values = [tensor.shape for layer in layers for tensor in layer if tensor.name == "value"]
        self.num_layers = len(layers)
        self.num_kv_heads = max([shape[0] for shape in keys + values], default=0)
        self.head_dim = max([shape[1] for shape in keys], default=0)
        self.v_head_dim = max([shape[1] for shape in values], default=0)
        self.layers_per_group = sum([_is_paged(layer) for layer in layers])
        if not keys or not values or set(layers) != {key_value(self.num_kv_heads, self.head_dim, self.v_head_dim)}:
            self._layers = layers
        return 0

    @classmethod
    @cython.binding(False)  # so that nobody is shown the signature that catches wrong calls
    def for_capacity(
        cls,
        *more,
        max_seq_len=MISSING,
        max_batch_size=MISSING,
        num_kv_heads=MISSING,
        head_dim=MISSING,
        num_layers=MISSING,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layers=None,
        **unknown,
    ):
        """A config whose pool holds `max_batch_size` sequences of `max_seq_len` tokens at once.

        `num_gpu_blocks` is ceil(max_seq_len / block_size) * max_batch_size, and that for each group: what a windowed
        group can give back early is not counted on.

        Raises:
            TypeError, ValueError: as the class does, and for `max_seq_len` and `max_batch_size` likewise; also when
                more than 2**31-1 blocks would be needed.
        """
        needed = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        numbers = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        numbers = _checked_call(cls, "for_capacity", needed, numbers, layers, more, unknown)
        config = cls(
            **numbers,
            num_gpu_blocks=1,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=groups,
            layers=layers,
        )
        cdef int64_t seq_len = _bounded("max_seq_len", max_seq_len, 1, INT32_MAX)
        cdef int64_t batch_size = _bounded("max_batch_size", max_batch_size, 1, INT32_MAX)
        tables = 1 if (<CacheConfig?>config)._groups is None else len((<CacheConfig>config)._groups)
        blocks = config.num_blocks_for(seq_len) * batch_size * tables
        if blocks > INT32_MAX:
            raise ValueError(
                f"num_gpu_blocks={blocks}, what max_seq_len={seq_len} and max_batch_size={batch_size} need with "
                f"block_size={config.block_size}, is outside 1..{INT32_MAX}; use a larger block_size or fewer sequences"
            )
        return config.replace(num_gpu_blocks=blocks)

    @classmethod
    @cython.binding(False)  # so that nobody is shown the signature that catches wrong calls
    def for_memory(
        cls,
        *more,
        memory_bytes=MISSING,
        dtype=MISSING,
        num_kv_heads=MISSING,
        head_dim=MISSING,
        num_layers=MISSING,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layers=None,
        num_states=0,
        **unknown,
    ):
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
        needed = {"memory_bytes": memory_bytes, "dtype": dtype}
        numbers = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        numbers = _checked_call(cls, "for_memory", needed, numbers, layers, more, unknown)
        config = cls(
            **numbers,
            num_gpu_blocks=1,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=groups,
            layers=layers,
        )
        if isinstance(memory_bytes, str):
            memory_bytes = parse_size(memory_bytes, "memory_bytes")
        cdef int64_t given = _bounded("memory_bytes", memory_bytes, 0, INT64_MAX)
        states = _bounded("num_states", num_states, 0, INT32_MAX - 1) * (<CacheConfig?>config).state_bytes(dtype)
        cdef int64_t block_bytes = (<CacheConfig?>config).block_bytes(dtype)
        if block_bytes < 1:
            raise ValueError(f"{cls.__name__}.block_bytes({dtype}) is {block_bytes}; a block has at least one byte")
        blocks = (given - states) // block_bytes
        if blocks < 1:
            beside = f" beside num_states={num_states}, which are {states} bytes" if states else ""
            raise ValueError(
                f"memory_bytes={given} holds no block{beside}: one of block_size={config.block_size} is {block_bytes} "
                f"bytes; give at least that many or use a smaller block_size"
            )
        if blocks > INT32_MAX:
            raise ValueError(
                f"memory_bytes={given} holds {blocks} blocks of {block_bytes} bytes, outside 1..{INT32_MAX}; "
                f"use a larger block_size than {config.block_size}, or at most {INT32_MAX * block_bytes} bytes"
            )
        return config.replace(num_gpu_blocks=blocks)

    @property
    def groups(self):
        """The layer groups, a tuple of `Group`. By default one, of every layer, that attends to everything."""
        if self._groups is not None:
            return self._groups
        if self._layers is None:
            return (Group(None, tuple(range(self.num_layers))),)
        return (Group(None, tuple([i for i, layer in enumerate(self._layers) if _is_paged(layer)])),)

    @property
    def layers(self):
        """The `LayerTensor` objects of each layer: a tuple of `num_layers` tuples."""
        if self._layers is None:
            return (key_value(self.num_kv_heads, self.head_dim, self.v_head_dim),) * self.num_layers
        return self._layers

    @property
    def max_tokens(self):
        """Slots in the pool, num_gpu_blocks * block_size: a token takes one in each group."""
        return self.num_gpu_blocks * self.block_size

    cpdef int64_t token_bytes(self, object dtype) except -1:
        """Bytes of one slot: num_kv_heads * (head_dim + v_head_dim) * itemsize * layers_per_group.

        With `layers` it is what the group needs whose layers need the most, each tensor by its own shape and dtype.

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
        cdef int64_t size = itemsize(dtype)
        if self._layers is not None:
            return self._largest_group(size)
        cdef int64_t dims = self.head_dim + self.v_head_dim
        cdef int64_t product = _times(_times(_times(self.num_kv_heads, dims), size), self.layers_per_group)
        if product < 0:
            raise _too_large(
                "token_bytes",
                [
                    ("num_kv_heads", self.num_kv_heads),
                    ("(head_dim + v_head_dim)", dims),
                    ("itemsize", size),
                    ("layers_per_group", self.layers_per_group),
                ],
            )
        return product

    cdef int64_t _largest_group(self, int64_t size) except -1:
        """Bytes of one slot where layers are given by their tensors."""
        most = 0
        for group in self.groups:
            nbytes = 0
            for layer in group.layers:
                for tensor in self._layers[layer]:
                    if tensor.per == "token":
                        nbytes += _tensor_bytes(tensor, size)
            most = max(most, nbytes)
        if most > INT64_MAX:
            raise OverflowError(
                f"token_bytes = {most}, the tensors of a group's layers, does not fit in 64 bits; at most {INT64_MAX} "
                "is counted"
            )
        return most

    cpdef int64_t block_bytes(self, object dtype) except -1:
        """Bytes of one block: block_size * token_bytes(dtype).

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
        cdef int64_t token_bytes = self.token_bytes(dtype)
        cdef int64_t product = _times(self.block_size, token_bytes)
        if product < 0:
            raise _too_large("block_bytes", [("block_size", self.block_size), ("token_bytes", token_bytes)])
        return product

    cpdef int64_t memory_bytes(self, object dtype) except -1:
        """Bytes of the whole pool: num_gpu_blocks * block_bytes(dtype).

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
        cdef int64_t block_bytes = self.block_bytes(dtype)
        cdef int64_t product = _times(self.num_gpu_blocks, block_bytes)
        if product < 0:
            raise _too_large("memory_bytes", [("num_gpu_blocks", self.num_gpu_blocks), ("block_bytes", block_bytes)])
        return product

    cpdef int64_t state_bytes(self, object dtype) except -1:
        """Bytes that all layers keep once for a sequence: those of one slot of state. 0 where no layer keeps any.

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
        cdef int64_t size = itemsize(dtype)
        nbytes = 0
        for layer in self._layers or ():
            for tensor in layer:
                if tensor.per == "sequence":
                    nbytes += _tensor_bytes(tensor, size)
        if nbytes > INT64_MAX:
            raise OverflowError(
                f"state_bytes = {nbytes}, the tensors of all layers, does not fit in 64 bits; at most {INT64_MAX} is "
                "counted"
            )
        return nbytes

    cpdef int64_t num_blocks_for(self, object num_tokens) except -1:
        """Blocks of one group that `num_tokens` tokens of one sequence take: ceil(num_tokens / block_size).

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**63-1.
        """
        cdef int64_t tokens = _bounded("num_tokens", num_tokens, 0, INT64_MAX)
        return tokens // self.block_size + (tokens % self.block_size != 0)

    def replace(self, **fields):
        """The same config but for the fields given, checked as a new one.

        What followed another field still does: `v_head_dim` where it equals `head_dim`, and the one group of all
        layers. `layers` takes the place of the numbers that stand for layers. A subclass with fields of its own
        overrides this with `__new__`.

        Raises:
            TypeError, ValueError: as the class does; an unknown field is a TypeError.
        """
        cdef dict arguments = self._arguments()
        if fields.get("layers") is not None:
            for name in _ALIKE:
                arguments.pop(name, None)
        return type(self)(**(arguments | fields))

    def __replace__(self, /, **fields):
        return self.replace(**fields)

    cdef dict _arguments(self):
        """What a constructor needs to make an equal config."""
        cdef dict arguments
        if self._layers is not None:
            arguments = {"layers": self._layers}
        else:
            arguments = {
                "num_layers": self.num_layers,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "v_head_dim": None if self.v_head_dim == self.head_dim else self.v_head_dim,
            }
        arguments["num_gpu_blocks"] = self.num_gpu_blocks
        arguments["block_size"] = self.block_size
        arguments["groups"] = self._groups
        return arguments

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return self._arguments() == (<CacheConfig>other)._arguments()

    def __hash__(self):
        return hash(tuple(self._arguments().values()))

    def __repr__(self):
        numbers = ("num_layers", "num_kv_heads", "head_dim", "layers", "num_gpu_blocks", "block_size")
        arguments = self._arguments()
        given = [
            f"{name}={arguments[name]!r}"
            for name in (*numbers, "v_head_dim", "groups")
            if arguments.get(name) is not None
        ]
        return f"{type(self).__qualname__}({', '.join(given)})"

    def __reduce__(self):
        # __newobj_ex__ goes past a subclass's __init__, and its attributes travel as state, as for any object.
        return __newobj_ex__, (type(self), (), self._arguments()), self.__getstate__()
