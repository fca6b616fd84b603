"""CacheConfig against Python's own integers over the whole range, and against what torch allocates."""

import contextlib
import copy
import dataclasses
import enum
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvblocks.config import (
    CacheConfig,
    Chunk,
    Group,
    LayerTensor,
    State,
    Window,
    blocks_held,
    itemsize,
    key_value,
    tensor_itemsize,
)

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.int8,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
OTHER_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - set(DTYPES), key=str)
Shape: TypeAlias = dict[str, Any]  # of ints: Any, because mypy holds ** against every parameter, `groups` too
FIELDS = ["num_layers", "num_kv_heads", "head_dim", "num_gpu_blocks", "block_size", "v_head_dim"]

# Small values make products that fit, powers of two and the ends make those at the edge.
sizes = (
    st.integers(1, 64)
    | st.integers(1, INT32_MAX)
    | st.integers(0, 30).map(lambda bits: 1 << bits)
    | st.sampled_from([INT32_MAX - 1, INT32_MAX])
)
shapes = st.fixed_dictionaries(dict.fromkeys(FIELDS, sizes))
small_shapes = st.fixed_dictionaries(dict.fromkeys(FIELDS, st.integers(1, 6)))
dtypes = st.sampled_from(DTYPES)


def label(value: Any) -> str:
    """The id of a parameter; str() of an integer of more than 4300 digits raises."""
    return f"{type(value).__name__}-{'huge' if type(value) is int and abs(value) > 2**70 else value!s:.20}"


@st.composite
def groupings(draw: st.DrawFn) -> tuple[Group, ...]:
    """Layers 0..n-1, shuffled and cut into groups of any reach."""
    layers = draw(st.permutations(range(draw(st.integers(1, 12)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(layers) - 1)))) if len(layers) > 1 else []
    reaches = st.none() | st.builds(Window, st.integers(1, INT32_MAX)) | st.builds(Chunk, st.integers(1, INT32_MAX))
    bounds = [0, *cuts, len(layers)]
    return tuple(Group(draw(reaches), tuple(layers[low:high])) for low, high in pairwise(bounds))


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def check_size(measure: Any, dtype: torch.dtype, name: str, exact: int) -> None:
    """`measure(dtype)` is `exact`, or an OverflowError that shows `exact` where 64 bits do not hold it."""
    if exact <= INT64_MAX:
        assert measure(dtype) == exact
    else:
        with pytest.raises(OverflowError, match=rf"^{name} = "):
            measure(dtype)


@given(shapes, dtypes)
def test_sizes_are_those_of_python_integers(shape: Shape, dtype: torch.dtype) -> None:
    config = CacheConfig(**shape)
    layers, heads, key_dim, blocks, block_size, value_dim = (shape[field] for field in FIELDS)
    token = heads * (key_dim + value_dim) * dtype.itemsize * layers
    check_size(config.token_bytes, dtype, "token_bytes", token)
    check_size(config.block_bytes, dtype, "(token|block)_bytes", token * block_size)
    check_size(config.memory_bytes, dtype, "(token|block|memory)_bytes", token * block_size * blocks)
    assert config.max_tokens == blocks * block_size
    assert config.layers_per_group == layers


@given(shapes)
def test_fields_are_kept(shape: Shape) -> None:
    config = CacheConfig(**shape)
    assert {field: getattr(config, field) for field in FIELDS} == shape
    assert all(type(getattr(config, field)) is int for field in FIELDS)


