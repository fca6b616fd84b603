"""CacheEngine: all layers or none, exactly the bytes that the config says, and handles that share their storage."""

import gc
import logging
import mmap
import os
import re
import resource
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvblocks import memory, paged_attention
from kvblocks.attention import call as attention_call
from kvblocks.config import CacheConfig, Group, LayerTensor, key_value
from kvblocks.engine import CacheEngine
from kvblocks.errors import OutOfMemory
from kvblocks.manager import BlockManager
from kvblocks.sizes import LAYOUTS
from kvblocks.step import StepBuffers

configs = st.builds(
    CacheConfig,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 3).map(lambda n: 16 * n),
    num_gpu_blocks=st.integers(1, 5),
    block_size=st.integers(1, 17),
    v_head_dim=st.none() | st.integers(1, 20),
)
dtypes = st.sampled_from(["int8", "float8_e4m3fn", torch.bfloat16, "torch.float32", torch.float64])
SMALL = CacheConfig(num_layers=3, num_kv_heads=2, head_dim=8, num_gpu_blocks=5, block_size=4)


def tensors(engine: CacheEngine) -> list[Tensor]:
    return [tensor for cache in engine for tensor in cache.tensors.values()]


def mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@given(configs, dtypes, st.sampled_from(LAYOUTS))
def test_bytes_are_those_of_the_config(config: CacheConfig, dtype: torch.dtype | str, layout: str) -> None:
    engine = CacheEngine(config, dtype, "cpu", layout=layout)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors(engine)]
    assert engine.memory_bytes == config.memory_bytes(dtype) == sum(sizes)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(engine)}
    assert sum(storages.values()) == engine.memory_bytes
    assert len(engine) == config.num_layers
    assert (engine.config, engine.num_blocks, engine.block_size) == (config, config.num_gpu_blocks, config.block_size)
    assert (engine.dtype, engine.device, engine.layout) == (engine[0].dtype, torch.device("cpu"), layout)
    assert all(cache.v_head_dim == config.v_head_dim for cache in engine)


@given(st.integers(-9, 9))
def test_handing_out(layer: int) -> None:
    engine = CacheEngine(SMALL, "float16", "cpu")
    caches = engine.get_all_caches()
    assert caches == list(engine)
    if layer < 0:
        with pytest.raises(ValueError, match=rf"layer={layer} is negative; layers are 0\.\.2"):
            engine.get_cache(layer)
    else:
        assert engine.get_cache(layer) is (caches[layer] if layer < 3 else None)
    if -3 <= layer < 3:
        assert engine[layer] is engine[np.int64(layer)] is caches[layer]
    else:
        with pytest.raises(IndexError, match=rf"layer {layer} is outside -3\.\.2"):
            engine[layer]


@pytest.mark.parametrize("layer", [True, 1.0, "1", None, slice(1)])
def test_a_layer_is_an_integer(layer: Any) -> None:
    engine = CacheEngine(SMALL, "float16", "cpu")
    with pytest.raises(TypeError, match="give an integer"):
        engine.get_cache(layer)
    with pytest.raises(TypeError, match="give an integer"):
        engine[layer]


def test_the_list_of_caches_is_the_callers_own() -> None:
    engine = CacheEngine(SMALL, "float16", "cpu")
    engine.get_all_caches().clear()
    assert len(engine.get_all_caches()) == 3


def test_handles_share_storage() -> None:
    engine = CacheEngine(SMALL, "float32", "cpu")
    rows = torch.randn(2, 2, 8)
    cache = engine.get_cache(1)
    assert cache is not None
    cache.write(rows, rows, [3, 19])
    assert torch.equal(engine[1].gather([0, 4], 8)[0][[3, 7]], rows)
    assert not engine[0].key_cache.any()
    assert not engine[2].key_cache.any()


