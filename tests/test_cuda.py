"""What only a GPU shows: graphs replayed over changing batches, streams, devices, and calls that never wait."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_helpers import bits, random_bits
from test_step import Engine, buffers_over, snapshot
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, PagedKVCache, StepBuffers, paged_attention
from kvblocks.sizes import LAYOUTS

pytestmark = pytest.mark.cuda

HEADS, KV_HEADS, DIM, VOCABULARY = 8, 2, 64, 1000


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Model:
    """Two layers of attention over a paged cache, with random weights."""

    def __init__(self, engine: CacheEngine) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=engine.dtype) * 0.05

        self.engine = engine
        width = HEADS * DIM
        self.embedding = weights(VOCABULARY, width) * 20
        self.inputs = [weights(width, width + 2 * KV_HEADS * DIM) for _ in engine]
        self.outputs = [weights(width, width) for _ in engine]

    def __call__(self, step: StepBuffers, num_tokens: int) -> Tensor:
        hidden = self.embedding[step.input_ids[:num_tokens]]
        for cache, into, out_of in zip(self.engine, self.inputs, self.outputs, strict=True):
            heads = (hidden @ into).view(num_tokens, HEADS + 2 * KV_HEADS, DIM)
            cache.write(heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:], step.slot_mapping[:num_tokens])
            attended = paged_attention(heads[:, :HEADS], cache, step)
            hidden = hidden + attended.flatten(1) @ out_of
        return hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_decode_step_captured_once_replays_over_changing_batches(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    size = 12
    config = CacheConfig(num_layers=2, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=400)
    model = Model(CacheEngine(config, dtype, "cuda", layout="NHD"))
    manager = BlockManager(config.num_gpu_blocks, config.block_size)
    step = StepBuffers(size, 2048, 64, device="cuda")

    def admit() -> int:
        seq, cached = manager.admit([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 150))])
        rest = int(manager.lengths([seq]).num_tokens[0]) - cached
        step_id = manager.prepare([seq], rest, step)
        model(step, step.num_tokens)
        manager.commit(step_id)
        return seq

    def prepare(batch: list[int]) -> int:
        manager.append(batch, [rng.randrange(VOCABULARY) for _ in batch])
        step_id = manager.prepare(batch, 1, step)
        model.engine.copy_blocks(step.copies)
        return step_id

    seqs = [admit() for _ in range(size)]
    side = new_stream()
    step_id = prepare(seqs)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(step, size)  # compiles what the capture launches
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(step, size)
    manager.commit(step_id)

    for turn in range(40):
        if turn % 5 == 4:
            manager.free([seqs.pop(rng.randrange(len(seqs)))])
            seqs.append(admit())
        if turn % 7 == 6:
            child = int(manager.fork(seqs[0], 1)[0])
            manager.free([seqs.pop()])
            seqs.append(child)
        batch = rng.sample(seqs, rng.randint(1, size))
        step_id = prepare(batch)
        graph.replay()
        replayed = captured.clone()
        keys = [cache.key_cache.clone() for cache in model.engine]
        eager = model(step, step.num_tokens)  # writes the same K and V into the same slots again
        manager.commit(step_id)
        tolerance = 2e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(replayed[: len(batch)], eager, rtol=tolerance, atol=tolerance)
        assert replayed.isfinite().all()
        for cache, before in zip(model.engine, keys, strict=True):
            torch.testing.assert_close(cache.key_cache, before, rtol=tolerance, atol=tolerance)
    manager.audit()


def test_a_step_is_not_prepared_inside_a_capture() -> None:
    manager, step = BlockManager(8, 4), StepBuffers(2, 8, 4, device="cuda")
    seq, _ = manager.admit([1, 2, 3])
    graph, there = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        there.add_(1)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            manager.prepare([seq], 3, step)
    manager.commit(manager.prepare([seq], 3, step))
    assert step.positions[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("kv_indices", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_device_every_step_is_as_the_host_has_it(groups: int, kv_indices: bool) -> None:
    """On streams that change from step to step."""
    there = Engine(7, StepBuffers(5, 24, 9, device="cuda", groups=groups, kv_indices=kv_indices))
    here = Engine(7, buffers_over(None, groups=groups, kv_indices=kv_indices))
    streams = [new_stream(), new_stream()]
    found, expected = [], []
    current = streams[0]
    for number, same in zip(there.steps(60), here.steps(60), strict=True):
        assert number == same
        if number is None:
            continue
        found.append((there.buffers._to_device.image.clone(), there.buffers.num_copies))
        expected.append(snapshot(here.buffers, here.buffers.num_copies))
        after = streams[number % 3 % 2]
        after.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(after)
        current = after
    torch.cuda.set_stream(torch.cuda.default_stream())
    current.synchronize()
    torch.cuda.synchronize()
    for (image, copies), host_arrays in zip(found, expected, strict=True):
        there.buffers._to_device.image.copy_(image)  # what the step's tensors are views of
        assert snapshot(there.buffers, copies) == host_arrays


def test_an_upload_on_another_stream_waits_for_the_one_before() -> None:
    manager, step = BlockManager(64, 16), StepBuffers(4, 64, 64, device="cuda")
    seqs = [manager.admit([i] * 20)[0] for i in range(3)]
    manager.commit(manager.prepare(seqs[:2], 20, step))
    first, second = new_stream(), new_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        manager.commit(manager.prepare(seqs[2:], 20, step))
    with torch.cuda.stream(second):
        manager.append(seqs, [1, 2, 3])
        manager.commit(manager.prepare(seqs, 1, step))
    torch.cuda.synchronize()
    assert step.input_ids[:20].tolist() == [1, 2, 3] + [0] * 17
    assert step.seq_lens.tolist() == [21, 21, 21, 0]


def test_preparing_does_not_wait_for_the_device() -> None:
    manager, step = BlockManager(64, 16), StepBuffers(4, 64, 64, device="cuda")
    seqs = [manager.admit([i] * 20)[0] for i in range(3)]
    manager.commit(manager.prepare(seqs[:2], 20, step))
    with nothing_waits():
        manager.commit(manager.prepare(seqs[2:], 20, step))
        manager.append(seqs, [1, 2, 3])
        manager.commit(manager.prepare(seqs, 1, step))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement_neither_waits_nor_allocates_and_can_be_captured(layout: str) -> None:
    cache = PagedKVCache(32, 2, 64, 16, "bfloat16", "cuda", layout=layout)
    keys, values = (random_bits((40, 2, 64), torch.bfloat16, seed, "cuda") for seed in (1, 2))
    out = (torch.empty_like(keys), torch.empty_like(values))
    slots = torch.tensor([5, 3, 9], device="cuda").repeat_interleave(16) * 16 + torch.arange(48, device="cuda") % 16
    slots = slots[torch.randperm(48, device="cuda")[:40]]
    table = torch.tensor([5, 3, 9], dtype=torch.int32, device="cuda")
    pairs, ids = torch.tensor([[5, 20], [3, 21]], device="cuda"), torch.tensor([9], device="cuda")

    def work() -> None:
        cache.write(keys, values, slots)
        cache.copy_blocks(pairs)
        cache.zero_blocks(ids)
        cache.gather(table, 40, out=out)

    work()
    expected = [rows.clone() for rows in out]
    with nothing_waits():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        work()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    cache.zero_blocks(list(range(32)))
    for rows in out:
        rows.zero_()
    graph.replay()
    for rows, same in zip(out, expected, strict=True):
        assert bits(rows) == bits(same)


def test_one_stream_writes_while_another_reads_other_blocks() -> None:
    cache = PagedKVCache(512, 8, 128, 16, "bfloat16", "cuda", layout="NHD")
    tokens = 256 * 16
    keys, values = (random_bits((tokens, 8, 128), torch.bfloat16, seed, "cuda") for seed in (1, 2))
    cache.write(keys, values, torch.arange(tokens, device="cuda"))
    other = random_bits((tokens, 8, 128), torch.bfloat16, 3, "cuda")
    slots = torch.arange(tokens, 2 * tokens, device="cuda")
    table, blocks = torch.arange(256, device="cuda"), torch.arange(256, 272, device="cuda")
    writer, reader = new_stream(), new_stream()
    torch.cuda.synchronize()
    found = []
    for _ in range(30):
        with torch.cuda.stream(writer):
            cache.write(other, other, slots)
            cache.zero_blocks(blocks)
        with torch.cuda.stream(reader):
            found.append(cache.gather(table, tokens))
    torch.cuda.synchronize()
    for rows in found:
        assert torch.equal(rows[0].view(torch.int16), keys.view(torch.int16))
        assert torch.equal(rows[1].view(torch.int16), values.view(torch.int16))
    written = cache.gather(table + 256, tokens)[0].view(torch.int16)
    assert not written[:256].any()
    assert torch.equal(written[256:], other[256:].view(torch.int16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_is_the_one_that_works() -> None:
    with torch.cuda.device(0):
        cache = PagedKVCache(4, 2, 64, 16, "float16", "cuda:1", layout="NHD")
        rows = random_bits((16, 2, 64), torch.float16, 1, "cuda:1")
        cache.write(rows, rows, torch.arange(16, device="cuda:1"))
        assert bits(cache.gather([0], 16)[0]) == bits(rows)
        manager, step = BlockManager(4, 16), StepBuffers(2, 16, 4, device="cuda:1")
        manager.commit(manager.prepare([manager.admit([1, 2, 3])[0]], 3, step))
        assert step.positions[:3].tolist() == [0, 1, 2]
        query = torch.randn(3, 4, 64, device="cuda:1").half()
        assert paged_attention(query, cache, step).isfinite().all()
        assert torch.cuda.current_device() == 0
