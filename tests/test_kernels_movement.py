"""Triton's movement equals the torch path to the bit: every layout and dtype, ragged and padded, far offsets."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICES, bits, engine_moved_by, moved_by, random_bits
from torch import Tensor

from kvblocks import memory
from kvblocks.config import CacheConfig, LayerTensor, itemsize, key_value
from kvblocks.kernels import kernels
from kvblocks.sizes import LAYOUTS
from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.movers import WithTorch, WithTriton

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

# Each gives the same rows [n, heads, dim] with other strides.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda rows: rows,
    "part of q, k and v": lambda rows: torch.cat([rows, rows, rows], 1)[:, rows.shape[1] : 2 * rows.shape[1]],
    "heads first": lambda rows: rows.transpose(0, 1).contiguous().transpose(0, 1),
    "every other dim": lambda rows: torch.stack([rows, rows], 3).flatten(2)[:, :, ::2],
    "odd offset": lambda rows: torch.cat([rows.flatten(), rows.flatten()])[rows.numel() :].view(rows.shape),
    "odd strides": lambda rows: torch.cat([rows, rows[:, :, :1]], 2)[:, :, :-1],
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

    def cache(self, kind: type, device: str) -> PagedKVCache:
        sizes = (self.num_blocks, self.num_heads, self.head_dim, self.block_size)
        return moved_by(kind, *sizes, self.dtype, device, layout=self.layout, v_head_dim=self.v_head_dim)

    @property
    def capacity(self) -> int:
        return self.num_blocks * self.block_size


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    pack = 16 // dtype.itemsize if layout == "X" else 1
    dims = st.sampled_from([1, 3, 8, 20, 32, 64])
    return Shape(
        num_blocks=draw(st.integers(1, 5)),
        num_heads=draw(st.sampled_from([1, 2, 3, 16])),
        head_dim=pack * -(-draw(dims) // pack),
        v_head_dim=draw(dims),
        block_size=draw(st.sampled_from([1, 2, 5, 8, 16, 17, 48])),
        dtype=dtype,
        layout=layout,
    )


@st.composite
def slot_lists(draw: st.DrawFn, capacity: int) -> list[int]:
    """Slots of different tokens: runs of neighbours, as prefill has, single ones, as decode has, and padding."""
    cuts = sorted(draw(st.sets(st.integers(0, capacity), max_size=8)) | {0, capacity})
    runs = [list(range(low, high)) for low, high in itertools.pairwise(cuts)]
    chosen = draw(st.permutations(runs))[: draw(st.integers(0, len(runs)))]
    slots = [slot for run in chosen for slot in run]
    for _ in range(draw(st.integers(0, 3))):
        slots.insert(draw(st.integers(0, len(slots))), draw(st.sampled_from([-1, -2, capacity, 2**31, -(2**63)])))
    return slots[: draw(st.integers(0, 100))] if draw(st.booleans()) else slots


def indices(values: list[int], device: str, form: torch.dtype) -> Tensor:
    fits = all(-(2**31) <= value < 2**31 for value in values)
    return torch.tensor(values, dtype=form if fits else torch.int64, device=device)


def assert_same(a: PagedKVCache, b: PagedKVCache) -> None:
    assert [bits(tensor) for tensor in a.tensors.values()] == [bits(tensor) for tensor in b.tensors.values()]


def unchecked(cache: PagedKVCache) -> Any:
    """The cache's mover itself: on CPU the calls of a cache would refuse what is out of range."""
    return cache._mover


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(data=st.data(), shape=shapes())
def test_any_history_gives_the_same_bits_as_torch(device: str, data: st.DataObject, shape: Shape) -> None:
    ours, theirs = shape.cache(WithTriton, device), shape.cache(WithTorch, device)
    for cache in (ours, theirs):
        cache.key_cache.view(torch.uint8).fill_(3)
        cache.value_cache.view(torch.uint8).fill_(5)
    form = data.draw(st.sampled_from([torch.int64, torch.int32]))
    for seed in range(data.draw(st.integers(1, 2))):
        slots = data.draw(slot_lists(shape.capacity))
        keys = random_bits((len(slots), shape.num_heads, shape.head_dim), shape.dtype, seed)
        values = random_bits((len(slots), shape.num_heads, shape.v_head_dim), shape.dtype, seed + 100)
        as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shape.dtype.itemsize]
        keys, values = (
            STRIDES[data.draw(st.sampled_from(sorted(STRIDES)))](rows.view(as_bits).to(device)).view(shape.dtype)
            for rows in (keys, values)
        )
        keys, values = (rows.contiguous() if rows.stride(2) != 1 else rows for rows in (keys, values))
        for cache in (ours, theirs):
            unchecked(cache).write((keys, values), indices(slots, device, form))
        assert_same(ours, theirs)

    table = data.draw(st.lists(st.integers(-1, shape.num_blocks), max_size=4))
    num_tokens = data.draw(st.integers(0, len(table) * shape.block_size))
    index = indices(table, device, form)
    expected = unchecked(theirs).gather(index, num_tokens, None)
    out = tuple(torch.full_like(rows.view(torch.uint8), 7).view(rows.dtype) for rows in expected)
    for found in (unchecked(ours).gather(index, num_tokens, None), unchecked(ours).gather(index, num_tokens, out)):
        for side in range(2):
            assert found[side].shape == expected[side].shape
            assert found[side].dtype == shape.dtype
            assert found[side].is_contiguous()
            assert bits(found[side]) == bits(expected[side])

    blocks = data.draw(st.permutations(range(-1, shape.num_blocks + 1)))
    pairs = indices(blocks[: len(blocks) // 2 * 2], device, form).view(-1, 2)
    ids = indices(data.draw(st.lists(st.integers(-1, shape.num_blocks), max_size=3)), device, form)
    for cache in (ours, theirs):
        unchecked(cache).copy_blocks(pairs)
    assert_same(ours, theirs)
    for cache in (ours, theirs):
        unchecked(cache).zero_blocks(ids)
    assert_same(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_dtype_through_the_public_calls(layout: str, dtype: torch.dtype, device: str) -> None:
    shape = Shape(6, 2, 32, 24, 16, dtype, layout)
    ours, theirs = shape.cache(WithTriton, device), shape.cache(WithTorch, device)
    slots = [*range(32, 48), *range(4, 16), -1, 80, 81, 95, -1, 66, 65, 3]
    keys = random_bits((len(slots), 2, 32), dtype, 1, device)
    values = random_bits((len(slots), 2, 24), dtype, 2, device)
    for cache in (ours, theirs):
        cache.write(keys, values, torch.tensor(slots, device=device))
        cache.copy_blocks([[2, 3], [0, 1]])
        cache.zero_blocks(torch.tensor([2], device=device))
    assert_same(ours, theirs)
    for a, b in zip(ours.gather([3, 0, 5], 37), theirs.gather([3, 0, 5], 37), strict=True):
        assert bits(a) == bits(b)
    assert bits(ours.gather([3], 16)[0]) == bits(keys[:16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(
    "slots",
    [
        range(32, 64),
        [*range(32, 40), *range(8, 16), *range(24, 32), *range(16)[:8]],
        [*range(1, 33)],
        [32, 34, 33, *range(35, 64)],
        [*range(32, 63), 62 - 32],
        range(96, 128),  # past the end, and before the start: aligned, and one after the other
        range(-32, 0),
        [*range(80, 96), *range(96, 112)],
    ],
    ids=["blocks", "halves", "not aligned", "swapped", "last astray", "past the end", "negative", "over the end"],
)
def test_tokens_that_may_go_together_do_so_only_where_it_is_right(
    slots: list[int], dtype: torch.dtype, layout: str, device: str
) -> None:
    shape = Shape(8, 2, 16, 16, 16, dtype, layout)
    ours, theirs = shape.cache(WithTriton, device), shape.cache(WithTorch, device)
    keys, values = (random_bits((32, 2, 16), dtype, seed, device) for seed in (1, 2))
    for cache in (ours, theirs):
        cache.key_cache.view(torch.uint8).fill_(3)
        cache.value_cache.view(torch.uint8).fill_(5)
    # The cache ends after 96 slots, and memory goes on: what is written past its end is seen.
    unchecked(ours)._capacity = 96
    unchecked(ours).write((keys, values), torch.tensor(list(slots), device=device))
    inside = [slot if slot < 96 else -1 for slot in slots]
    unchecked(theirs).write((keys, values), torch.tensor(inside, device=device))
    assert_same(ours, theirs)


UNLIKE = [  # one tensor, two and three, of several dtypes, in blocks of several sizes
    (LayerTensor("latent", (1, 24)),),
    key_value(2, 16, 24),
    (*key_value(1, 8), LayerTensor("index", (1, 8), "uint8")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layers", [[key_value(2, 16, 24)] * 3, UNLIKE], ids=["alike", "unlike"])
def test_blocks_of_all_layers_move_in_one_launch(
    layers: list[tuple[LayerTensor, ...]], layout: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CacheConfig(layers=layers, num_gpu_blocks=5, block_size=4)
    ours = engine_moved_by(WithTriton, config, "float16", device, layout=layout)
    theirs = engine_moved_by(WithTorch, config, "float16", device, layout=layout)
    for seed, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name, tensor in a.tensors.items():
            given_bits = random_bits(tensor.shape, tensor.dtype, seed, device)
            tensor.copy_(given_bits)
            b.tensors[name].copy_(given_bits)
    module = kernels("movement")
    assert module is not None
    launches = []
    launch = module._launch_blocks

    def counted(*given: Any) -> None:
        launches.append(given)
        launch(*given)

    monkeypatch.setattr(module, "_launch_blocks", counted)
    ours.copy_blocks([[0, 3], [1, 4]])
    ours.zero_blocks([1])
    theirs.copy_blocks([[0, 3], [1, 4]])
    theirs.zero_blocks([1])
    assert len(launches) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_layers_of_one_tensor_and_of_three(layout: str, device: str) -> None:
    config = CacheConfig(layers=UNLIKE, num_gpu_blocks=5, block_size=4)
    ours = engine_moved_by(WithTriton, config, "float16", device, layout=layout)
    theirs = engine_moved_by(WithTorch, config, "float16", device, layout=layout)
    for a, b, layer in zip(ours, theirs, UNLIKE, strict=True):
        tensors = zip(layer, a.tensors.values(), strict=True)
        given: Any = [
            random_bits((7, *spec.shape), made.dtype, seed, device) for seed, (spec, made) in enumerate(tensors)
        ]
        for cache in (a, b):
            cache.write(*given, [3, 4, 5, 17, -1, 9, 0])
        assert_same(a, b)
        one, other = a.gather([1, 0, 4], 11), b.gather([1, 0, 4], 11)
        assert [bits(rows) for rows in one] == [bits(rows) for rows in other]
        assert any(any(bits(rows)) for rows in one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_offsets_past_31_bits(layout: str, dtype: str, device: str) -> None:
    """K has more elements than an int32 counts; its pages are not touched on CPU, so they cost nothing."""
    block = 2 * 64 * 16
    num_blocks = 2**31 // block + 3
    needed = num_blocks * block * itemsize(dtype)
    if device == "cpu" and memory.available_memory() < 1.2 * needed:
        pytest.skip(f"needs {needed} bytes to be available")
    cache = moved_by(WithTriton, num_blocks, 2, 64, 16, dtype, device, layout=layout, v_head_dim=1)
    keys, values = (random_bits((18, 2, dim), cache.dtype, dim, device) for dim in (64, 1))
    last = num_blocks - 1
    slots = torch.arange(last * 16 - 2, last * 16 + 16, device=device)
    cache.write(keys, values, slots)
    cache.copy_blocks([[last, last - 2]])
    found = cache.gather([last - 1, last - 2, 0], 40)
    for rows, expected in zip(found, (keys, values), strict=True):
        assert bits(rows[14:32]) == bits(expected)
        assert not rows[32:].view(torch.uint8).any()
    cache.zero_blocks([last])
    assert not cache.gather([last], 16)[0].view(torch.uint8).any()
    assert bits(cache.gather([last - 2], 16)[0]) == bits(keys[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("apart", [2**30 + 16, 2**30 + 1])
def test_rows_whose_strides_pass_31_bits(apart: int, device: str) -> None:
    far = torch.zeros(3 * apart + 64, dtype=torch.uint8, device=device) if device != "cpu" else None
    far = memory.zeroed(3 * apart + 64) if far is None else far
    rows = far.as_strided((4, 2, 16), (apart, 32, 1))
    rows.copy_(random_bits((4, 2, 16), torch.uint8, 1, device))
    cache = moved_by(WithTriton, 2, 2, 16, 4, "uint8", device, layout="NHD")
    cache.write(rows, rows, torch.arange(4, device=device))
    assert bits(cache.gather([0], 4)[0]) == bits(rows)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_lie_in_the_cache_are_read_before_they_are_written(device: str) -> None:
    cache = moved_by(WithTriton, 4, 2, 8, 4, "float32", device, layout="NHD")
    keys, values = (random_bits((16, 2, 8), torch.float32, seed, device) for seed in (1, 2))
    cache.write(keys, values, torch.arange(16, device=device))
    flat = (cache.value_cache.flatten(0, 1), cache.key_cache.flatten(0, 1))
    cache.write(flat[0][:-1], flat[1][:-1], torch.arange(1, 16, device=device))
    gathered = cache.gather([0, 1, 2, 3], 16)
    assert bits(gathered[0][1:]) == bits(values[:-1])
    assert bits(gathered[1][1:]) == bits(keys[:-1])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_neither_needed_nor_kept(device: str) -> None:
    cache = moved_by(WithTriton, 2, 1, 8, 4, "float32", device)
    rows = torch.ones(2, 1, 8, requires_grad=True, device=device)
    cache.write(rows, rows, torch.tensor([0, 5], device=device))
    assert not cache.key_cache.requires_grad
    assert cache.key_cache.sum() == 16


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_of_an_engine_moves_its_own_blocks(device: str) -> None:
    engine = engine_moved_by(
        WithTriton,
        CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_gpu_blocks=4, block_size=4),
        "float32",
        device,
        layout="NHD",
    )
    for cache in engine:
        cache.key_cache[1] = 1
    other = copy.deepcopy(engine)
    other.copy_blocks([[1, 2]])
    other[0].copy_blocks([[1, 3]])
    assert other[0].key_cache.sum() == 3 * 32
    assert other[1].key_cache.sum() == 2 * 32
    assert engine[0].key_cache.sum() == engine[1].key_cache.sum() == 32


def test_nothing_is_launched_for_nothing() -> None:
    cache = moved_by(WithTriton, 2, 1, 8, 4, "float32", "cpu")
    empty = torch.zeros(0, dtype=torch.int64)
    cache.write(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), empty)
    cache.copy_blocks([])
    cache.zero_blocks([])
    keys, values = cache.gather([], 0)
    assert keys.shape == values.shape == (0, 1, 8)