def test_the_largest_size_is_exactly_the_last_that_64_bits_hold() -> None:
    # 2**63-1 = 7 * 7 * 73 * 127 * 337 * 92737 * 649657
    config = CacheConfig(
        num_layers=1,
        num_kv_heads=92737,
        head_dim=1,
        num_gpu_blocks=7 * 7 * 73,
        block_size=127 * 337,
        v_head_dim=649657 - 1,
    )
    assert config.memory_bytes("int8") == INT64_MAX
    one_more = CacheConfig(
        num_layers=1, num_kv_heads=2**20, head_dim=2**19, num_gpu_blocks=2**12, block_size=2**11, v_head_dim=2**19
    )
    with pytest.raises(OverflowError, match=r"memory_bytes = num_gpu_blocks=4096 \* .* = 9223372036854775808 "):
        one_more.memory_bytes("int8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=small_shapes)
def test_memory_is_what_torch_allocates(dtype: torch.dtype, shape: Shape) -> None:
    config = CacheConfig(**shape)
    lead = (config.num_gpu_blocks, config.block_size, config.num_kv_heads)
    caches = [
        torch.empty(*lead, dim, dtype=dtype)
        for _ in range(config.num_layers)
        for dim in (config.head_dim, config.v_head_dim)
    ]
    assert config.memory_bytes(dtype) == sum(cache.untyped_storage().nbytes() for cache in caches)
    one_block = [cache[:1].clone() for cache in caches]
    assert config.block_bytes(dtype) == sum(cache.untyped_storage().nbytes() for cache in one_block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_is_itself_or_its_name(dtype: torch.dtype) -> None:
    full = str(dtype)
    assert itemsize(dtype) == itemsize(full) == itemsize(full.removeprefix("torch.")) == dtype.itemsize


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_no_other_dtype_of_torch_is_taken(dtype: torch.dtype) -> None:
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1)
    takers: list[Any] = [itemsize, config.token_bytes, config.block_bytes, config.memory_bytes]
    for taker in takers:
        for given_as in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
            with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
                taker(given_as)
    with pytest.raises(TypeError, match="dtype="):
        CacheConfig.for_memory(num_kv_heads=1, head_dim=1, num_layers=1, memory_bytes=1024, dtype=dtype)


NO_DTYPES: list[Any] = [
    None,
    2,
    2.0,
    True,
    b"int8",
    np.float32,
    np.dtype("int8"),
    float,
    torch,
    ["int8"],
    torch.ones(1),
]
NO_DTYPES += [type("dtype", (), {"__str__": lambda self: "int8", "__repr__": lambda self: "dtype()"})()]
NO_DTYPES += ["", "fp8", "half", "torch.", "torch.torch.int8", "INT8", " int8"]


@pytest.mark.parametrize("dtype", NO_DTYPES, ids=repr)
def test_what_is_not_a_dtype_is_a_type_error(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^dtype=.* give a torch\.dtype or its name"):
        itemsize(dtype)


class Lazy:
    """An integer by __index__ alone."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Colour(enum.IntEnum):
    RED = 7


WRONG_TYPES: list[Any] = [
    True,
    False,
    np.True_,
    np.array(True),
    torch.tensor(True),
    1.0,
    float("nan"),
    float("inf"),
    np.float32(2),
    Decimal(2),
    Fraction(2),
    2 + 0j,
    "16",
    b"16",
    [16],
    (16,),
    np.array([16, 16]),
    torch.tensor(2.0),
    object(),
    int,
]
TOO_SMALL = [0, -1, -INT32_MAX, -(2**31), -(2**63), -(2**64) + 1, -(10**5000), np.int64(-1), np.uint8(0)]
TOO_LARGE = [INT32_MAX + 1, 2**32 + 1, 2**63, 2**64 + 1, 10**5000, np.uint64(2**64 - 1)]


def shape_with(field: str, value: Any) -> Shape:
    return dict.fromkeys(FIELDS, 2) | {field: value}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", WRONG_TYPES, ids=label)
def test_a_field_of_the_wrong_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{field}=.* give an integer in 1\.\.2147483647$"):
        CacheConfig(**shape_with(field, value))


@pytest.mark.parametrize("field", FIELDS)
def test_none_stands_for_v_head_dim_only(field: str) -> None:
    if field == "v_head_dim":
        assert CacheConfig(num_layers=1, num_kv_heads=1, head_dim=5, num_gpu_blocks=1, v_head_dim=None).v_head_dim == 5
    else:
        with pytest.raises(TypeError, match=f"^{field}=None is of type NoneType"):
            CacheConfig(**shape_with(field, None))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", TOO_SMALL + TOO_LARGE, ids=label)
def test_a_field_out_of_bounds_is_named_with_its_value(field: str, value: Any) -> None:
    shown = "<an int of 16610 bits>" if abs(int(value)) > 2**128 else str(value)
    with pytest.raises(ValueError, match=rf"^{field}={shown} is outside 1\.\.2147483647$"):
        CacheConfig(**shape_with(field, value))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [np.int8(7), np.uint64(7), np.int64(7), np.array(7), torch.tensor(7), Lazy(7), Colour.RED],
    ids=lambda v: type(v).__name__,
)
def test_anything_that_is_an_index_is_an_integer(field: str, value: Any) -> None:
    config = CacheConfig(**shape_with(field, value))
    assert config == CacheConfig(**shape_with(field, 7))
    assert type(getattr(config, field)) is int


def test_an_error_of_an_index_of_its_own_passes_through() -> None:
    class Broken:
        def __index__(self) -> int:
            raise RuntimeError("no number today")

        def __repr__(self) -> str:
            raise RuntimeError("no name either")

    with pytest.raises(RuntimeError, match="no number today"):
        CacheConfig(num_layers=Broken(), num_kv_heads=1, head_dim=1, num_gpu_blocks=1)
    with pytest.raises(TypeError, match=r"^dtype=<Broken instance at .* cannot hold a cache"):
        itemsize(Broken())  # type: ignore[arg-type]


def test_what_is_missing_or_unknown_is_a_type_error() -> None:
    make: Any = CacheConfig
    four = dict(zip(FIELDS[:4], range(1, 5), strict=True))
    for count in range(4):
        given = dict(list(four.items())[:count])
        with pytest.raises(TypeError):
            make(**given)
        with pytest.raises(TypeError):
            make.__new__(make, **given)
    assert make(**four) == make.__new__(make, **four)
    with pytest.raises(TypeError, match="colour"):
        make(**four, colour=1)


def test_no_argument_is_given_by_its_place() -> None:
    """Heads, dims and layers are integers alike: in the wrong order they made a config of the same size."""
    make: Any = CacheConfig
    for arguments in ((32, 8, 128, 1000), (8, 128, 32, 1000), (1,)):
        with pytest.raises(TypeError, match="positional"):
            make(*arguments)
        with pytest.raises(TypeError, match="positional"):
            make(*arguments, head_dim=128)
    needs = "; it needs max_seq_len, max_batch_size, num_layers, num_kv_heads, head_dim"
    with pytest.raises(TypeError, match=r"^CacheConfig\.for_capacity\(\) takes no positional .* 5 were given" + needs):
        make.for_capacity(8, 128, 32, 4096, 8)
    needs = "; it needs memory_bytes, dtype, num_layers, num_kv_heads, head_dim"
    with pytest.raises(TypeError, match=r"^CacheConfig\.for_memory\(\) takes no positional .* 5 were given" + needs):
        make.for_memory(8, 128, 32, 2**30, "bfloat16")


def test_constructors_name_what_is_missing_or_unknown() -> None:
    class Mine(CacheConfig):
        pass

    alike = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
    for make, message, arguments in (
        (
            Mine.for_memory,
            r"^Mine\.for_memory\(\) needs memory_bytes, dtype, num_layers$",
            {"head_dim": 1, "num_kv_heads": 1},
        ),
        (
            Mine.for_capacity,
            r"\(\) has no argument colour; it needs max_seq_len, max_batch_size$",
            {**alike, "colour": 1},
        ),
        (Mine.for_capacity, r"\(\) needs max_batch_size$", {"layers": [key_value(1, 8)], "max_seq_len": 5}),
        (Mine.for_memory, "is given beside layers", {**alike, "layers": [], "memory_bytes": 5, "dtype": "int8"}),
    ):
        with pytest.raises(TypeError, match=message):
            make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Window(4), -1, 16), ValueError, "num_tokens=-1 is outside 0"),
        ((None, 2**63, 16), ValueError, "num_tokens=9223372036854775808 is outside"),
        ((None, 1, 0), ValueError, "block_size=0 is outside 1"),
        ((None, 1, 1, 0), ValueError, "step_tokens=0 is outside 1"),
        ((None, 1.0, 1), TypeError, r"num_tokens=1\.0 is of type float"),
        ((5, 1, 1), TypeError, "reach=5; give None, a Window or a Chunk"),
        ((State(16), 1, 1), TypeError, "give None, a Window or a Chunk"),
    ],
)
def test_what_blocks_held_cannot_count(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        blocks_held(*arguments)


def test_the_largest_numbers_of_blocks_held_do_not_wrap() -> None:
    most = 2**31 - 1
    assert blocks_held(None, 2**63 - 1, most) == -(-(2**63 - 1) // most)
    for reach in (Window(most), Chunk(most)):
        assert blocks_held(reach, 2**63 - 1, 1, most) == 2 * most - 1
        assert blocks_held(reach, 2**63 - 1, most, most) == (3 if isinstance(reach, Window) else 2)


# --- for_capacity and for_memory


@given(sizes, sizes, sizes)
def test_capacity_holds_every_sequence_at_full_length(seq_len: int, batch_size: int, block_size: int) -> None:
    blocks = ceil_div(seq_len, block_size) * batch_size
    if blocks > INT32_MAX:
        with pytest.raises(ValueError, match=rf"^num_gpu_blocks={blocks}, .*max_seq_len={seq_len} .* 1\.\.2147483647"):
            CacheConfig.for_capacity(
                num_kv_heads=8,
                head_dim=128,
                num_layers=32,
                max_seq_len=seq_len,
                max_batch_size=batch_size,
                block_size=block_size,
            )
    else:
        config = CacheConfig.for_capacity(
            num_kv_heads=8,
            head_dim=128,
            num_layers=32,
            max_seq_len=seq_len,
            max_batch_size=batch_size,
            block_size=block_size,
        )
        assert config == CacheConfig(
            num_layers=32, num_kv_heads=8, head_dim=128, num_gpu_blocks=blocks, block_size=block_size
        )
        assert config.num_blocks_for(seq_len) * batch_size == config.num_gpu_blocks


@given(groupings(), st.integers(1, 5000), st.integers(1, 64))
def test_capacity_counts_a_table_for_each_group(groups: tuple[Group, ...], seq_len: int, batch_size: int) -> None:
    layers = sum(len(group.layers) for group in groups)
    config = CacheConfig.for_capacity(
        num_kv_heads=2,
        head_dim=8,
        num_layers=layers,
        max_seq_len=seq_len,
        max_batch_size=batch_size,
        v_head_dim=4,
        groups=groups,
    )
    assert config == CacheConfig(
        num_layers=layers,
        num_kv_heads=2,
        head_dim=8,
        num_gpu_blocks=ceil_div(seq_len, 16) * batch_size * len(groups),
        block_size=16,
        v_head_dim=4,
        groups=groups,
    )


@pytest.mark.parametrize("field", ["num_kv_heads", "head_dim", "num_layers", "max_seq_len", "max_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**5000, True, 1.5, float("nan"), "8", None], ids=label)
def test_capacity_names_a_bad_argument(field: str, value: Any) -> None:
    names = ["num_kv_heads", "head_dim", "num_layers", "max_seq_len", "max_batch_size"]
    arguments: dict[str, Any] = dict.fromkeys(names, 2) | {field: value}
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=f"^{field}="):
        CacheConfig.for_capacity(**arguments)


@given(shapes, dtypes, st.integers(0, INT64_MAX) | sizes, st.integers(1, INT32_MAX) | st.integers(1, 9), st.data())
def test_memory_is_filled_with_whole_blocks(
    shape: Shape, dtype: torch.dtype, anything: int, blocks: int, data: st.DataObject
) -> None:
    del shape["num_gpu_blocks"]
    block = CacheConfig(**shape, num_gpu_blocks=1)
    try:
        block_bytes = block.block_bytes(dtype)
    except OverflowError:
        block_bytes = 0
    # Any budget at all, or one at, just under or a little over a whole number of blocks.
    edge = blocks * block_bytes + data.draw(st.sampled_from([-1, 0, 1, max(block_bytes - 1, 0)]))
    memory = edge if block_bytes and 0 <= edge <= INT64_MAX and data.draw(st.booleans()) else anything

    def make() -> CacheConfig:
        return CacheConfig.for_memory(memory_bytes=memory, dtype=dtype, **shape)

    if not block_bytes:
        with pytest.raises(OverflowError, match="does not fit in 64 bits"):
            make()
    elif memory < block_bytes:
        with pytest.raises(ValueError, match=rf"^memory_bytes={memory} holds no block: .* is {block_bytes} bytes"):
            make()
    elif memory // block_bytes > INT32_MAX:
        largest = INT32_MAX * block_bytes
        with pytest.raises(ValueError, match=rf"holds {memory // block_bytes} blocks .* at most {largest} bytes"):
            make()
        assert CacheConfig.for_memory(memory_bytes=largest, dtype=dtype, **shape).num_gpu_blocks == INT32_MAX
    else:
        config = make()
        assert config == block.replace(num_gpu_blocks=config.num_gpu_blocks)
        assert config.memory_bytes(dtype) <= memory < config.memory_bytes(dtype) + block_bytes


@given(groupings(), dtypes, st.integers(0, 2**20))
def test_memory_counts_the_empty_places_of_short_groups(
    groups: tuple[Group, ...], dtype: torch.dtype, spare: int
) -> None:
    layers = sum(len(group.layers) for group in groups)
    longest = max(len(group.layers) for group in groups)
    block_bytes = 16 * 2 * (8 + 4) * dtype.itemsize * longest
    config = CacheConfig.for_memory(
        num_kv_heads=2,
        head_dim=8,
        num_layers=layers,
        memory_bytes=block_bytes + spare,
        dtype=dtype,
        v_head_dim=4,
        groups=groups,
    )
    assert config.layers_per_group == longest
    assert config.block_bytes(dtype) == block_bytes
    assert config.num_gpu_blocks == 1 + spare // block_bytes


@pytest.mark.parametrize("value", [True, 1e9, float("nan"), b"1GiB", None, np.float64(1e9)], ids=repr)
def test_memory_of_the_wrong_type_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^memory_bytes=.* give an integer in 0\.\.9223372036854775807$"):
        CacheConfig.for_memory(num_kv_heads=1, head_dim=1, num_layers=1, memory_bytes=value, dtype="int8")


@pytest.mark.parametrize("value", [-1, -(10**5000), 2**63, 10**5000], ids=["-1", "-huge", "2**63", "huge"])
def test_memory_out_of_bounds_is_named(value: int) -> None:
    with pytest.raises(ValueError, match=r"^memory_bytes=.* is outside 0\.\.9223372036854775807$"):
        CacheConfig.for_memory(num_kv_heads=1, head_dim=1, num_layers=1, memory_bytes=value, dtype="int8")


def test_memory_may_be_text() -> None:
    sizes: dict[str, Any] = {"num_kv_heads": 8, "head_dim": 128, "num_layers": 32, "dtype": "bfloat16"}
    for text, number in (("10GiB", 10 * 2**30), ("1.5GB", 1_500_000_000), (" 64 mib ", 64 << 20), ("2097152", 2 << 20)):
        assert CacheConfig.for_memory(memory_bytes=text, **sizes) == CacheConfig.for_memory(
            memory_bytes=number, **sizes
        )
    for text in ("", "90%", "1 bag", "-1GiB", "99999999999GiB"):
        with pytest.raises(ValueError, match=rf"^memory_bytes={re.escape(repr(text))} is (not a size|more than)"):
            CacheConfig.for_memory(memory_bytes=text, **sizes)
    with pytest.raises(ValueError, match="memory_bytes=1024 holds no block"):
        CacheConfig.for_memory(memory_bytes="1KiB", **sizes)


def test_the_sizing_that_people_do_first() -> None:
    """8B-class model, 32 layers of 8 heads of 128, bfloat16: 128 KiB a token, 2 MiB a block, 10 GiB is 5,120 blocks."""
    config = CacheConfig.for_memory(
        num_kv_heads=8, head_dim=128, num_layers=32, memory_bytes=10 * 2**30, dtype=torch.bfloat16
    )
    assert config.token_bytes(torch.bfloat16) == 128 * 2**10
    assert config.block_bytes(torch.bfloat16) == 2 * 2**20
    assert (config.num_gpu_blocks, config.max_tokens) == (5120, 81920)


@given(st.integers(0, INT64_MAX) | st.integers(0, 100), sizes)
@example(INT64_MAX, 1)
@example(INT64_MAX, INT32_MAX)
def test_blocks_for_tokens(num_tokens: int, block_size: int) -> None:
    assert CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, block_size=block_size
    ).num_blocks_for(num_tokens) == ceil_div(num_tokens, block_size)


@pytest.mark.parametrize("value", [-1, 2**63, -(10**5000), 10**5000, True, 1.0, "3", None], ids=label)
def test_blocks_for_no_number_of_tokens(value: Any) -> None:
    with pytest.raises(
        ValueError if type(value) is int else TypeError, match=r"^num_tokens=.*0\.\.9223372036854775807$"
    ):
        CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1).num_blocks_for(value)


# --- groups


@given(groupings())
def test_groups_are_kept_and_sized_by_the_longest(groups: tuple[Group, ...]) -> None:
    layers = sum(len(group.layers) for group in groups)
    config = CacheConfig(num_layers=layers, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=iter(groups))
    assert config.groups == groups
    assert config.layers_per_group == max(len(group.layers) for group in groups)
    assert config == CacheConfig(num_layers=layers, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=list(groups))


def test_the_default_group_is_all_layers() -> None:
    default = CacheConfig(num_layers=3, num_kv_heads=1, head_dim=1, num_gpu_blocks=1)
    spelled_out = CacheConfig(
        num_layers=3, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[Group(None, (0, 1, 2))]
    )
    assert default.groups == spelled_out.groups == (Group(None, (0, 1, 2)),)
    assert default == spelled_out
    assert hash(default) == hash(spelled_out)
    assert default != CacheConfig(
        num_layers=3, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[Group(None, (0, 2, 1))]
    )
    assert default != CacheConfig(
        num_layers=3, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[Group(Window(8), (0, 1, 2))]
    )


@given(groupings(), st.data())
def test_every_layer_has_exactly_one_place(groups: tuple[Group, ...], data: st.DataObject) -> None:
    layers = sum(len(group.layers) for group in groups)
    victim = data.draw(st.sampled_from(range(layers)))
    without = [Group(g.reach, rest) for g in groups if (rest := tuple(x for x in g.layers if x != victim))]
    with pytest.raises(ValueError, match=rf"leaves out layer {victim} of num_layers={layers}"):
        CacheConfig(num_layers=layers, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=without)
    with pytest.raises(ValueError, match=rf"names layer {victim} twice"):
        CacheConfig(
            num_layers=layers, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[*groups, Group(None, (victim,))]
        )
    beyond = data.draw(st.integers(layers, INT32_MAX - 1))
    with pytest.raises(ValueError, match=rf"names layer {beyond}; with num_layers={layers} "):
        CacheConfig(
            num_layers=layers, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[*groups, Group(None, (beyond,))]
        )


@pytest.mark.parametrize(
    "groups", [3, True, [None], ["a"], "ab", [Window(2)], [(None, (0,))], Group(None, (0,))], ids=repr
)
def test_what_is_no_group_is_a_type_error(groups: Any) -> None:
    with pytest.raises(TypeError, match=r"^groups"):
        CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=groups)


def test_no_groups_leave_a_layer_out() -> None:
    with pytest.raises(ValueError, match="leaves out layer 0"):
        CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1, groups=[])


@pytest.mark.parametrize("reach", [Window, Chunk])
def test_a_reach_has_a_size(reach: type[Window] | type[Chunk]) -> None:
    assert reach(np.int64(4)) == reach(4)  # type: ignore[arg-type]
    assert type(reach(np.int64(4)).size) is int  # type: ignore[arg-type]
    assert hash(reach(4)) == hash(reach(4))
    assert reach(INT32_MAX).size == INT32_MAX
    assert repr(reach(4)) == f"{reach.__name__}(size=4)"
    assert pickle.loads(pickle.dumps(reach(4))) == reach(4)
    for value in TOO_SMALL + TOO_LARGE:
        with pytest.raises(ValueError, match=rf"^{reach.__name__}\.size="):
            reach(value)  # type: ignore[arg-type]
    for value in [*WRONG_TYPES, None]:
        with pytest.raises(TypeError, match=rf"^{reach.__name__}\.size="):
            reach(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reach(4).size = 5  # type: ignore[misc]


def test_reaches_of_one_size_differ() -> None:
    wanted: object = Window(4)
    assert wanted != Chunk(4)
    assert Group(Window(4), (0,)) != Group(Chunk(4), (0,))
    assert len({Window(4), Chunk(4), Window(4)}) == 2


def test_a_group_checks_what_it_is_given() -> None:
    make: Any = Group
    assert make(None, [1, np.int32(0)]) == Group(None, (1, 0))
    assert make(None, range(2)).layers == (0, 1)
    assert repr(Group(Window(4), (1, 0))) == "Group(reach=Window(size=4), layers=(1, 0))"
    assert hash(make(None, [0])) == hash(Group(None, (0,)))
    for reach in (4, "full", Window, True, ()):
        with pytest.raises(TypeError, match=r"^Group\.reach="):
            make(reach, (0,))
    wrong: list[Any] = [0, None, "01", b"01", [True], [0.0], [None], ["0"]]
    for layers in wrong:
        with pytest.raises(TypeError, match=r"^Group\.layers="):
            make(None, layers)
    outside: list[Any] = [(), [-1], [INT32_MAX], [10**5000], [0, 1, 0], [0, np.int64(0)]]
    for layers in outside:
        with pytest.raises(ValueError, match=r"^Group\.layers"):
            make(None, layers)


# --- layers by their tensors

token_tensors = st.builds(
    LayerTensor,
    name=st.sampled_from(["key", "value", "latent", "index"]),
    shape=st.tuples(sizes, sizes),
    dtype=st.none() | dtypes,
)
sequence_tensors = st.builds(
    LayerTensor,
    name=st.sampled_from(["conv", "state"]),
    shape=st.lists(sizes, min_size=1, max_size=3),
    dtype=st.none() | dtypes,
    per=st.just("sequence"),
)


def fits(layer: list[LayerTensor]) -> bool:
    """Whether K and V, where a layer has both, have the same heads and dtype."""
    pair = [tensor for tensor in layer if tensor.name in ("key", "value")]
    return len(pair) < 2 or (pair[0].shape[0], pair[0].dtype) == (pair[1].shape[0], pair[1].dtype)


some_layers = st.lists(
    st.lists(token_tensors | sequence_tensors, min_size=1, max_size=3, unique_by=lambda tensor: tensor.name).filter(
        fits
    )
    | st.builds(key_value, sizes, sizes, st.none() | sizes),
    min_size=1,
    max_size=5,
).filter(lambda layers: any(tensor.per == "token" for layer in layers for tensor in layer))


def formula(tensors: list[LayerTensor], dtype: torch.dtype) -> int:
    """Bytes of one entry of each tensor, in Python's own integers."""
    return sum(prod(t.shape) * (dtype.itemsize if t.dtype is None else itemsize(t.dtype)) for t in tensors)


@given(some_layers, st.data(), dtypes, sizes, sizes)
def test_layers_are_sized_tensor_by_tensor(
    layers: list[list[LayerTensor]], data: st.DataObject, dtype: torch.dtype, blocks: int, block_size: int
) -> None:
    paged = [i for i, layer in enumerate(layers) if any(tensor.per == "token" for tensor in layer)]
    order = data.draw(st.permutations(paged))
    cut = data.draw(st.integers(0, len(order)))
    groups = tuple(Group(None, tuple(part)) for part in (order[:cut], order[cut:]) if part)
    config = CacheConfig(layers=iter(layers), num_gpu_blocks=blocks, block_size=block_size, groups=groups)
    of_tokens = [[tensor for tensor in layer if tensor.per == "token"] for layer in layers]
    token = max(sum(formula(of_tokens[layer], dtype) for layer in group.layers) for group in groups)
    check_size(config.token_bytes, dtype, "token_bytes", token)
    check_size(config.block_bytes, dtype, "(token|block)_bytes", token * block_size)
    check_size(config.memory_bytes, dtype, "(token|block|memory)_bytes", token * block_size * blocks)
    of_sequences = [tensor for layer in layers for tensor in layer if tensor.per == "sequence"]
    check_size(config.state_bytes, dtype, "state_bytes", formula(of_sequences, dtype))
    assert config.layers == tuple(map(tuple, layers))
    assert (config.num_layers, config.layers_per_group) == (len(layers), max(len(group.layers) for group in groups))
    named = [[t.shape for layer in layers for t in layer if t.name == name] for name in ("key", "value")]
    assert config.num_kv_heads == max((shape[0] for shapes in named for shape in shapes), default=0)
    assert (config.head_dim, config.v_head_dim) == tuple(max((s[1] for s in shapes), default=0) for shapes in named)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.replace(), eval(repr(config))):
        assert (twin, hash(twin), repr(twin)) == (config, hash(config), repr(config))
    without = CacheConfig(layers=layers, num_gpu_blocks=blocks)
    assert without.groups == (Group(None, tuple(paged)),)
    changed = [[*layer, LayerTensor("more", (1, 1))] if i == paged[0] else layer for i, layer in enumerate(layers)]
    assert config.replace(layers=changed).layers[paged[0]][-1].name == "more"
    assert config.replace(layers=changed) != config


@given(small_shapes, dtypes)
def test_the_numbers_are_the_short_form_of_layers(shape: Shape, dtype: torch.dtype) -> None:
    config = CacheConfig(**shape)
    layer = key_value(shape["num_kv_heads"], shape["head_dim"], shape["v_head_dim"])
    assert config.layers == (layer,) * shape["num_layers"]
    sized = {"num_gpu_blocks": shape["num_gpu_blocks"], "block_size": shape["block_size"]}
    spelled_out = CacheConfig(layers=config.layers, **sized)
    assert (spelled_out, hash(spelled_out), repr(spelled_out)) == (config, hash(config), repr(config))
    assert config.state_bytes(dtype) == 0
    one = LayerTensor("latent", (2, 3))
    assert config.replace(layers=[[one]]) == CacheConfig(layers=[[one]], **sized)
    assert CacheConfig(layers=[[one]], **sized).replace(layers=config.layers) == config
    memory = config.memory_bytes(dtype)
    given: dict[str, Any] = {"layers": config.layers, "block_size": config.block_size}
    assert CacheConfig.for_memory(memory_bytes=memory, dtype=dtype, **given) == config
    capacity = CacheConfig.for_capacity(max_seq_len=9, max_batch_size=2, **given)
    assert capacity == config.replace(num_gpu_blocks=2 * ceil_div(9, config.block_size))


def test_ids_and_positions_are_tensors_of_their_own() -> None:
    positions = LayerTensor("positions", (3, 1), torch.int64)
    ids = LayerTensor("ids", (5,), "torch.int32", per="sequence")
    assert (positions.dtype, ids.dtype) == ("int64", "int32")
    config = CacheConfig(layers=[(*key_value(2, 8), positions, ids)], num_gpu_blocks=2)
    assert (config.token_bytes("bfloat16"), config.state_bytes("bfloat16")) == (2 * 16 * 2 + 3 * 8, 5 * 4)
    assert [tensor_itemsize(dtype) for dtype in (torch.int64, "int32", "bfloat16", torch.int8)] == [8, 4, 2, 1]
    for count in (itemsize, config.token_bytes):  # K and V are neither
        with pytest.raises(TypeError, match="dtype='int64' cannot hold a cache"):
            count("int64")
    with pytest.raises(TypeError, match="dtype='int16' cannot hold a cache"):
        tensor_itemsize("int16")


KV = key_value(2, 4)
STATE = LayerTensor("conv", (3,), per="sequence")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": 5}, TypeError, r"layers=5; give the LayerTensor objects of each layer"),
        ({"layers": [KV[0]]}, TypeError, r"layers=.*; give the LayerTensor objects of each layer"),
        ({"layers": ["ab"]}, TypeError, r"layers\[0\] holds 'a' of type str; give LayerTensor objects"),
        ({"layers": [KV, ()]}, ValueError, r"layers\[1\] is empty"),
        ({"layers": []}, ValueError, r"layers=\(\) keep nothing for a token"),
        ({"layers": [(STATE,)]}, ValueError, r"keep nothing for a token"),
        ({"layers": [(*KV, KV[0])]}, ValueError, r"layers\[0\] names 'key' twice"),
        (
            {"layers": [(KV[0], LayerTensor("value", (3, 4)))]},
            ValueError,
            r"layers\[0\] has .*; attention reads heads of one number and dtype",
        ),
        ({"layers": [(KV[0], LayerTensor("value", (2, 4), "int8"))]}, ValueError, "make them alike"),
        ({"layers": [(KV[0], LayerTensor("value", (2, 4), per="sequence"))]}, ValueError, "make them alike"),
        ({"layers": [KV], "num_layers": 1}, TypeError, "num_layers=1 is given beside layers"),
        ({"layers": [KV], "v_head_dim": 4}, TypeError, "v_head_dim=4 is given beside layers"),
        ({"layers": [KV, (STATE,)], "groups": [Group(None, (0, 1))]}, ValueError, "names layer 1, which keeps nothing"),
        ({"layers": [KV, KV, (STATE,)], "groups": [Group(None, (0,))]}, ValueError, "leaves out layer 1 of"),
        ({"layers": [KV], "groups": [Group(None, (0, 1))]}, ValueError, "names layer 1; with num_layers=1"),
        ({}, TypeError, "needs num_layers, num_kv_heads, head_dim"),
    ],
)
def test_wrong_layers_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (CacheConfig, CacheConfig(layers=[(STATE, *KV)], num_gpu_blocks=2).replace):
        if fields or make is CacheConfig:
            with pytest.raises(error, match=message):
                make(**fields, num_gpu_blocks=1)


