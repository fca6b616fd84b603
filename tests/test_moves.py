"""Moves between device blocks and host slots: each once, in order, behind and before the right passes."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_host_slots import CONFIGS, GROUPED, OTHERS, expected, filled
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, LayerTensor, StepBuffers, key_value
from kvblocks.kernels import kernels
from kvblocks.kernels.launch import INTERPRETED
from kvblocks.moves import CpuStream, HostMoves
from kvblocks.sizes import HEADER_BYTES

OFFLOAD, LOAD = 0, 1


class Books:
    """What an engine asks of a manager, and hands back to it."""

    def __init__(self, config: CacheConfig, host_blocks: int) -> None:
        self.groups = tuple(group.reach for group in config.groups)
        self.block_size, self.num_blocks, self.host_blocks = config.block_size, config.num_gpu_blocks, host_blocks
        self.num_states = self.host_states = self.moves_marked = 0

    def mark_moved(self, number: int) -> None:
        self.moves_marked = number


class Arrays:
    """What `prepare` fills, as far as an engine looks at it for moves."""

    def __init__(self, manager: Any, first: int, moves: Any, needs: int = 0, copies: Any = (), rows: int = 1) -> None:
        self.manager, self.first_move, self.needs, self.num_seqs = manager, first, needs, rows
        self.moves = np.array(moves, np.int32).reshape(-1, 4)
        self.copies = torch.tensor(copies, dtype=torch.int64).reshape(-1, 2)
        self.last_move = max(first + len(self.moves) - 1, needs)

    @property
    def waits(self) -> bool:
        return bool(self.last_move > self.manager.moves_marked)


Manager: Any = Books  # to a type checker, an engine takes neither of the two
Step: Any = Arrays


def with_host(config: CacheConfig, slots: int) -> tuple[CacheEngine, Any]:
    """An engine whose every byte is random, in its slots too."""
    engine = CacheEngine(config, "float32", "cpu", layout="NHD", host_blocks=slots)
    for cache, other in zip(engine, filled(config), strict=True):
        for name, tensor in cache.tensors.items():
            tensor.copy_(other.tensors[name])
    assert engine.arena is not None
    engine.arena.buffer[:] = np.random.default_rng(1).bytes(engine.arena.memory_bytes)
    return engine, Manager(config, slots)


def payload(engine: CacheEngine, slot: int, group: int) -> bytes:
    assert engine.arena is not None
    return bytes(engine.arena.object(slot, engine.group_bytes(group))[HEADER_BYTES:])


@CONFIGS
@settings(max_examples=30)
@given(data=st.data())
def test_moves_are_made_in_order_with_all_tensors_of_a_group(config: CacheConfig, data: st.DataObject) -> None:
    """Chains too: out of a block and into it again, into a slot and out of it, in one call."""
    engine, manager = with_host(config, 3)
    groups = range(len(config.groups))
    # The first bytes of a block are those of whichever group has it: one row of bytes for each block and slot.
    wide = max(engine.group_bytes(group) for group in groups)
    most = max(groups, key=engine.group_bytes)
    blocks = [bytearray(expected(engine, block, most)) for block in range(6)]
    slots = [bytearray(payload(engine, slot, most)) for slot in range(3)]
    number = 1
    for _ in range(data.draw(st.integers(1, 3))):
        moves = []
        for kind, group, block, slot in data.draw(
            st.lists(
                st.tuples(st.integers(0, 1), st.sampled_from(groups), st.integers(0, 5), st.integers(0, 2)), max_size=8
            )
        ):
            source, target = (blocks[block], slots[slot]) if kind == OFFLOAD else (slots[slot], blocks[block])
            nbytes = engine.group_bytes(group)
            target[:nbytes] = source[:nbytes]
            moves.append((kind, group, block, slot) if kind == OFFLOAD else (kind, group, slot, block))
        step = Step(manager, number, moves, copies=[(0, 5)])
        if moves:
            blocks[5][:] = blocks[0]
        engine.move(step)
        engine.move(step)  # the second time there is nothing to do
        number += len(moves)
        assert manager.moves_marked == engine.landed() == number - 1
        assert [expected(engine, block, most) for block in range(6)] == blocks
        assert [payload(engine, slot, most) for slot in range(3)] == slots
    assert wide == config.block_bytes("float32")


def test_numbers_are_made_once_and_in_order() -> None:
    engine, manager = with_host(GROUPED, 3)
    engine.move(Step(manager, 1, [(OFFLOAD, 0, 2, 1), (OFFLOAD, 1, 3, 0)]))
    before = [payload(engine, slot, 0) for slot in range(3)]
    for first, newest in ((4, 2), (2, 2), (1, 2)):
        again = Step(manager, first, [(OFFLOAD, 0, 4, 1)] * 3)
        with pytest.raises(ValueError, match=f"begin with number {first}, and the newest that was made is {newest}"):
            engine.move(again)
    assert ([payload(engine, slot, 0) for slot in range(3)], manager.moves_marked) == (before, 2)
    engine.move(Step(manager, 3, [(LOAD, 0, 1, 5)]))
    assert expected(engine, 5, 0) == before[1]
    other = Manager(GROUPED, 3)  # its numbers are its own
    other.moves_marked = 7
    with pytest.raises(ValueError, match="begin with number 4, and the newest that was made is 7"):
        engine.move(Step(other, 4, [(LOAD, 0, 1, 5)] * 5))
    engine.move(Step(other, 8, [(LOAD, 0, 1, 4)]))
    assert expected(engine, 4, 0) == before[1]


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([(2, 0, 1, 1)], r"step\.moves\[0\] names kind 2, which is outside 0\.\.1"),
        ([(0, 0, 1, 1), (0, 3, 1, 1)], r"step\.moves\[1\] names group 3, which is outside 0\.\.2"),
        ([(0, -1, 1, 1)], r"step\.moves\[0\] names group -1"),
        ([(0, 0, 6, 1)], r"step\.moves\[0\] names block 6, which is outside 0\.\.5"),
        ([(1, 0, 1, -1)], r"step\.moves\[0\] names block -1"),
        ([(0, 0, 1, 2)], r"step\.moves\[0\] names slot 2, which is outside 0\.\.1"),
        ([(1, 0, 2, 1)], r"step\.moves\[0\] names slot 2"),
    ],
)
def test_a_wrong_move_changes_nothing(moves: Any, message: str) -> None:
    engine, manager = with_host(GROUPED, 2)
    before = [expected(engine, block, 0) for block in range(6)], [payload(engine, slot, 0) for slot in range(2)]
    with pytest.raises(ValueError, match=message):
        engine.move(Step(manager, 1, moves, copies=[(0, 1)]))
    for step, error in (
        (Step(manager, 1, [(0, 0, 0, 0)], copies=[(0, 6)]), r"pairs\[0, 1\]=6"),
        (Step(Manager(GROUPED, 3), 1, [(0, 0, 0, 0)]), "has host_blocks=3 and the engine 2"),
    ):
        with pytest.raises(ValueError, match=error):
            engine.move(step)
    assert (
        [expected(engine, block, 0) for block in range(6)],
        [payload(engine, slot, 0) for slot in range(2)],
    ) == before
    assert manager.moves_marked == 0


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ((OFFLOAD, 1, 3, 0), r"step\.moves\[1\] names state 3, which is outside 0\.\.2"),
        ((LOAD, 1, 0, -1), r"step\.moves\[1\] names state -1"),
        ((OFFLOAD, 1, 0, 2), r"step\.moves\[1\] names slot for a state 2, which is outside 0\.\.1"),
        ((LOAD, 1, 2, 0), r"step\.moves\[1\] names slot for a state 2"),
        ((OFFLOAD, 0, 6, 0), r"step\.moves\[1\] names block 6, which is outside 0\.\.5"),
        ((LOAD, 0, 4, 0), r"step\.moves\[1\] names slot 4, which is outside 0\.\.3"),
        ((OFFLOAD, 2, 0, 0), r"step\.moves\[1\] names group 2, which is outside 0\.\.1"),
    ],
)
def test_a_wrong_move_of_states_changes_nothing(move: tuple[int, int, int, int], message: str) -> None:
    layer = (*key_value(1, 4), LayerTensor("state", (3,), per="sequence"))
    config = CacheConfig(layers=[layer], num_gpu_blocks=6, block_size=4)
    engine = CacheEngine(config, "float32", "cpu", num_states=3, host_blocks=4, host_states=2)
    manager = Manager(config, 4)
    manager.num_states, manager.host_states = 3, 2
    assert engine.state_arena is not None
    assert engine.states[0] is not None
    engine.states[0]["state"].fill_(1)
    step = Step(manager, 1, [(OFFLOAD, 1, 0, 1), move])
    step.state_zero = step.state_copies = None
    with pytest.raises(ValueError, match=message):
        engine.move(step)
    assert not np.asarray(engine.state_arena.buffer).any()
    assert manager.moves_marked == 0


def test_without_host_memory_there_are_no_moves() -> None:
    engine, manager = CacheEngine(GROUPED, "float32", "cpu"), Manager(GROUPED, 0)
    assert (engine.arena, engine.landed()) == (None, 0)
    with pytest.raises(ValueError, match="the step has 1 moves between device and host, and the engine no host memory"):
        engine.move(Step(manager, 1, [(0, 0, 0, 0)]))
    engine.move(Step(manager, 1, [], needs=1, copies=[(0, 1)]))
    assert manager.moves_marked == 1
    with pytest.raises(ValueError, match=r"host_blocks=-1 is outside 0\.\.2147483647"):
        CacheEngine(GROUPED, "float32", "cpu", host_blocks=-1)
    with pytest.raises(TypeError, match="step is a int that no manager has filled"):
        engine.move(3)  # type: ignore[arg-type]


def test_a_failure_after_the_first_copy_closes_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, manager = with_host(GROUPED, 2)

    def broken(pairs: Tensor) -> None:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(engine._mover, "copy_blocks", broken)
    step = Step(manager, 1, [(0, 0, 0, 0)], copies=[(0, 1)])
    with pytest.raises(RuntimeError, match="fell off"):
        engine.move(step)
    calls: list[Callable[[], object]] = [
        lambda: engine.move(step),
        lambda: engine.copy_blocks([(0, 1)]),
        lambda: engine.zero_blocks([0]),
        lambda: engine.copy_to_host(engine.arena, [(0, 1)]),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"the engine is closed: moves 1 to 1 failed halfway: .* fell off"):
            call()
    assert manager.moves_marked == 0


def test_steps_of_a_manager_without_a_host_pool_move_as_before() -> None:
    config = CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_gpu_blocks=8, block_size=4)
    engine, manager = CacheEngine(config, "float32", "cpu", host_blocks=2), BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=2, max_tokens=16, max_seq_len=16)
    parent, _ = manager.admit(range(6))
    manager.commit(manager.prepare([parent], 6, step))
    child = manager.fork(parent, 1)[0]
    manager.append([parent, child], [7, 8])
    manager.prepare([child], 1, step)
    assert step.num_copies == 1
    engine.move(step)
    assert manager.moves_marked == 1


# --- streams that run late


class LateStreams:
    """The current stream and that of moves, which do nothing until somebody lets one of them go on."""

    def __init__(self, inner: CpuStream) -> None:
        self.inner = inner
        self.queues: dict[str, list[Callable[[], bool]]] = {"passes": [], "moves": []}
        self.launches = 0

    def follow(self) -> None:
        reached = self.event("passes")
        self.queues["moves"].append(lambda: reached[0])

    def run(self, moves: Tensor) -> None:
        self.launches += 1
        moves = moves.clone()

        def now() -> bool:
            self.inner.run(moves)
            return True

        self.queues["moves"].append(now)

    def mark(self) -> list[bool]:
        return self.event("moves")

    def hold(self, mark: list[bool]) -> None:
        self.queues["passes"].append(lambda: mark[0])

    def passed(self, mark: list[bool]) -> bool:
        return mark[0]

    def finish(self) -> None:
        while any(self.queues.values()):
            assert self.go_on("passes") or self.go_on("moves"), "the streams wait for each other"

    def event(self, stream: str) -> list[bool]:
        reached = [False]

        def reach() -> bool:
            reached[0] = True
            return True

        self.queues[stream].append(reach)
        return reached

    def go_on(self, stream: str) -> bool:
        """Let a stream do what is next on it; whether it could."""
        queue = self.queues[stream]
        if not queue or not queue[0]():
            return False
        queue.pop(0)
        return True


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_however_late_streams_run_everybody_reads_what_is_meant(seed: int) -> None:
    """Moves and passes at random, each pass with the newest move that names one of its blocks as its needs. What lies
    in a block or a slot is a number, its identity; what it should be is known from the order of the calls."""
    rng = random.Random(seed)
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_gpu_blocks=5, block_size=1)
    engine, manager = CacheEngine(config, "float64", "cpu", host_blocks=4), Manager(config, 4)
    assert engine.arena is not None
    assert engine._host is not None
    streams = LateStreams(engine._host._stream)  # type: ignore[arg-type]
    engine._host = HostMoves(streams, engine.arena)
    memory = engine[0].key_cache
    meant = {("block", i): 0.0 for i in range(5)} | {("slot", i): 0.0 for i in range(4)}
    named = dict.fromkeys(range(5), 0)  # the newest move that names a block
    number, identity = 1, 0.0
    wrong: list[str] = []
    done: list[tuple[int, int]] = []

    def a_pass(reads: dict[int, float], writes: dict[int, float]) -> Callable[[], bool]:
        def run() -> bool:
            for block, value in reads.items():
                if not memory[block].eq(value).all():
                    wrong.append(f"block {block}: {memory[block].flatten()[0]} for {value}")
            for block, value in writes.items():
                memory[block] = value
            return True

        return run

    for _ in range(rng.randint(1, 8)):
        moves = []
        first = number
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            block, slot = rng.randrange(5), rng.randrange(4)
            load = rng.random() < 0.5
            source, target = (("slot", slot), ("block", block)) if load else (("block", block), ("slot", slot))
            meant[target] = meant[source]
            moves.append((LOAD, 0, slot, block) if load else (OFFLOAD, 0, block, slot))
            named[block] = number
            number += 1
        rows = rng.sample(range(5), rng.randint(1, 3))
        launches = streams.launches
        engine.move(Step(manager, first, moves, needs=max(named[block] for block in rows)))
        assert streams.launches - launches <= 2
        cut = rng.randrange(len(rows) + 1)
        reads = {block: meant[("block", block)] for block in rows[cut:]}
        writes = {}
        for block in rows[:cut]:
            identity += 1
            writes[block] = meant[("block", block)] = identity
        streams.queues["passes"].append(a_pass(reads, writes))
        for _ in range(rng.randrange(9)):
            streams.go_on(rng.choice(("passes", "moves")))
        landed = engine.landed()
        done.append((landed, number - 1))
        if not streams.queues["moves"]:
            assert landed == number - 1
    streams.finish()
    assert wrong == []
    assert engine.landed() == number - 1
    assert sorted(done) == done
    assert all(landed <= noted for landed, noted in done)
    for slot in range(4):
        stored = np.frombuffer(payload(engine, slot, 0), np.float64)
        assert (stored[:8] == meant["slot", slot]).all()


def late() -> tuple[CacheEngine, Any, LateStreams]:
    """An engine of six blocks and six host slots, whose streams run when they are told."""
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_gpu_blocks=6, block_size=1)
    engine, manager = CacheEngine(config, "float64", "cpu", host_blocks=6), Manager(config, 6)
    assert engine.arena is not None
    assert engine._host is not None
    streams = LateStreams(engine._host._stream)  # type: ignore[arg-type]
    engine._host = HostMoves(streams, engine.arena)
    return engine, manager, streams


@pytest.mark.parametrize("with_gaps", [False, True])
def test_a_pass_waits_for_what_it_needs_and_for_no_more(with_gaps: bool) -> None:
    engine, manager, streams = late()
    engine[0].key_cache[1] = 8.0
    ran: list[int] = []

    def launched(name: int) -> None:
        def now() -> bool:
            ran.append(name)
            return True

        streams.queues["passes"].append(now)

    def run_passes() -> list[int]:
        while streams.go_on("passes"):
            pass
        return ran

    engine.move(Step(manager, 1, [(OFFLOAD, 0, 0, 0), (OFFLOAD, 0, 1, 1)]))  # no pass needs these
    launched(1)
    assert run_passes() == [1]
    # A load is needed, and offloads noted behind it are not; a load behind the newest that is needed counts as needed.
    moves = [(LOAD, 0, 0, 2), (OFFLOAD, 0, 3, 3), (OFFLOAD, 0, 4, 4)]
    if with_gaps:
        moves.insert(1, (LOAD, 0, 1, 5))
    engine.move(Step(manager, 3, moves, needs=3))
    launched(2)
    assert run_passes() == [1]
    for _ in range(6):  # follow, two moves together, mark; follow, the loads
        assert streams.go_on("moves")
        if engine.landed() < 2:
            assert run_passes() == [1]
    assert run_passes() == [1, 2]
    assert engine.landed() == 3
    assert engine[0].key_cache[5].eq(8.0).all() == with_gaps
    launched(3)
    assert run_passes() == [1, 2, 3]
    streams.finish()
    assert engine.landed() == 2 + len(moves)


@pytest.mark.parametrize("rows", [0, 1])
def test_moves_of_earlier_steps_are_waited_for(rows: int) -> None:
    """Also where the newest move that is needed is a copy on the passes' own stream, and in a step without rows."""
    engine, manager, streams = late()
    assert engine.arena is not None
    engine[0].key_cache[1] = 8.0
    engine.move(Step(manager, 1, [(OFFLOAD, 0, 1, 0), (LOAD, 0, 0, 2)]))  # no row of this step needs the load
    engine.move(Step(manager, 3, [], needs=3) if rows else Step(manager, 3, [], rows=0))
    read: list[float] = []

    def now() -> bool:
        read.append(float(engine[0].key_cache[2].max()))
        return True

    streams.queues["passes"].append(now)
    while streams.go_on("passes"):
        pass
    streams.finish()
    assert read == [8.0]


