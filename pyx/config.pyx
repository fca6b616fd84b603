"""How large a paged KV cache is: its shape, and its sizes exact to the byte.

No tensors, no allocation, no bookkeeping of blocks; imports `kvblocks.sizes` and the standard library, and knows a
torch dtype by name.
"""

import reprlib
from copyreg import __newobj_ex__
from dataclasses import dataclass
from operator import index

from kvblocks.arguments import MISSING, check_arguments
from kvblocks.sizes import parse_size

from libc.stdint cimport INT32_MAX, INT64_MAX, int64_t

__all__ = ["CacheConfig", "Chunk", "Group", "Window", "itemsize"]


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


# What a constructor takes, in the order of `_fields`.
cdef tuple _FIELDS = (
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "num_gpu_blocks",
    "block_size",
    "v_head_dim",
    "groups",
    "layer_shapes",
)


cdef str _shown(object value):
    """A short repr for an error: whatever the value is, this neither fails nor fills the screen."""
    if isinstance(value, int) and abs(value) >> 128:
        return f"<an int of {value.bit_length()} bits>"  # past 4300 digits str() itself raises
    return reprlib.repr(value)


cdef int64_t _bounded(str name, object value, int64_t low, int64_t high) except? -1:
    """`value` as an integer in `low..high`: TypeError for anything but an integer, ValueError outside."""
    number = value
    if type(value) is not int:
        # A bool is an int to Python, and a bool tensor has an __index__: neither is ever meant as a size.
        kind = str(getattr(value, "dtype", ""))
        if isinstance(value, bool) or kind == "bool" or kind == "torch.bool":
            raise TypeError(f"{name}={_shown(value)} is a bool; give an integer in {low}..{high}")
        try:
            number = index(value)
        except TypeError:
            raise TypeError(
                f"{name}={_shown(value)} is of type {type(value).__name__}; give an integer in {low}..{high}"
            ) from None
    if number < low or number > high:
        raise ValueError(f"{name}={_shown(number)} is outside {low}..{high}")
    return number


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


cpdef int64_t itemsize(object dtype) except -1:
    """Bytes of one element of `dtype`: a `torch.dtype`, or its name with or without the leading "torch.".

    Raises:
        TypeError: not a dtype that a cache can hold. These are the 8-bit floats that have a sign and a zero, int8,
            uint8, float16, bfloat16, float32 and float64.
    """
    cdef type kind = type(dtype)
    name = None
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
    elif kind.__module__ == "torch" and kind.__name__ == "dtype":
        name = str(dtype).removeprefix("torch.")
    size = _ITEMSIZE.get(name)
    if size is None:
        raise TypeError(
            f"dtype={_shown(dtype)} cannot hold a cache; give a torch.dtype or its name: {', '.join(_ITEMSIZE)}"
        )
    return size


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
            raise TypeError(f"Group.reach={_shown(self.reach)}; give None, a Window or a Chunk")
        if isinstance(self.layers, (str, bytes)):
            raise TypeError(f"Group.layers={_shown(self.layers)}; give the ids of the layers")
        try:
            given = tuple(self.layers)
        except TypeError:
            raise TypeError(f"Group.layers={_shown(self.layers)}; give the ids of the layers") from None
        layers = tuple([_bounded("Group.layers", layer, 0, INT32_MAX - 1) for layer in given])
        if not layers:
            raise ValueError("Group.layers is empty; a group has at least one layer")
        if len(set(layers)) < len(layers):
            raise ValueError(f"Group.layers={_shown(layers)} names a layer twice")
        object.__setattr__(self, "layers", layers)


cdef tuple _checked_groups(object given, int64_t num_layers):
    """The groups, in which every one of `num_layers` layers has exactly one place."""
    try:
        groups = tuple(given)
    except TypeError:
        raise TypeError(f"groups={_shown(given)}; give Group objects, or None for one group of all layers") from None
    seen = set()
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"groups holds {_shown(group)} of type {type(group).__name__}; give Group objects")
        for layer in group.layers:
            if layer >= num_layers:
                raise ValueError(
                    f"groups names layer {layer}; with num_layers={num_layers} the ids are 0..{num_layers - 1}"
                )
            if layer in seen:
                raise ValueError(f"groups names layer {layer} twice; a layer belongs to one group")
            seen.add(layer)
    if len(seen) < num_layers:
        missing = next(layer for layer in range(num_layers) if layer not in seen)
        raise ValueError(f"groups leaves out layer {missing} of num_layers={num_layers}; each belongs to a group")
    return groups