def test_a_tensor_checks_what_it_is_given() -> None:
    make: Any = LayerTensor
    tensor = make("latent", [np.int32(1), 576], torch.float8_e4m3fn)
    assert tensor == LayerTensor("latent", (1, 576), "float8_e4m3fn")
    assert type(tensor.shape[0]) is int
    assert make("conv", (3,), "torch.float32", "sequence").dtype == "float32"
    assert key_value(2, 4) == (LayerTensor("key", (2, 4)), LayerTensor("value", (2, 4)))
    assert key_value(2, 4, 3)[1].shape == (2, 3)
    assert eval(repr(tensor)) == pickle.loads(pickle.dumps(tensor)) == tensor
    wrong: list[tuple[type[Exception], str, Any]] = [
        (TypeError, r"LayerTensor\.name=3 is of type int", (3, (1, 2))),
        (ValueError, r"LayerTensor\.name is empty", ("", (1, 2))),
        (ValueError, r"LayerTensor\.per='block' is neither 'token' nor 'sequence'", ("a", (1, 2), None, "block")),
        (TypeError, r"LayerTensor\.shape=5; give \(heads, dim\)", ("a", 5)),
        (TypeError, r"LayerTensor\.shape=\(\); give a tuple of sizes", ("a", (), None, "sequence")),
        (ValueError, r"LayerTensor\.shape=\(1, 2, 3\); give \(heads, dim\)", ("a", (1, 2, 3))),
        (ValueError, r"LayerTensor\.shape=0 is outside 1\.\.2147483647", ("a", (1, 0))),
        (TypeError, r"LayerTensor\.shape=True is a bool", ("a", (1, True))),
        (TypeError, r"dtype='half' cannot hold a cache", ("a", (1, 2), "half")),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            make(*arguments)


# --- a value among values


def variants(config: CacheConfig) -> Iterator[CacheConfig]:
    """One config for each field, different in that field alone."""
    for field in FIELDS:
        fields = {name: getattr(config, name) for name in FIELDS}
        fields[field] += 1 if fields[field] < INT32_MAX else -1
        yield CacheConfig(**fields)


@given(shapes)
def test_equality_and_hash_are_of_all_fields(shape: Shape) -> None:
    config = CacheConfig(**shape)
    assert config == CacheConfig(**shape)
    assert hash(config) == hash(CacheConfig(**shape))
    for other in variants(config):
        assert config != other
        assert hash(config) != hash(other)
    assert len({config, CacheConfig(**shape), *variants(config)}) == 1 + len(FIELDS)
    for stranger in (None, 1, tuple(shape.values()), shape, object()):
        assert config != stranger
    with pytest.raises(TypeError):
        config < config  # type: ignore[operator] # noqa: B015


@given(shapes | groupings())
def test_copies_are_equal(given: Shape | tuple[Group, ...]) -> None:
    if isinstance(given, dict):
        config = CacheConfig(**given)
    else:
        config = CacheConfig(
            num_layers=sum(len(group.layers) for group in given),
            num_kv_heads=2,
            head_dim=8,
            num_gpu_blocks=64,
            block_size=32,
            v_head_dim=4,
            groups=given,
        )
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(config, protocol)) == config
    assert copy.copy(config) == config
    assert copy.deepcopy(config) == config
    assert config.replace() == config
    assert eval(repr(config)) == config


