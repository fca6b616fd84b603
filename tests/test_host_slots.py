"""Host memory for blocks: where a block's bytes lie, its way into a slot and back, and out to a disk from there."""

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvblocks import CacheConfig, CacheEngine, Chunk, Group, LayerTensor, Window, key_value
from kvblocks.sizes import HEADER_BYTES, LAYOUTS
from kvblocks.storage import HostArena
from kvblocks.tiers import DiskStore, ObjectFormat, Status

ALIKE = CacheConfig(num_layers=3, num_kv_heads=2, head_dim=16, num_gpu_blocks=6, block_size=4)
GROUPED = CacheConfig(  # the third group leaves two places of a block empty
    num_layers=7,
    num_kv_heads=2,
    head_dim=16,
    num_gpu_blocks=6,
    block_size=4,
    v_head_dim=24,
    groups=[Group(None, (4, 0, 2)), Group(Window(8), (1, 3, 5)), Group(Chunk(8), (6,))],
)
DIFFERENT = CacheConfig(  # the second group ends in the middle of a tensor of the first
    layers=[key_value(2, 16, 16), key_value(4, 16, 8), key_value(1, 16, 8)],
    num_gpu_blocks=6,
    block_size=4,
    groups=[Group(None, (2, 0)), Group(Window(8), (1,))],
)
OTHERS = CacheConfig(  # one tensor, three, and dtypes of their own
    layers=[
        (LayerTensor("latent", (1, 24)),),
        (*key_value(2, 16), LayerTensor("index", (1, 8), "uint8")),
        key_value(2, 16),
        (LayerTensor("index", (3, 8), "bfloat16"), *key_value(1, 16)),
    ],
    num_gpu_blocks=6,
    block_size=4,
    groups=[Group(None, (3, 0)), Group(Window(8), (1, 2))],
)
CONFIGS = pytest.mark.parametrize(
    "config", [ALIKE, GROUPED, DIFFERENT, OTHERS], ids=["alike", "groups", "layers differ", "other tensors"]
)


def filled(config: CacheConfig, layout: str = "NHD") -> CacheEngine:
    """An engine whose every byte is random."""
    engine = CacheEngine(config, "float32", "cpu", layout=layout)
    torch.manual_seed(1)
    for cache in engine:
        for tensor in cache.tensors.values():
            tensor.copy_(torch.randn(tensor.shape) * 100)
    return engine


def expected(engine: CacheEngine, block: int, group: int) -> bytes:
    """K, V and what else each layer of the group keeps, as the tensors of the caches have them."""
    caches = [engine[layer] for layer in engine.config.groups[group].layers]
    tensors = [tensor[block] for cache in caches for tensor in cache.tensors.values()]
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def whole(engine: CacheEngine) -> list[bytes]:
    return [expected(engine, b, g) for b in range(engine.num_blocks) for g in range(len(engine.config.groups))]


@CONFIGS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_a_block_lies(config: CacheConfig, layout: str) -> None:
    engine = filled(config, layout)
    for group, layers in enumerate(config.groups):
        taken: list[tuple[int, int]] = []
        for block in range(config.num_gpu_blocks):
            pieces = engine.memory_of(block, group)
            assert len(pieces) == sum(len(config.layers[layer]) for layer in layers.layers)
            assert b"".join(ctypes.string_at(*piece) for piece in pieces) == expected(engine, block, group)
            assert sum(nbytes for _, nbytes in pieces) == engine.group_bytes(group)
            taken += pieces
        taken.sort()
        assert all(a + n <= b for (a, n), (b, _) in pairwise(taken)), "blocks share bytes"


@CONFIGS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_into_slots_and_back(config: CacheConfig, layout: str) -> None:
    """What is copied is all of the block and nothing beside it; headers, padding and other slots stay as they are."""
    engine = filled(config, layout)
    room = max(engine.group_bytes(group) for group in range(len(config.groups)))
    for group in range(len(config.groups)):
        arena = HostArena(5, room)
        arena.buffer[:] = b"\xa5" * arena.memory_bytes
        nbytes, before = engine.group_bytes(group), bytearray(arena.buffer)
        engine.copy_to_host(arena, [(3, 1), (0, 4), (5, 0)], group)
        for block, slot in ((3, 1), (0, 4), (5, 0)):
            start = slot * arena.slot_bytes + HEADER_BYTES
            before[start : start + nbytes] = expected(engine, block, group)
            assert arena.object(slot, nbytes)[HEADER_BYTES:] == expected(engine, block, group)
        assert arena.buffer == before
        contents = [expected(engine, block, group) for block in range(6)]
        kept = [expected(engine, 4, g) for g in range(len(config.groups))]
        engine.copy_from_host(arena, np.array([(2, 1), (1, 4)], np.int32), group)
        assert [expected(engine, block, group) for block in range(6)] == [
            contents[0],
            contents[0],
            contents[3],
            contents[3],
            contents[4],
            contents[5],
        ]
        assert [expected(engine, 4, g) for g in range(len(config.groups))] == kept
        assert arena.buffer == before


