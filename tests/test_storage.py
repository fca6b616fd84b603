"""PagedKVCache against a dict of slots: every dtype and layout to the bit, any strides; bad input changes nothing."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from without_memory import WITHOUT_MEMORY

from kvblocks import memory
from kvblocks.attention import paged_attention
from kvblocks.config import CacheConfig
from kvblocks.errors import OutOfMemory
from kvblocks.manager import BlockManager
from kvblocks.sizes import LAYOUTS
from kvblocks.step import StepBuffers
from kvblocks.storage import cache as storage
from kvblocks.storage import movers
from kvblocks.storage.cache import PagedKVCache

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


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: NaNs with payloads, both zeros, denormals."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor: Tensor) -> bytes:
    # A copy: torch calls one element contiguous whatever its stride, and then cannot view it as bytes.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def in_slot(tensor: Tensor, layout: str, slot: int, block_size: int) -> Tensor:
    """[heads, dim] of one slot, straight from the shapes that the layouts promise."""
    block, offset = divmod(slot, block_size)
    if layout == "NHD":
        return tensor[block, offset]
    if layout == "HND":
        return tensor[block, :, offset]
    if tensor.ndim == 5:
        return tensor[block, :, :, offset].flatten(1)
    return tensor[block, :, :, offset]


# Each gives the same rows [n, heads, dim] with other strides.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda rows: rows.contiguous(),
    "part of q, k and v": lambda rows: torch.cat([rows, rows, rows], 1)[:, rows.shape[1] : 2 * rows.shape[1]],
    "heads first": lambda rows: rows.transpose(0, 1).contiguous().transpose(0, 1),
    "dims first": lambda rows: rows.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other dim": lambda rows: torch.stack([rows, rows], 3).flatten(2)[:, :, ::2],
    "odd offset": lambda rows: torch.cat([rows.flatten(), rows.flatten()])[rows.numel() :].view(rows.shape),
}


@dataclass(frozen=True)
class Shape:
    num_blocks: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    dtype: torch.dtype
    layout: str

    def cache(self) -> PagedKVCache:
        return PagedKVCache(
            self.num_blocks,
            self.num_heads,
            self.head_dim,
            self.block_size,
            self.dtype,
            "cpu",
            layout=self.layout,
            v_head_dim=self.v_head_dim,
        )

    @property
    def capacity(self) -> int:
        return self.num_blocks * self.block_size


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    pack = 16 // dtype.itemsize if layout == "X" else 1
    return Shape(
        num_blocks=draw(st.integers(1, 5)),
        num_heads=draw(st.integers(1, 3)),
        head_dim=pack * draw(st.integers(1, 20 // pack + 1)),
        v_head_dim=draw(st.integers(1, 20)),
        block_size=draw(st.sampled_from([1, 2, 5, 8, 16, 17])),
        dtype=dtype,
        layout=layout,
    )


def as_index(values: list[int], form: str) -> Any:
    if form == "list":
        return values
    if form == "numpy":
        array = np.array(values, np.int32)
        array.setflags(write=False)
        return array
    if form == "strided":
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(2)[::2]
    return torch.tensor(values, dtype=torch.int32 if form == "int32" else torch.int64)


forms = st.sampled_from(["list", "numpy", "strided", "int32", "int64"])
strides = st.sampled_from(sorted(STRIDES))


@given(st.data(), shapes())
def test_any_history_of_writes_copies_and_zeros_equals_a_dict_of_slots(data: st.DataObject, shape: Shape) -> None:
    cache = shape.cache()
    zeros = (torch.zeros(shape.num_heads, shape.head_dim), torch.zeros(shape.num_heads, shape.v_head_dim))
    empty = tuple(bits(zero.to(shape.dtype)) for zero in zeros)
    model = dict.fromkeys(range(shape.capacity), empty)
    for seed in range(data.draw(st.integers(1, 3), label="writes")):
        slots = data.draw(st.lists(st.integers(-1, shape.capacity - 1), max_size=40), label="slots")
        keys = random_bits((len(slots), shape.num_heads, shape.head_dim), shape.dtype, seed)
        values = random_bits((len(slots), shape.num_heads, shape.v_head_dim), shape.dtype, seed + 100)
        for key, value, slot in zip(keys, values, slots, strict=True):
            if slot >= 0:
                model[slot] = (bits(key), bits(value))
        keys, values = (
            STRIDES[data.draw(strides)](rows.view(_BITS[rows.itemsize])).view(rows.dtype) for rows in (keys, values)
        )
        cache.write(keys, values, as_index(slots, data.draw(forms)))

    blocks = data.draw(st.permutations(range(shape.num_blocks)))
    pairs = list(zip(blocks[::2], blocks[1::2], strict=False))
    for source, target in pairs:
        for offset in range(shape.block_size):
            model[target * shape.block_size + offset] = model[source * shape.block_size + offset]
    cache.copy_blocks(
        data.draw(st.sampled_from([pairs, np.array(pairs, np.int64), torch.tensor(pairs, dtype=torch.int64)]))
    )
    ids = data.draw(st.lists(st.integers(0, shape.num_blocks - 1), max_size=2))
    for slot in model:
        if slot // shape.block_size in ids:
            model[slot] = empty
    cache.zero_blocks(as_index(ids, data.draw(forms)))

    for slot, (key, value) in model.items():
        assert bits(in_slot(cache.key_cache, shape.layout, slot, shape.block_size)) == key
        assert bits(in_slot(cache.value_cache, shape.layout, slot, shape.block_size)) == value
    table = data.draw(st.lists(st.integers(0, shape.num_blocks - 1), max_size=4), label="table")
    num_tokens = data.draw(st.integers(0, len(table) * shape.block_size), label="num_tokens")
    gathered = cache.gather(as_index(table, data.draw(forms)), num_tokens)
    order = [block * shape.block_size + offset for block in table for offset in range(shape.block_size)][:num_tokens]
    for side, rows in enumerate(gathered):
        assert rows.is_contiguous()
        assert rows.shape == (num_tokens, *zeros[side].shape)
        assert bits(rows) == b"".join(model[slot][side] for slot in order)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@given(st.data(), shapes(), st.sampled_from(["keys", "values", "slots", "pairs", "ids", "table"]))
def test_bad_input_changes_nothing(data: st.DataObject, shape: Shape, wrong: str) -> None:
    cache = shape.cache()
    for side in (cache.key_cache, cache.value_cache):
        side.view(torch.uint8).fill_(3)
    before = (bits(cache.key_cache), bits(cache.value_cache))
    rows = {
        "keys": random_bits((2, shape.num_heads, shape.head_dim), shape.dtype, 1),
        "values": random_bits((2, shape.num_heads, shape.v_head_dim), shape.dtype, 2),
    }
    bad_slot = data.draw(st.sampled_from([-2, shape.capacity, 2**31, -(2**63), 2**63 - 1]))
    bad_block = data.draw(st.sampled_from([-1, shape.num_blocks, 2**31, -(2**63), 2**63 - 1]))
    place = data.draw(st.integers(0, 1))
    if wrong in rows:
        given_rows = rows[wrong]
        other = torch.float16 if shape.dtype != torch.float16 else torch.float32
        rows[wrong], message = data.draw(
            st.sampled_from(
                [
                    (given_rows[:1], "rows"),
                    (given_rows[:, :, :-1], f"{shape.num_heads}, "),
                    (given_rows.flatten(1), "shape"),
                    (given_rows.transpose(0, 1)[None], "shape"),
                    (torch.zeros(given_rows.shape, dtype=other), f"{shape.dtype}"),
                    (given_rows.to("meta"), "meta"),
                    (given_rows.view(torch.uint8).numpy(), "ndarray"),
                ]
            )
        )
        with pytest.raises((ValueError, TypeError), match=message):
            cache.write(rows["keys"], rows["values"], [0, -1])
    elif wrong == "slots":
        slots = [0, 0]
        slots[place] = bad_slot
        bad: list[Any] = [slots, [0], [[0, -1]], [0.0, 1.0], [True, False], ["0", "1"], torch.zeros(2), None]
        with pytest.raises((ValueError, TypeError), match="slot_mapping"):
            cache.write(rows["keys"], rows["values"], data.draw(st.sampled_from(bad)))
    elif wrong == "pairs":
        pair = [0, 0]
        pair[place] = bad_block
        with pytest.raises((ValueError, TypeError), match="pairs"):
            cache.copy_blocks(
                data.draw(st.sampled_from([[pair], [[0, 0]], [0, 1], [[0]], [[0.0, 1.0]], [[0], [1, 2]]]))
            )
    elif wrong == "ids":
        ids = [0, 0]
        ids[place] = bad_block
        with pytest.raises((ValueError, TypeError), match="ids"):
            cache.zero_blocks(data.draw(st.sampled_from([ids, [[0]], [0.5], [2**70]])))
    else:
        table = [0, 0]
        table[place] = bad_block
        with pytest.raises(ValueError, match=r"block_table\[" + str(place)):
            cache.gather(table, 2 * shape.block_size)
    assert (bits(cache.key_cache), bits(cache.value_cache)) == before


def small(**changes: Any) -> PagedKVCache:
    arguments: dict[str, Any] = {
        "num_blocks": 4,
        "num_heads": 2,
        "head_dim": 8,
        "block_size": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    return PagedKVCache(**(arguments | changes))


def test_errors_name_the_value_and_the_bound() -> None:
    cache = small()
    rows = torch.zeros(1, 2, 8)
    with pytest.raises(
        ValueError, match=r"slot_mapping\[0\]=16 is outside -1\.\.15; this cache has 4 blocks of 4 slots"
    ):
        cache.write(rows, rows, [16])
    with pytest.raises(TypeError, match=r"keys is torch.float64, this cache holds torch.float32"):
        cache.write(rows.double(), rows, [0])
    with pytest.raises(ValueError, match=r"pairs\[1, 0\]=4 is outside 0\.\.3"):
        cache.copy_blocks([[0, 1], [4, 2]])
    with pytest.raises(ValueError, match="target 1 a second time"):
        cache.copy_blocks([[0, 1], [2, 1]])
    with pytest.raises(ValueError, match="target 1, which is also a source"):
        cache.copy_blocks([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="1 blocks of 4 tokens; num_tokens=5 needs 2"):
        cache.gather([0], 5)
    with pytest.raises(ValueError, match="num_tokens=-1"):
        cache.gather([0], -1)
    with pytest.raises(TypeError, match=r"num_tokens=1\.0"):
        cache.gather([0], 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="past any index"):
        cache.zero_blocks([2**64])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, r"num_blocks=0 is outside 1\.\.2147483647"),
        ({"num_heads": -1}, ValueError, "num_heads=-1"),
        ({"head_dim": 2**31}, ValueError, "head_dim=2147483648"),
        ({"block_size": True}, TypeError, "block_size=True is a bool"),
        ({"v_head_dim": 1.5}, TypeError, r"v_head_dim=1\.5 is of type float; give an integer in 1\.\.2147483647"),
        ({"dtype": "float4"}, TypeError, "float4"),
        ({"dtype": torch.complex64}, TypeError, "complex64"),
        ({"layout": "nhd"}, ValueError, "layout='nhd' is unknown; use one of HDN, NHD, HND, X"),
        ({"layout": "X", "head_dim": 10}, ValueError, r"head_dim=10 does not divide by 4: layout X packs 16 bytes"),
        ({"device": "meta"}, ValueError, "device='meta' holds no data"),
        ({"device": "nowhere"}, ValueError, "device='nowhere'"),
        ({"device": "cuda:4096"}, ValueError, "device='cuda:4096': torch .* sees"),
        (
            {"num_blocks": 2**31 - 1, "num_heads": 2**31 - 1, "head_dim": 2**31 - 1},
            OverflowError,
            "9223372036854775807",
        ),
    ],
)
def test_a_cache_that_cannot_be_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_goes_by_its_name_too(dtype: torch.dtype) -> None:
    for given_dtype in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        cache = small(dtype=given_dtype)
        assert cache.dtype == cache.key_cache.dtype == cache.value_cache.dtype == dtype


def test_attributes_say_what_was_asked_for() -> None:
    cache = small(v_head_dim=3, device=torch.device("cpu"))
    assert (cache.num_blocks, cache.num_heads, cache.head_dim, cache.v_head_dim, cache.block_size) == (4, 2, 8, 3, 4)
    assert (cache.layout, cache.device) == ("HDN", torch.device("cpu"))
    assert cache.memory_bytes == cache.key_cache.nbytes + cache.value_cache.nbytes == 4 * 4 * 2 * (8 + 3) * 4
    assert "v_head_dim=3" in repr(cache)


@pytest.mark.parametrize(
    ("layout", "shape", "v_shape"),
    [
        ("HDN", (4, 2, 8, 16), (4, 2, 3, 16)),
        ("NHD", (4, 16, 2, 8), (4, 16, 2, 3)),
        ("HND", (4, 2, 16, 8), (4, 2, 16, 3)),
        ("X", (4, 2, 2, 16, 4), (4, 2, 3, 16)),
    ],
)
def test_shapes_are_those_of_the_layout(layout: str, shape: tuple[int, ...], v_shape: tuple[int, ...]) -> None:
    cache = small(layout=layout, v_head_dim=3, block_size=16)
    assert cache.key_cache.shape == shape
    assert cache.value_cache.shape == v_shape
    assert cache.key_cache.is_contiguous()
    assert not cache.key_cache.any()


def test_the_last_of_equal_slots_wins() -> None:
    cache = small(layout="NHD")
    rows = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 8)
    cache.write(rows, rows, [5, 6, 5])
    assert cache.key_cache[1, :, 0, 0].tolist() == [0.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_lie_in_the_cache_itself_are_read_before_they_are_written(layout: str) -> None:
    cache = small(layout=layout)
    keys = random_bits((16, 2, 8), torch.float32, 1)
    values = random_bits((16, 2, 8), torch.float32, 2)
    cache.write(keys, values, range(16))
    if layout == "NHD":
        flat = (cache.value_cache.flatten(0, 1), cache.key_cache.flatten(0, 1))
        cache.write(flat[0][:-1], flat[1][:-1], range(1, 16))
        gathered = cache.gather(range(4), 16)
        assert bits(gathered[0][1:]) == bits(values[:-1])
        assert bits(gathered[1][1:]) == bits(keys[:-1])
        return
    # Other layouts have no such view of all slots; one block does.
    view = cache.key_cache[0].as_strided((4, 2, 8), (1, 8, 1))
    expected = view.clone()
    cache.write(view, view, [3, 2, 1, 0])
    assert bits(cache.gather([0], 4)[0].flip(0)) == bits(expected)


@pytest.mark.parametrize("sizes", [(3, 2, 8), (1, 1, 1)])  # torch finds one element contiguous, whatever its stride
def test_a_negative_view_is_read_as_what_it_means(sizes: tuple[int, int, int]) -> None:
    cache = small(num_heads=sizes[1], head_dim=sizes[2])
    rows = torch.view_as_complex(torch.randn(*sizes, 2)).conj().imag
    assert rows.is_neg()
    cache.write(rows, rows, range(sizes[0]))
    assert torch.equal(cache.gather([0], sizes[0])[0], rows)


def test_gather_fills_what_it_is_given() -> None:
    cache = small(layout="NHD", v_head_dim=3)
    keys, values = torch.randn(5, 2, 8), torch.randn(5, 2, 3)
    cache.write(keys, values, range(5))
    out = (torch.empty(5, 2, 8), torch.empty(5, 2, 3))
    filled = cache.gather([0, 1, -9], 5, out=out)
    assert filled[0] is out[0]
    assert filled[1] is out[1]
    assert torch.equal(out[0], keys)
    assert torch.equal(out[1], values)
    bad: list[Any] = [
        (out[1], out[0]),
        (out[0].double(), out[1]),
        (out[0], out[1][:4]),
        (out[0].transpose(1, 2).contiguous().transpose(1, 2), out[1]),
        (cache.key_cache.flatten(0, 1)[:5], out[1]),
    ]
    for outputs in bad:
        with pytest.raises((ValueError, TypeError), match=r"out\["):
            cache.gather([0, 1], 5, out=outputs)


def test_large_results_are_their_own_memory() -> None:
    cache = PagedKVCache(1024, 8, 128, 16, "float32", "cpu", layout="NHD")
    keys = torch.randn(1024 * 16, 8, 128)
    cache.write(keys, keys, range(1024 * 16))
    gathered = cache.gather(range(1024), 1024 * 16)
    assert torch.equal(gathered[0], keys)
    cache.zero_blocks(range(1024))
    assert torch.equal(gathered[1], keys)


def test_untouched_blocks_take_no_memory() -> None:
    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")

    before = resident()
    cache = PagedKVCache(32768, 8, 128, 16, "bfloat16", "cpu")
    assert cache.memory_bytes == 2 << 30
    rows = torch.ones(1, 8, 128, dtype=torch.bfloat16)
    cache.write(rows, rows, [100 * 16])
    assert resident() - before < 50 << 20
    touched = PagedKVCache(1024, 8, 128, 16, "bfloat16", "cpu", prefault=True)
    assert resident() - before > touched.memory_bytes


def test_a_fork_does_not_see_later_writes_nor_show_its_own() -> None:
    cache = small(layout="NHD")
    ones = torch.ones(1, 2, 8)
    child = os.fork()
    if child == 0:
        cache.write(ones, ones, [0])
        os._exit(int(cache.key_cache[0, 0, 0, 0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not cache.key_cache.any()


def test_more_than_there_is_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory) as caught:
        PagedKVCache(2**31 - 1, 8, 128, 16, "bfloat16", "cpu")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.requested == (2**31 - 1) * 16 * 8 * 256 * 2
    assert 0 < error.free < error.requested
    assert error.blocks_that_fit == error.free // (16 * 8 * 256 * 2)
    assert str(error.requested) in str(error)


@given(shapes(), st.integers(0, 1 << 20))
def test_available_memory_is_asked_first(shape: Shape, free: int) -> None:
    config = CacheConfig(
        num_layers=1,
        num_kv_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_gpu_blocks=shape.num_blocks,
        block_size=shape.block_size,
        v_head_dim=shape.v_head_dim,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "room", lambda: memory.Room(free, "a test"))
        if config.memory_bytes(shape.dtype) <= free:
            assert shape.cache().memory_bytes == config.memory_bytes(shape.dtype)
            return
        patch.setattr(memory, "zeroed", None)  # nothing may be allocated
        with pytest.raises(OutOfMemory) as caught:
            shape.cache()
    fit = caught.value.blocks_that_fit
    assert caught.value.free == free
    assert fit * config.block_bytes(shape.dtype) <= free < (fit + 1) * config.block_bytes(shape.dtype)


def test_what_the_system_refuses_is_out_of_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room", lambda: memory.Room(2**62, "a test"))
    with pytest.raises(OutOfMemory, match="blocks fit"):
        PagedKVCache(2**31 - 1, 512, 128, 128, "bfloat16", "cpu")


def test_threads_writing_to_different_slots_lose_nothing() -> None:
    cache = PagedKVCache(512, 2, 64, 16, "float32", "cpu", layout="HDN")
    keys, values = torch.randn(512 * 16, 2, 64), torch.randn(512 * 16, 2, 64)
    order = torch.randperm(512 * 16).view(64, -1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda slots: cache.write(keys[slots], values[slots], slots), order))
        results = list(pool.map(lambda block: cache.gather([block], 16), range(512)))
    assert torch.equal(torch.cat([result[0] for result in results]), keys)
    assert torch.equal(torch.cat([result[1] for result in results]), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_of_a_cache_is_independent(layout: str) -> None:
    cache = small(layout=layout)
    ones = torch.ones(1, 2, 8)
    cache.write(ones, ones, [3])
    other = copy.deepcopy(cache)
    other.write(2 * ones, 2 * ones, [3])
    assert set(cache.gather([0], 4)[0][3].flatten().tolist()) == {1.0}
    assert set(other.gather([0], 4)[0][3].flatten().tolist()) == {2.0}


def test_inference_mode_and_default_devices_do_not_matter() -> None:
    ones = torch.ones(1, 2, 8)
    with torch.inference_mode():
        cache = small()
        cache.write(ones, ones, [0])
    assert not cache.key_cache.is_inference()
    with torch.device("meta"):
        cache = small()
        cache.write(ones, ones, [1])
        keys, _ = cache.gather([0], 2)
    assert keys.device == torch.device("cpu")
    assert keys.sum() == 16


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches take the path of devices, though their tensors lie in CPU memory."""
    monkeypatch.setattr(storage, "mover", movers.WithTorch)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_path_of_devices_gives_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    cache = small(layout=layout, dtype=dtype, head_dim=32, v_head_dim=3)
    keys, values = random_bits((12, 2, 32), dtype, 1), random_bits((12, 2, 3), dtype, 2)
    slots = [5, -1, 0, 15, 1, 2, 3, 4, 9, 10, -1, 11]
    cache.write(keys, values, slots)
    for row, slot in enumerate(slots):
        if slot >= 0:
            assert bits(in_slot(cache.key_cache, layout, slot, 4)) == bits(keys[row])
            assert bits(in_slot(cache.value_cache, layout, slot, 4)) == bits(values[row])
    cache.copy_blocks([[1, 3]])
    cache.zero_blocks([0])
    gathered = cache.gather([3, 0, 2], 11)
    out = (torch.empty_like(gathered[0]), torch.empty_like(gathered[1]))
    assert cache.gather([3, 0, 2], 11, out=out)[0] is out[0]
    for side, rows in zip(gathered, (keys, values), strict=True):
        assert bits(side[:2]) == bits(torch.stack([rows[7], rows[0]]))
        assert bits(side[4:8]) == bytes(len(bits(side[4:8])))
        assert bits(side[9:]) == bits(rows[8:10])
    assert bits(out[0]) == bits(gathered[0])


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_round_trip(layout: str, dtype: torch.dtype) -> None:
    cache = small(layout=layout, dtype=dtype, head_dim=32, device="cuda")
    keys, values = random_bits((16, 2, 32), dtype, 1), random_bits((16, 2, 32), dtype, 2)
    slots = torch.randperm(16)
    cache.write(keys.cuda(), values.cuda(), torch.cat([slots[:-1], torch.tensor([99])]).cuda())
    cache.write(keys[-1:].cuda(), values[-1:].cuda(), slots[-1:])
    gathered = cache.gather([0, 1, 2, 3], 16)
    assert cache.key_cache.is_cuda
    assert bits(gathered[0].cpu()[slots]) == bits(keys)
    assert bits(gathered[1].cpu()[slots]) == bits(values)