@given(shapes, st.sets(st.sampled_from(FIELDS)), sizes)
def test_replace_changes_what_it_is_told(shape: Shape, fields: set[str], value: int) -> None:
    changed = dict.fromkeys(fields, value)
    expected = shape | changed
    if "v_head_dim" not in fields and shape["v_head_dim"] == shape["head_dim"]:
        expected["v_head_dim"] = expected["head_dim"]
    config = CacheConfig(**shape)
    assert config.replace(**changed) == CacheConfig(**expected)
    assert config == CacheConfig(**shape)


def test_replace_is_checked_and_follows() -> None:
    config = CacheConfig(num_layers=4, num_kv_heads=2, head_dim=64, num_gpu_blocks=10)
    assert config.replace(head_dim=128) == CacheConfig(num_layers=4, num_kv_heads=2, head_dim=128, num_gpu_blocks=10)
    assert config.replace(num_layers=7).groups == (Group(None, tuple(range(7))),)
    assert config.replace(v_head_dim=32).replace(head_dim=128).v_head_dim == 32
    assert config.replace(v_head_dim=None) == config
    with pytest.raises(ValueError, match=r"^head_dim=0 is outside"):
        config.replace(head_dim=0)
    with pytest.raises(TypeError, match="colour"):
        config.replace(colour=1)
    halves = config.replace(groups=[Group(None, (0, 1)), Group(Window(8), (2, 3))])
    with pytest.raises(ValueError, match="leaves out layer 4"):
        halves.replace(num_layers=5)
    if sys.version_info >= (3, 13):
        assert copy.replace(config, block_size=32) == config.replace(block_size=32)