def test_a_block_by_way_of_a_disk(tmp_path: Path) -> None:
    """Out of one engine, sealed, to the disk, verified, and into another engine, without a copy beside the slots."""
    ours, theirs = filled(GROUPED), CacheEngine(GROUPED, "float32", "cpu", layout="NHD")
    form = ObjectFormat("0" * 64)
    blocks = form.blocks(form.root(), np.arange(12), 4)
    nbytes = ours.group_bytes(1)
    keys = [form.key(block, 1, "all") for block in blocks]
    sent = HostArena(3, nbytes)
    ours.copy_to_host(sent, [(4, 0), (1, 1), (2, 2)], 1)
    objects = [sent.object(slot, nbytes) for slot in range(3)]
    for block, made in zip(blocks, objects, strict=True):
        form.seal(block, 1, "all", made)
    with DiskStore(tmp_path, 1 << 20) as store:
        store.register(sent.buffer)
        assert store.store(keys, objects) == [Status.OK] * 3
    received = HostArena(3, nbytes)
    found = [received.object(slot, nbytes) for slot in range(3)]
    with DiskStore(tmp_path, 1 << 20) as store:
        assert store.load(keys, found) == [Status.OK] * 3
    assert all(form.verify(block, 1, "all", made) for block, made in zip(blocks, found, strict=True))
    theirs.copy_from_host(received, [(5, 0), (0, 1), (3, 2)], 1)
    assert [expected(theirs, b, 1) for b in (5, 0, 3)] == [expected(ours, b, 1) for b in (4, 1, 2)]
    assert expected(theirs, 2, 1) == bytes(nbytes)


def test_what_an_arena_is() -> None:
    arena = HostArena(4, 5000, pinned=False)
    assert arena.address % 4096 == 0
    assert (arena.slot_bytes, arena.memory_bytes, len(arena.buffer)) == (12288, 4 * 12288, 4 * 12288)
    assert arena.buffer == bytes(4 * 12288)
    arena.object(2, 100)[:] = b"x" * (HEADER_BYTES + 100)
    assert bytes(arena.buffer) == (b"x" * (HEADER_BYTES + 100)).rjust(2 * 12288 + HEADER_BYTES + 100, b"\0").ljust(
        4 * 12288, b"\0"
    )
    assert repr(arena) == "HostArena(4, 5000, pinned=False)"
    kept = arena.object(0, 5000)
    del arena
    kept[:] = b"y" * len(kept)  # memory that is handed out outlives the arena


def test_wrong_calls_change_nothing() -> None:
    engine, arena = filled(GROUPED), HostArena(2, 3 * 4 * 2 * (16 + 24) * 4)
    before = whole(engine), bytes(arena.buffer)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"block=6 is outside 0\.\.5", lambda: engine.memory_of(6)),
        (ValueError, r"block=-1 is outside", lambda: engine.memory_of(-1)),
        (TypeError, "block=1.0 is of type float", lambda: engine.memory_of(1.0)),  # type: ignore[arg-type]
        (ValueError, r"group=3 is outside 0\.\.2", lambda: engine.memory_of(0, 3)),
        (ValueError, r"group=-1 is outside 0\.\.2", lambda: engine.group_bytes(-1)),
        (
            ValueError,
            r"pairs\[1\] names block 6, which is outside 0\.\.5",
            lambda: engine.copy_to_host(arena, [(0, 0), (6, 1)]),
        ),
        (
            ValueError,
            r"pairs\[1\] names slot 2, which is outside 0\.\.1",
            lambda: engine.copy_from_host(arena, [(0, 0), (1, 2)]),
        ),
        (ValueError, r"pairs\[0\] names slot -1", lambda: engine.copy_to_host(arena, [(0, -1)])),
        (ValueError, r"pairs has shape \[3\]; give", lambda: engine.copy_to_host(arena, [1, 2, 3])),
        (TypeError, "pairs is a list of float64", lambda: engine.copy_to_host(arena, [(0.5, 1.0)])),
        (TypeError, "arena is a bytearray; give a HostArena", lambda: engine.copy_to_host(bytearray(9), [])),  # type: ignore[arg-type]
        (
            ValueError,
            "has 3840 bytes and a slot room for 3839",
            lambda: engine.copy_to_host(HostArena(2, 3839), [(0, 0)]),
        ),
        (ValueError, r"slot=2 is outside 0\.\.1", lambda: arena.object(2, 1)),
        (ValueError, r"payload_bytes=3841 is outside 1\.\.3840", lambda: arena.object(0, 3841)),
        (ValueError, "payload_bytes=0", lambda: arena.object(0, 0)),
        (ValueError, r"num_slots=0 is outside", lambda: HostArena(0, 1)),
        (ValueError, "payload_bytes=0 for 1 slots", lambda: HostArena(1, 0)),
        (ValueError, "for 2147483647 slots is outside", lambda: HostArena(2**31 - 1, 2**33)),
        (MemoryError, "mmap of", lambda: HostArena(2**30, 2**31)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    assert (whole(engine), bytes(arena.buffer)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, with which memory can be pinned")
def test_pinned_without_a_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="pinned=True needs a CUDA device"):
        HostArena(1, 1, pinned=True)
    assert HostArena(1, 1).pinned is False


@pytest.mark.cuda
def test_pinned_memory() -> None:
    for _ in range(2):  # the second time the first is unregistered
        arena = HostArena(2, 5000)
        assert arena.pinned
        assert torch.frombuffer(arena.buffer, dtype=torch.uint8).is_pinned()
        del arena