@given(st.permutations(range(5)), st.integers(0, 2), st.lists(st.integers(0, 4)))
def test_copies_and_zeros_reach_every_layer(blocks: list[int], copies: int, ids: list[int]) -> None:
    engine = CacheEngine(SMALL, "float32", "cpu", layout="NHD")
    for tensor in tensors(engine):
        tensor.normal_()
    expected = [tensor.clone() for tensor in tensors(engine)]
    pairs = [(blocks[2 * i], blocks[2 * i + 1]) for i in range(copies)]
    for tensor in expected:
        for source, target in pairs:
            tensor[target] = tensor[source]
        tensor[ids] = 0
    engine.copy_blocks(pairs)
    engine.zero_blocks(ids)
    assert all(torch.equal(a, b) for a, b in zip(tensors(engine), expected, strict=True))


@pytest.mark.parametrize("pairs", [[[0, 1], [0, 5]], [[0, 1], [2, 1]], [[0, 1], [1, 2]], [[0, 1, 2]], [[0.0, 1.0]]])
def test_a_bad_copy_changes_no_layer(pairs: Any) -> None:
    engine = CacheEngine(SMALL, "float32", "cpu")
    for tensor in tensors(engine):
        tensor.normal_()
    before = [tensor.clone() for tensor in tensors(engine)]
    with pytest.raises((ValueError, TypeError), match="pairs"):
        engine.copy_blocks(pairs)
    with pytest.raises(ValueError, match=r"ids\[1\]=5"):
        engine.zero_blocks([0, 5])
    assert all(torch.equal(a, b) for a, b in zip(tensors(engine), before, strict=True))


def test_one_line_says_how_much_was_allocated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvblocks"):
        CacheEngine(CacheConfig(num_layers=4, num_kv_heads=8, head_dim=128, num_gpu_blocks=10), "bfloat16", "cpu")
    assert [record.getMessage() for record in caplog.records] == ["KV cache on cpu: 10 blocks x 4 layers = 2.6 MB"]


@given(st.permutations(range(5)), st.lists(st.integers(0, 2), min_size=5, max_size=5), st.sampled_from(LAYOUTS))
def test_layers_of_groups_share_memory_by_their_place(order: list[int], parts: list[int], layout: str) -> None:
    members = [[layer for layer, part in zip(order, parts, strict=True) if part == g] for g in range(3)]
    groups = tuple(Group(None, tuple(layers)) for layers in members if layers)
    config = CacheConfig(num_layers=5, num_kv_heads=2, head_dim=16, num_gpu_blocks=6, block_size=4, groups=groups)
    engine = CacheEngine(config, "bfloat16", "cpu", layout=layout)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(engine)}
    assert engine.memory_bytes == config.memory_bytes("bfloat16") == sum(storages.values())
    assert len({id(cache) for cache in engine}) == len(engine) == 5
    for g, group in enumerate(groups):
        assert [engine.group_of(layer) for layer in group.layers] == [g] * len(group.layers)
        assert len({engine[layer].key_cache.data_ptr() for layer in group.layers}) == len(group.layers)
    for alike in zip_longest(*[[engine[layer] for layer in group.layers] for group in groups]):
        assert len({cache.value_cache.data_ptr() for cache in alike if cache is not None}) == 1
    with pytest.raises(IndexError, match="layer 5"):
        engine.group_of(5)
    keys = torch.randn(1, 2, 16).bfloat16()
    for cache in engine:
        cache.write(keys, keys, [4])
    engine.copy_blocks([(1, 5)])
    assert all(torch.equal(cache.gather([5], 1)[0], keys) for cache in engine)


key_values = st.builds(key_value, st.integers(1, 3), st.integers(1, 3).map(lambda n: 16 * n), st.integers(1, 20))
own_dtypes = st.none() | st.sampled_from(["uint8", "bfloat16", "float64"])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 20))
others = st.builds(LayerTensor, st.just("other"), sizes, own_dtypes)
latents = st.tuples(st.builds(LayerTensor, st.just("latent"), sizes, own_dtypes))
layers_of_any_kind = key_values | latents | st.builds(lambda kv, other: (*kv, other), key_values, others)