@given(shapes)
def test_nothing_changes_a_config(shape: Shape) -> None:
    config: Any = CacheConfig(**shape)
    for name in [*FIELDS, "groups", "layers", "layers_per_group", "max_tokens", "colour"]:
        with pytest.raises(AttributeError):
            setattr(config, name, 1)
        with pytest.raises(AttributeError):
            delattr(config, name)
    with contextlib.suppress(TypeError):
        config.__init__(1, 1, 1, 1)
    assert config == CacheConfig(**shape)


def test_repr_shows_what_differs_from_the_default() -> None:
    assert repr(CacheConfig(num_layers=2, num_kv_heads=3, head_dim=4, num_gpu_blocks=5)) == (
        "CacheConfig(num_layers=2, num_kv_heads=3, head_dim=4, num_gpu_blocks=5, block_size=16)"
    )
    assert repr(
        CacheConfig(
            num_layers=1,
            num_kv_heads=3,
            head_dim=4,
            num_gpu_blocks=5,
            block_size=6,
            v_head_dim=7,
            groups=[Group(Window(8), (0,))],
        )
    ) == (
        "CacheConfig(num_layers=1, num_kv_heads=3, head_dim=4, num_gpu_blocks=5, block_size=6, v_head_dim=7, "
        "groups=(Group(reach=Window(size=8), layers=(0,)),))"
    )