@pytest.mark.cuda
def test_cuda_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(device="cuda")
    rows = torch.ones(1, 2, 8, device="cuda")
    with pytest.raises(ValueError, match="keys is on cpu"):
        cache.write(rows.cpu(), rows, [0])
    with pytest.raises(ValueError, match=r"slot_mapping\[0\]=16"):
        cache.write(rows, rows, [16])
    monkeypatch.setattr(storage, "CHECKED", True)
    with pytest.raises(ValueError, match=r"slot_mapping\[0\]=16"):
        cache.write(rows, rows, torch.tensor([16], device="cuda"))
    with pytest.raises(OutOfMemory, match="blocks fit"):
        small(device="cuda", num_blocks=2**31 - 1, num_heads=64)
    assert not cache.key_cache.any()


@pytest.mark.parametrize("value", ["1", "0", None])
def test_an_environment_variable_turns_checks_on(value: str | None) -> None:
    environment = {name: setting for name, setting in os.environ.items() if name != "KVBLOCKS_CHECKED"}
    environment |= {} if value is None else {"KVBLOCKS_CHECKED": value}
    command = [sys.executable, "-c", "from kvblocks.storage import cache; print(cache.CHECKED)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(value == "1")


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_without_memory_are_refused(kind: str) -> None:
    """Compiled code must not follow an address that is none, or past the end of what is there."""
    cache = PagedKVCache(2, 1, 4, 2, torch.float32, "cpu")
    made = WITHOUT_MEMORY[kind]
    rows, good = made((2, 1, 4), torch.float32), torch.ones(2, 1, 4)
    for index in (made((2,), torch.int64), made((2,), torch.int32)):
        with pytest.raises(TypeError, match=r"slot_mapping is a .* without memory"):
            cache.write(good, good, index)
        with pytest.raises(TypeError, match=r"block_table is a .* without memory"):
            cache.gather(index, 2)
        with pytest.raises(TypeError, match=r"ids is a .* without memory"):
            cache.zero_blocks(index)
    with pytest.raises(TypeError, match=r"keys is a .* without memory"):
        cache.write(rows, good, [0, 1])
    with pytest.raises(TypeError, match=r"values is a .* without memory"):
        cache.write(good, rows, [0, 1])
    with pytest.raises(TypeError, match=r"out\[1\] is a .* without memory"):
        cache.gather([0], 2, out=(good, rows))
    assert not cache.key_cache.any()


def test_outputs_that_share_memory_are_refused() -> None:
    cache = PagedKVCache(2, 1, 4, 2, torch.float32, "cpu")
    out = torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match="share memory"):
        cache.gather([0], 2, out=(out, out))
    with pytest.raises(TypeError, match="2 tensors"):
        cache.gather([0], 2, out=(out,))
    assert out.eq(1).all()


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|NestedTensor).*")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda t: torch.nested.nested_tensor(list(t)), "nested"),
        (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), "nested"),
        (lambda t: t.to_sparse(), "torch.sparse_coo"),
        (lambda t: t.reshape(len(t), -1).to_sparse_csr(), "torch.sparse_csr"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(make: Callable[[Tensor], Tensor], name: str) -> None:
    cache, rows, slots = small(), torch.ones(2, 2, 8), torch.tensor([[0, 1], [2, 3]])
    odd, odd_slots = make(rows), make(slots)
    step, manager = StepBuffers(1, 4, 4), BlockManager(cache.num_blocks, cache.block_size)
    manager.prepare([manager.admit([1, 2])[0]], [2], step)
    calls: dict[str, Callable[[], object]] = {
        "keys": lambda: cache.write(odd, rows, [0, 1]),
        "values": lambda: cache.write(rows, odd, [0, 1]),
        "slot_mapping": lambda: cache.write(rows, rows, odd_slots),
        "block_table": lambda: cache.gather(odd_slots, 2),
        r"out\[0\]": lambda: cache.gather([0], 2, out=(odd, rows)),
        "pairs": lambda: cache.copy_blocks(odd_slots),
        "ids": lambda: cache.zero_blocks(odd_slots),
        "query": lambda: paged_attention(odd, cache, step),
        "sinks": lambda: paged_attention(rows, cache, step, sinks=odd),
    }
    for what, call in calls.items():
        with pytest.raises(TypeError, match=f"^{what} is {name}; give a dense tensor"):
            call()
    assert not cache.key_cache.any()