@given(st.lists(layers_of_any_kind, min_size=2, max_size=5), st.data(), dtypes, st.sampled_from(LAYOUTS))
def test_layers_of_any_kind_share_blocks(
    layers: list[tuple[LayerTensor, ...]], data: st.DataObject, dtype: torch.dtype | str, layout: str
) -> None:
    """What each layer of a group holds stays apart, a block moves whole, and all of it is what the config says."""
    order = data.draw(st.permutations(range(len(layers))))
    cut = data.draw(st.integers(1, len(layers)))
    groups = [Group(None, tuple(part)) for part in (order[:cut], order[cut:]) if part]
    own = {tensor.dtype for layer in layers for tensor in layer}
    block_size = data.draw(st.integers(1, 5) if len(own) == 1 or len(groups) == 1 else st.just(8))
    config = CacheConfig(layers=layers, num_gpu_blocks=4, block_size=block_size, groups=groups)
    engine = CacheEngine(config, dtype, "cpu", layout=layout)
    assert engine.memory_bytes == config.memory_bytes(dtype)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(engine)}
    assert sum(storages.values()) == engine.memory_bytes
    if len(groups) == 1:
        assert all(tensor.is_contiguous() for tensor in tensors(engine))
    generator = torch.Generator().manual_seed(0)

    def written(layer: int, block: int) -> list[Tensor]:
        rows = []
        for spec, tensor in zip(layers[layer], engine[layer].tensors.values(), strict=True):
            some = torch.randint(0, 100, (block_size, *spec.shape), generator=generator).to(torch.uint8)
            assert tensor.dtype == engine.dtype if spec.dtype is None else str(tensor.dtype) == f"torch.{spec.dtype}"
            rows.append(some.to(torch.float32).to(tensor.dtype))
        engine[layer].write(*rows, [block * block_size + i for i in range(block_size)])
        return rows

    def same(got: tuple[Tensor, ...], put: list[Tensor]) -> bool:
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, put, strict=True))

    # Group g writes block g, and block g becomes block 3 - g.
    kept = {layer: written(layer, g) for g, group in enumerate(groups) for layer in group.layers}
    engine.copy_blocks([(g, 3 - g) for g in range(len(groups))])
    for g, group in enumerate(groups):
        for layer in group.layers:
            cache = engine[layer]
            assert list(cache.tensors) == [spec.name for spec in layers[layer]]
            assert same(cache.gather([g], block_size), kept[layer])
            out = [torch.empty_like(rows) for rows in kept[layer]]
            assert same(cache.gather([3 - g], block_size, out=out), kept[layer])
            assert same(tuple(out), kept[layer])
    engine.zero_blocks([3])
    for layer in groups[0].layers:
        assert not any(rows.view(torch.uint8).any() for rows in engine[layer].gather([3], block_size))
        assert same(engine[layer].gather([0], block_size), kept[layer])


INDEXED = (*key_value(2, 16), LayerTensor("index", (1, 8), "float32"))


def test_a_layer_of_other_tensors_says_what_it_keeps() -> None:
    config = CacheConfig(layers=[(LayerTensor("latent", (1, 24)),), INDEXED], num_gpu_blocks=4, block_size=4)
    engine = CacheEngine(config, "bfloat16", "cpu", layout="NHD")
    latent, indexed = engine
    assert (latent.has_key_value, indexed.has_key_value, latent.dtype) == (False, True, torch.bfloat16)
    assert latent.tensors["latent"].shape == (4, 4, 1, 24)
    assert indexed.tensors["index"].dtype == torch.float32
    assert indexed.tensors["key"] is indexed.key_cache
    assert repr(latent) == "<PagedKVCache of 4 blocks of 4 tokens on cpu: latent [1, 24]>"
    for name in ("key_cache", "value_cache", "num_heads", "head_dim", "v_head_dim", "block_layouts"):
        assert hasattr(indexed, name)
        with pytest.raises(AttributeError, match=f"there is no {name}: the layer keeps latent, not key and value"):
            getattr(latent, name)
    rows, keys, index = torch.ones(2, 1, 24).bfloat16(), torch.ones(2, 2, 16).bfloat16(), torch.ones(2, 1, 8)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "write takes latent and slot_mapping; 3 arguments", lambda: latent.write(rows, rows, [0, 1])),
        (TypeError, "write takes keys, values, index and slot_mapping; 3", lambda: indexed.write(keys, keys, [0, 1])),
        (
            TypeError,
            "index is torch.bfloat16, this cache holds torch.float32",
            lambda: indexed.write(keys, keys, index.bfloat16(), [0, 1]),
        ),
        (
            ValueError,
            r"latent has shape \[2, 2, 16\]; this cache takes \[2, 1, 24\]",
            lambda: latent.write(keys, [0, 1]),
        ),
        (
            ValueError,
            "keys has 2 rows and index 1; they must be the same tokens",
            lambda: indexed.write(keys, keys, index[:1], [0, 1]),
        ),
        (TypeError, r"out must be 1 tensors, \(latent\)", lambda: latent.gather([0], 2, out=(rows, rows))),
        (
            ValueError,
            r"out\[0\] and out\[1\] share memory",
            lambda: indexed.gather([0], 2, out=(keys, keys, index)),
        ),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    assert not any(tensor.any() for tensor in tensors(engine))