cdef tuple _checked_shapes(object given, CacheConfig config):
    """Heads, K dim and V dim of every layer, as tuples of int; the fields of `config` are the largest of each."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"layer_shapes={_shown(given)}; give (num_kv_heads, head_dim, v_head_dim) for each layer")
    try:
        rows = [tuple(row) for row in given]
    except TypeError:
        raise TypeError(
            f"layer_shapes={_shown(given)}; give (num_kv_heads, head_dim, v_head_dim) for each layer, or None"
        ) from None
    if len(rows) != config.num_layers:
        raise ValueError(f"layer_shapes has {len(rows)} shapes; num_layers is {config.num_layers}")
    shapes = []
    for row in rows:
        if len(row) != 3:
            raise ValueError(f"layer_shapes holds {_shown(row)}; a shape is (num_kv_heads, head_dim, v_head_dim)")
        shapes.append(tuple([_bounded("layer_shapes", number, 1, INT32_MAX) for number in row]))
    largest = tuple([max([shape[i] for shape in shapes]) for i in range(3)])
    fields = (config.num_kv_heads, config.head_dim, config.v_head_dim)
    if largest != fields:
        raise ValueError(
            f"layer_shapes is {largest} at most; num_kv_heads, head_dim and v_head_dim are {fields}, and have to be "
            "that"
        )
    return tuple(shapes)


cdef class CacheConfig:
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

    def __cinit__(
        self,
        *more,
        num_layers=MISSING,
        num_kv_heads=MISSING,
        head_dim=MISSING,
        num_gpu_blocks=MISSING,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layer_shapes=None,
        **unknown,
    ):
        needed = {
            "num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
            "num_gpu_blocks": num_gpu_blocks,
        }
        check_arguments(type(self).__name__, needed, more, unknown)
        # Not __init__: an object that exists has been checked, and calling __init__ again cannot change it.
        self.num_layers = _bounded("num_layers", num_layers, 1, INT32_MAX)
        self.num_kv_heads = _bounded("num_kv_heads", num_kv_heads, 1, INT32_MAX)
        self.head_dim = _bounded("head_dim", head_dim, 1, INT32_MAX)
        self.num_gpu_blocks = _bounded("num_gpu_blocks", num_gpu_blocks, 1, INT32_MAX)
        self.block_size = _bounded("block_size", block_size, 1, INT32_MAX)
        self.v_head_dim = self.head_dim if v_head_dim is None else _bounded("v_head_dim", v_head_dim, 1, INT32_MAX)
        self.layers_per_group = self.num_layers
        if groups is not None:
            groups = _checked_groups(groups, self.num_layers)
            self.layers_per_group = max([len(group.layers) for group in groups])
            if groups != (Group(None, tuple(range(self.num_layers))),):
                self._groups = groups
        if layer_shapes is not None:
            shapes = _checked_shapes(layer_shapes, self)
            if len(set(shapes)) > 1:
                self._layer_shapes = shapes

    @classmethod
    def for_capacity(
        cls,
        *,
        num_kv_heads,
        head_dim,
        num_layers,
        max_seq_len,
        max_batch_size,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layer_shapes=None,
    ):
        """A config whose pool holds `max_batch_size` sequences of `max_seq_len` tokens at once.

        `num_gpu_blocks` is ceil(max_seq_len / block_size) * max_batch_size, and that for each group: what a windowed
        group can give back early is not counted on.

        Raises:
            TypeError, ValueError: as the class does, and for `max_seq_len` and `max_batch_size` likewise; also when
                more than 2**31-1 blocks would be needed.
        """
        config = cls(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_gpu_blocks=1,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=groups,
            layer_shapes=layer_shapes,
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
    def for_memory(
        cls,
        *,
        num_kv_heads,
        head_dim,
        num_layers,
        memory_bytes,
        dtype,
        block_size=16,
        v_head_dim=None,
        groups=None,
        layer_shapes=None,
    ):
        """A config with as many whole blocks of `dtype` as fit into `memory_bytes`: bytes, or text such as "8GiB".

        Its own `memory_bytes(dtype)` is never more than was given, and with one block more it would be. To keep that
        true, memory for more than 2**31-1 blocks is an error: block ids are int32, and larger blocks use all of it.

        Raises:
            TypeError, ValueError: as the class does, for `memory_bytes` outside 0..2**63-1, where not even one block
                fits, and where more than 2**31-1 do.
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: one block is more than 2**63-1 bytes.
        """
        config = cls(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_gpu_blocks=1,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=groups,
            layer_shapes=layer_shapes,
        )
        if isinstance(memory_bytes, str):
            memory_bytes = parse_size(memory_bytes, "memory_bytes")
        cdef int64_t given = _bounded("memory_bytes", memory_bytes, 0, INT64_MAX)
        cdef int64_t block_bytes = (<CacheConfig?>config).block_bytes(dtype)
        if block_bytes < 1:
            raise ValueError(f"{cls.__name__}.block_bytes({dtype}) is {block_bytes}; a block has at least one byte")
        blocks = given // block_bytes
        if blocks < 1:
            raise ValueError(
                f"memory_bytes={given} holds no block: one of block_size={config.block_size} is {block_bytes} bytes; "
                f"give at least that many or use a smaller block_size"
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
        if self._groups is None:
            return (Group(None, tuple(range(self.num_layers))),)
        return self._groups

    @property
    def layer_shapes(self):
        """(num_kv_heads, head_dim, v_head_dim) of each layer: a tuple of `num_layers` tuples."""
        if self._layer_shapes is None:
            return ((self.num_kv_heads, self.head_dim, self.v_head_dim),) * self.num_layers
        return self._layer_shapes

    @property
    def max_tokens(self):
        """Slots in the pool, num_gpu_blocks * block_size: a token takes one in each group."""
        return self.num_gpu_blocks * self.block_size

    cpdef int64_t token_bytes(self, object dtype) except -1:
        """Bytes of one slot: num_kv_heads * (head_dim + v_head_dim) * itemsize * layers_per_group.

        With `layer_shapes` it is what the group needs whose layers need the most, each by its own shape.

        Raises:
            TypeError: `dtype` cannot hold a cache, see `itemsize`.
            OverflowError: more than 2**63-1.
        """
        cdef int64_t size = itemsize(dtype)
        if self._layer_shapes is not None:
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
        """Bytes of one slot where layers differ."""
        most = 0
        for group in self.groups:
            numbers = 0
            for layer in group.layers:
                heads, head_dim, v_head_dim = self._layer_shapes[layer]
                numbers += heads * (head_dim + v_head_dim)
            most = max(most, numbers)
        if most * size > INT64_MAX:
            raise _too_large("token_bytes", [("numbers in a slot", most), ("itemsize", size)])
        return most * size

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

    cpdef int64_t num_blocks_for(self, object num_tokens) except -1:
        """Blocks of one group that `num_tokens` tokens of one sequence take: ceil(num_tokens / block_size).

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**63-1.
        """
        cdef int64_t tokens = _bounded("num_tokens", num_tokens, 0, INT64_MAX)
        return tokens // self.block_size + (tokens % self.block_size != 0)

    def replace(self, **fields):
        """The same config but for the fields given, checked as a new one.

        What followed another field still does: `v_head_dim` where it equals `head_dim`, the one group of all layers,
        and shapes that are all alike. A subclass with fields of its own overrides this with `__new__`.

        Raises:
            TypeError, ValueError: as the class does; an unknown field is a TypeError.
        """
        return type(self)(**(self._arguments() | fields))

    def __replace__(self, /, **fields):
        return self.replace(**fields)

    cdef tuple _fields(self):
        """What a constructor needs to make an equal config."""
        v_head_dim = None if self.v_head_dim == self.head_dim else self.v_head_dim
        return (
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.num_gpu_blocks,
            self.block_size,
            v_head_dim,
            self._groups,
            self._layer_shapes,
        )

    cdef dict _arguments(self):
        """The fields by the names under which a constructor takes them."""
        return dict(zip(_FIELDS, self._fields(), strict=True))

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return self._fields() == (<CacheConfig>other)._fields()

    def __hash__(self):
        return hash(self._fields())

    def __repr__(self):
        shown = [
            f"num_layers={self.num_layers}",
            f"num_kv_heads={self.num_kv_heads}",
            f"head_dim={self.head_dim}",
            f"num_gpu_blocks={self.num_gpu_blocks}",
            f"block_size={self.block_size}",
        ]
        if self.v_head_dim != self.head_dim:
            shown.append(f"v_head_dim={self.v_head_dim}")
        if self._groups is not None:
            shown.append(f"groups={self._groups!r}")
        if self._layer_shapes is not None:
            shown.append(f"layer_shapes={self._layer_shapes!r}")
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __reduce__(self):
        # __newobj_ex__ goes past a subclass's __init__, and its attributes travel as state, as for any object.
        return __newobj_ex__, (type(self), (), self._arguments()), self.__getstate__()