def test_the_largest_config_is_cheap() -> None:
    config = CacheConfig(
        num_layers=INT32_MAX,
        num_kv_heads=INT32_MAX,
        head_dim=INT32_MAX,
        num_gpu_blocks=INT32_MAX,
        block_size=INT32_MAX,
        v_head_dim=INT32_MAX,
    )
    assert config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(copy.copy(config))
    assert config.max_tokens == INT32_MAX**2
    assert len(repr(config)) < 200


# --- subclasses


class Plain(CacheConfig):
    def megabytes(self, dtype: torch.dtype) -> float:
        return self.memory_bytes(dtype) / 1e6


class Named(CacheConfig):
    name: str

    def __new__(cls, *args: Any, name: str = "", **kwargs: Any) -> "Named":
        self = super().__new__(cls, *args, **kwargs)
        self.name = name
        return self


class Scaled(CacheConfig):
    """8-bit K and V with a float32 scale for each head of each layer in every block."""

    def block_bytes(self, dtype: torch.dtype | str) -> int:
        return super().block_bytes(dtype) + 2 * 4 * self.num_kv_heads * self.layers_per_group


class Weightless(CacheConfig):
    def block_bytes(self, dtype: torch.dtype | str) -> int:
        return 0


def test_a_subclass_makes_its_own_kind() -> None:
    config = Plain(num_layers=1, num_kv_heads=2, head_dim=3, num_gpu_blocks=4)
    made: list[CacheConfig] = [
        config.replace(block_size=8),
        copy.copy(config),
        pickle.loads(pickle.dumps(config)),
        Plain.for_capacity(num_kv_heads=2, head_dim=3, num_layers=1, max_seq_len=64, max_batch_size=1),
        Plain.for_memory(num_kv_heads=2, head_dim=3, num_layers=1, memory_bytes=1000, dtype="int8"),
    ]
    assert all(type(one) is Plain for one in made)
    assert repr(config).startswith("Plain(num_layers=1, ")
    assert made[1] == made[2] == made[3] == config
    same_fields: object = CacheConfig(num_layers=1, num_kv_heads=2, head_dim=3, num_gpu_blocks=4)
    assert config != same_fields
    assert same_fields != config


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_subclass_keeps_its_attributes_in_copies(protocol: int) -> None:
    config = Named(num_layers=1, num_kv_heads=2, head_dim=3, num_gpu_blocks=4, name="draft")
    for twin in (pickle.loads(pickle.dumps(config, protocol)), copy.copy(config), copy.deepcopy(config)):
        assert (type(twin), twin, twin.name) == (Named, config, "draft")