def test_attention_reads_k_and_v_of_a_layer_that_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer beside an index as without one, from the kernel and from torch; without K and V an error."""
    torch.manual_seed(0)
    config = CacheConfig(
        layers=[INDEXED, key_value(2, 16), (LayerTensor("latent", (1, 24)),)], num_gpu_blocks=4, block_size=4
    )
    engine, manager = CacheEngine(config, "float32", "cpu", layout="NHD"), BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=1, max_tokens=8, max_seq_len=8)
    manager.prepare([manager.admit(range(6))[0]], 6, step)
    engine.move(step)
    keys, values, query = torch.randn(6, 2, 16), torch.randn(6, 2, 16), torch.randn(6, 4, 16)
    engine[0].write(keys, values, torch.randn(6, 1, 8), step)
    engine[1].write(keys, values, step)
    for names in (attention_call._COMPILED, {}):
        monkeypatch.setattr(attention_call, "_COMPILED", names)
        assert torch.equal(paged_attention(query, engine[0], step), paged_attention(query, engine[1], step))
    with pytest.raises(ValueError, match="the cache's layer keeps latent; attention reads key and value"):
        paged_attention(query, engine[2], step)


def test_what_an_engine_does_not_hold_is_said() -> None:
    small, float32 = LayerTensor("small", (1, 3), "uint8"), LayerTensor("float32", (1, 1), "float32")
    seven = LayerTensor("seven", (1, 7), "uint8")
    groups = [Group(None, (0,)), Group(None, (1,))]
    config = CacheConfig(layers=[(small, float32), (seven,)], num_gpu_blocks=2, block_size=1, groups=groups)
    with pytest.raises(ValueError, match=r"share blocks of 7 bytes, .* 4 bytes begins at byte 3; .* multiple of 8"):
        CacheEngine(config, "int8", "cpu")
    assert CacheEngine(config.replace(block_size=8), "int8", "cpu").memory_bytes == 2 * 8 * 7
    with pytest.raises(ValueError, match=r"head_dim=8 does not divide by 16: layout X"):
        CacheEngine(
            CacheConfig(layers=[(LayerTensor("key", (1, 8), "int8"),)], num_gpu_blocks=1), "float32", "cpu", layout="X"
        )


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(TypeError, match="config is a dict; give a CacheConfig"):
        CacheEngine({}, "float16", "cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout='HNB'"):
        CacheEngine(SMALL, "float16", "cpu", layout="HNB")


def test_what_does_not_fit_is_out_of_memory() -> None:
    config = CacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, num_gpu_blocks=2**31 - 1)
    with pytest.raises(OutOfMemory) as caught:
        CacheEngine(config, "bfloat16", "cpu")
    assert caught.value.requested == config.memory_bytes("bfloat16")
    assert caught.value.blocks_that_fit == caught.value.free // config.block_bytes("bfloat16")
    fitting = config.replace(num_gpu_blocks=caught.value.blocks_that_fit)
    assert fitting.memory_bytes("bfloat16") <= caught.value.free
    with pytest.raises(OverflowError):
        CacheEngine(config.replace(num_kv_heads=2**31 - 1), "bfloat16", "cpu")


@pytest.mark.parametrize("failing", range(6))
def test_a_failure_in_the_middle_leaves_nothing_allocated(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CacheConfig(num_layers=3, num_kv_heads=8, head_dim=128, num_gpu_blocks=4096)  # 128 MiB for each tensor
    zeroed, calls = memory.zeroed, iter(range(6))

    def sometimes(nbytes: int, *, prefault: bool) -> Tensor:
        if next(calls) == failing:
            raise MemoryError("no more")
        return zeroed(nbytes, prefault=prefault)

    gc.collect()
    before = mapped()
    monkeypatch.setattr(memory, "zeroed", sometimes)
    with pytest.raises(OutOfMemory, match="blocks fit") as caught:
        CacheEngine(config, "bfloat16", "cpu")
    # While the error and its traceback are still held.
    assert mapped() - before < 64 << 20
    assert caught.value.requested == config.memory_bytes("bfloat16")


def test_a_cache_outlives_its_engine_and_the_rest_goes() -> None:
    gc.collect()
    before = mapped()
    engine = CacheEngine(
        CacheConfig(num_layers=4, num_kv_heads=8, head_dim=128, num_gpu_blocks=8192), "bfloat16", "cpu"
    )  # 512 MiB a layer
    cache = engine[2]
    del engine
    gc.collect()
    assert 512 << 20 <= mapped() - before < 768 << 20
    assert cache.gather([0], 1)[0].sum() == 0


def test_prefault_touches_everything() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    engine = CacheEngine(
        CacheConfig(num_layers=4, num_kv_heads=8, head_dim=128, num_gpu_blocks=1024), "bfloat16", "cpu", prefault=True
    )
    assert resident() - before >= engine.memory_bytes - (8 << 20)


def test_many_threads_get_the_same_caches() -> None:
    engine = CacheEngine(CacheConfig(num_layers=8, num_kv_heads=2, head_dim=16, num_gpu_blocks=64), "float32", "cpu")
    start = threading.Barrier(8)

    def work(thread: int) -> list[int]:
        start.wait()
        seen = []
        for _ in range(50):
            seen.append([id(cache) for cache in engine.get_all_caches()])
            for layer in range(8):
                cache = engine.get_cache(layer)
                assert cache is engine[layer]
                rows = torch.full((4, 2, 16), float(thread + 10 * layer))
                cache.write(rows, rows, [thread * 64 + layer * 4 + i for i in range(4)])
        assert all(ids == seen[0] for ids in seen)
        return seen[0]

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(work, range(8)))
    assert all(ids == seen[0] for ids in seen)
    for layer, cache in enumerate(engine):
        keys = cache.gather(range(64), 1024)[0]
        for thread in range(8):
            rows = keys[thread * 64 + layer * 4 :][:4]
            assert set(rows.flatten().tolist()) == {float(thread + 10 * layer)}


@pytest.fixture
def half_a_gibibyte_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room", lambda: memory.Room(512 << 20, "a test"))


@pytest.mark.usefixtures("half_a_gibibyte_free")
@pytest.mark.parametrize(
    ("given", "share"),
    [("90%", 0.9), ("12.5%", 0.125), ("100%", 1.0), ("256MiB", 0.5), ("0.25GiB", 0.5), (128 << 20, 0.25)],
)
def test_for_device_takes_a_share_of_what_is_free(
    given: str | int, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kvblocks"):
        engine = CacheEngine.for_device(2, 64, 4, "bfloat16", "cpu", memory=given, layout="NHD", v_head_dim=32)
    block = CacheConfig(num_layers=4, num_kv_heads=2, head_dim=64, num_gpu_blocks=1, v_head_dim=32).block_bytes(
        "bfloat16"
    )
    assert engine.num_blocks == int((512 << 20) * share) // block
    assert (engine.layout, engine[0].v_head_dim, engine.block_size) == ("NHD", 32, 16)
    reserve = ((512 << 20) - engine.memory_bytes) / 1e6
    said = f"KV cache on cpu: {engine.memory_bytes / 1e6:.1f} MB of the 536.9 MB that are free (memory={given}), "
    assert caplog.records[0].getMessage() == said + f"{reserve:.1f} MB in reserve"


@pytest.mark.usefixtures("half_a_gibibyte_free")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("90", ValueError, "memory='90' is neither a size"),
        ("-5%", ValueError, "neither a size"),
        ("0%", ValueError, "is 0 bytes; give 1 to the 536870912 that are free"),
        ("101%", ValueError, "542239621 bytes"),
        ("9" * 400 + "%", ValueError, "1073741824 bytes"),
        ("1TiB", ValueError, "1099511627776 bytes; give 1 to the 536870912"),
        (0, ValueError, "memory=0 is 0 bytes"),
        (-1, ValueError, "memory=-1 is -1 bytes"),
        (2**70, ValueError, "is 1180591620717411303424 bytes"),
        (0.9, TypeError, "memory=0.9 is a float; give bytes, or text like '8GiB' or '90%'"),
        (True, TypeError, "memory=True is a bool"),
        (None, TypeError, "memory=None"),
        ("1B", OutOfMemory, "536870912 bytes free, and memory='1B' of them holds no block of 32768 bytes"),
    ],
)
def test_for_device_says_what_it_cannot_take(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CacheEngine.for_device(2, 64, 4, "bfloat16", "cpu", memory=given)


def test_what_caches_were_promised_is_taken() -> None:
    """Nobody touches the memory of these caches, and still they do not get it three times."""
    free = memory.available_memory()
    engines = [CacheEngine.for_device(8, 128, 4, "bfloat16", "cpu", memory="60%") for _ in range(3)]
    shares = [engine.memory_bytes / free for engine in engines]
    assert shares == pytest.approx([0.6, 0.24, 0.096], abs=0.05)  # what else the machine does moves them a little


def limited(nbytes: int) -> None:
    """In a child: an engine past RLIMIT_DATA says so, and what it says fits does fit."""
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, resource.RLIM_INFINITY))
    config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, num_gpu_blocks=8192)  # 1 GiB
    with pytest.raises(OutOfMemory, match=r"The limit is RLIMIT_DATA \(ulimit -d\)") as caught:
        CacheEngine(config, "bfloat16", "cpu")
    fits = caught.value.blocks_that_fit
    assert 0 < caught.value.free <= nbytes
    assert CacheEngine(config.replace(num_gpu_blocks=fits * 9 // 10), "bfloat16", "cpu").memory_bytes > nbytes // 2


def test_a_limit_of_the_process_is_named_and_what_is_said_to_fit_fits() -> None:
    child = os.fork()
    if child == 0:
        try:
            limited(256 << 20)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_refusal_that_no_limit_explains_does_not_contradict_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with locked memory: less is mapped than the limits that can be read would allow."""
    config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, num_gpu_blocks=64)  # 2 MiB for each tensor
    mapped = memory._mapped

    def refusing(nbytes: int) -> mmap.mmap:
        if nbytes > 1 << 20:
            raise OSError(11, "Resource temporarily unavailable")
        return mapped(nbytes)

    def failing(nbytes: int, *, prefault: bool = False) -> Tensor:
        raise MemoryError("one of the mappings, though one of all would be given")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "_mapped", refusing)
        with pytest.raises(OutOfMemory, match=r"has 1048576 available: 8 blocks fit\. .* locked memory") as caught:
            CacheEngine(config, "bfloat16", "cpu")
        assert (caught.value.free, caught.value.blocks_that_fit) == (1 << 20, 8)
        with pytest.raises(OutOfMemory, match=r"step buffers .* and 1048576 are available.* temporarily unavail"):
            StepBuffers(8, 1 << 20, 8)
    monkeypatch.setattr(memory, "zeroed", failing)
    with pytest.raises(OutOfMemory, match="63 blocks fit"):
        CacheEngine(config, "bfloat16", "cpu")


@pytest.mark.cuda
def test_for_device_on_a_device() -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    engine = CacheEngine.for_device(8, 128, 32, "bfloat16", "cuda", memory="90%")
    assert 0.89 * free <= engine.memory_bytes <= 0.9 * free
    assert torch.cuda.mem_get_info()[0] >= 0.05 * free
    del engine
    gc.collect()
    everything = CacheEngine.for_device(8, 128, 32, "bfloat16", "cuda", memory="100%")
    assert everything.memory_bytes >= 0.98 * free