# --- the kernel


def some_moves(config: CacheConfig, count: int) -> list[tuple[int, int, int, int]]:
    rng, moves = random.Random(4), []
    for _ in range(count):
        kind, group = rng.randrange(2), rng.randrange(len(config.groups))
        block, slot = rng.randrange(6), rng.randrange(3)
        moves.append((kind, group, block, slot) if kind == OFFLOAD else (kind, group, slot, block))
    return moves


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles; set TRITON_INTERPRET=1")
@pytest.mark.parametrize("config", [GROUPED, OTHERS], ids=["groups", "other tensors"])
def test_the_kernel_makes_the_moves_that_compiled_code_makes(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernels("slots")
    assert module is not None
    monkeypatch.setattr(module, "_CHUNK_BYTES", 256)  # so that a block of this size has several chunks
    ours, _ = with_host(config, 3)
    theirs, _ = with_host(config, 3)
    table = torch.tensor(some_moves(config, 14), dtype=torch.int32)
    pieces = [(storage.data_ptr(), width, width) for storage, width in ours._memory.storages]
    chunks = module.Chunks.of(pieces, ours._memory.sizes, torch.device("cpu"))
    assert len(chunks.table) > len(pieces)
    assert ours.arena is not None
    assert theirs._host is not None
    module.move_blocks(chunks, ours.arena.address + HEADER_BYTES, ours.arena.slot_bytes, table)
    theirs._host.run(table)
    for group in range(len(config.groups)):
        assert [expected(ours, block, group) for block in range(6)] == [
            expected(theirs, block, group) for block in range(6)
        ]
    assert theirs.arena is not None
    assert bytes(ours.arena.buffer) == bytes(theirs.arena.buffer)


@pytest.mark.cuda
@pytest.mark.parametrize("config", [GROUPED, OTHERS], ids=["groups", "other tensors"])
def test_moves_on_a_device_are_those_on_the_host(config: CacheConfig) -> None:
    theirs, books = with_host(config, 3)
    ours = CacheEngine(config, "float32", "cuda", layout="NHD", host_blocks=3)
    for cache, other in zip(ours, theirs, strict=True):
        for name, tensor in cache.tensors.items():
            tensor.copy_(other.tensors[name])
    assert ours.arena is not None
    assert theirs.arena is not None
    assert ours.arena.pinned
    ours.arena.buffer[:] = theirs.arena.buffer
    moves = some_moves(config, 40)
    theirs.move(Step(books, 1, moves))
    for first in (1, 21):
        step = Step(Manager(config, 3), first, moves[first - 1 : first + 19], needs=first + 9)
        step.manager.moves_marked = first - 1
        step.copies = step.copies.to("cuda")
        ours.move(step)
    while ours.landed() < 40:
        pass
    for cache, other in zip(ours, theirs, strict=True):
        for name, tensor in cache.tensors.items():
            assert torch.equal(tensor.cpu().view(torch.uint8), other.tensors[name].view(torch.uint8))
    assert bytes(ours.arena.buffer) == bytes(theirs.arena.buffer)