@given(st.integers(1, 10**9))
def test_a_subclass_may_count_more_in_a_block(memory: int) -> None:
    one = Scaled(num_layers=4, num_kv_heads=2, head_dim=64, num_gpu_blocks=1).memory_bytes("int8")
    assert one == CacheConfig(num_layers=4, num_kv_heads=2, head_dim=64, num_gpu_blocks=1).memory_bytes("int8") + 64
    assume(memory >= one)
    config = Scaled.for_memory(num_kv_heads=2, head_dim=64, num_layers=4, memory_bytes=memory, dtype="int8")
    assert config.memory_bytes("int8") <= memory < config.memory_bytes("int8") + one


def test_a_subclass_without_bytes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Weightless\.block_bytes.* at least one byte"):
        Weightless.for_memory(num_kv_heads=1, head_dim=1, num_layers=1, memory_bytes=64, dtype="int8")


def test_the_compiled_module_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, kvblocks.config as c; "
        "sizes = dict(num_kv_heads=8, head_dim=128, num_layers=32, memory_bytes=1 << 30, dtype='torch.bfloat16'); "
        "c.CacheConfig.for_memory(**sizes).memory_bytes('float8_e5m2'); "
        "print({'torch', 'numpy'} & set(sys.modules), '.so' in c.__file__ or '.pyd' in c.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set() True"
