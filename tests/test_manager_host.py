"""The host pool of a block manager: what moves when, and what its callers are told."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from manager_hooks import hook, needs_hooks

from kvblocks.config import Window
from kvblocks.errors import InvariantViolation, MovesPending, NoFreeBlocks
from kvblocks.manager import BlockManager, StepArrays
from kvblocks.replay import host_step

BLOCK = 4
OFFLOAD, LOAD = 0, 1


def run(manager: BlockManager, tokens: Any, step: StepArrays, **options: Any) -> tuple[int, int, list[list[int]]]:
    """A sequence that is computed: its handle, what was cached, and the moves that came with its step."""
    seq, cached = manager.admit(tokens, **options)
    step_id = manager.prepare(seq, len(tokens) - cached, step)
    moves: list[list[int]] = step.moves.tolist()
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    return seq, cached, moves


def visit(manager: BlockManager, tokens: Any, step: StepArrays) -> list[list[int]]:
    seq, _, moves = run(manager, tokens, step)
    manager.free(seq)
    return moves


def full_host() -> tuple[BlockManager, StepArrays]:
    """The blocks of range(12) lie in host slots only, and nothing is held."""
    manager, step = BlockManager(4, BLOCK, host_blocks=8), host_step(4, 64, 16)
    visit(manager, range(12), step)  # blocks 0, 1, 2; freed and cached
    assert visit(manager, range(100, 104), step) == [[OFFLOAD, 0, 2, 0], [OFFLOAD, 0, 1, 1], [OFFLOAD, 0, 0, 2]]
    visit(manager, range(200, 216), step)
    assert manager.match(range(13), tiers=True) == (0, 12)
    return manager, step


def test_what_was_evicted_comes_back_from_the_host() -> None:
    manager, step = full_host()
    assert manager.match(range(13)) == 12
    seq, cached = manager.admit(range(13))
    assert cached == 12
    assert manager.lengths(seq).num_loading.tolist() == [12]
    assert manager.match(range(13), tiers=True) == (12, 0)  # on its way: whoever finds it waits as well
    step_id = manager.prepare(seq, 1, step)
    blocks = manager.block_table(seq).tolist()
    loads = [move for move in step.moves.tolist() if move[0] == LOAD]
    assert sorted(loads) == sorted([LOAD, 0, slot, block] for slot, block in zip((2, 1, 0), blocks, strict=False))
    assert 0 < step.needs <= step.last_move
    with pytest.raises(MovesPending, match=r"engine\.move\(step\)"):
        manager.commit(step_id)
    manager.mark_moved(step.last_move)
    assert step.moves.shape == (0, 4)
    manager.commit(step_id)
    assert manager.lengths(seq).num_loading.tolist() == [12]
    manager.landed(manager.moves_marked)
    assert manager.lengths(seq).num_loading.tolist() == [0]
    stats = manager.stats()
    assert (stats.loads, stats.hit_tokens, stats.host_hit_tokens) == (3, 12, 12)
    manager.append(seq, 7)
    manager.prepare(seq, 1, step)
    assert step.needs == 0  # nothing that has landed is waited for
    manager.audit()


def test_a_hit_without_the_host() -> None:
    manager, _ = full_host()
    assert manager.admit(range(13), host=False)[1] == 0
    assert manager.stats().host_hit_tokens == 0


def test_a_hit_is_cut_where_its_loads_do_not_fit() -> None:
    manager, step = full_host()
    run(manager, [1] * BLOCK, step)
    with pytest.raises(NoFreeBlocks) as caught:
        manager.admit(range(13))  # four blocks, however many of them are loaded
    assert (caught.value.needed, caught.value.free) == (4, 3)
    assert manager.can_admit(range(13), reserve=1)
    assert manager.admit(range(13), reserve=1)[1] == 8


def test_moves_of_an_aborted_step_are_still_to_be_made() -> None:
    manager, step = full_host()
    seq, _ = manager.admit(range(13))
    step_id = manager.prepare(seq, 1, step)
    moves, last = step.moves.tolist(), step.last_move
    manager.abort(step_id)
    other = host_step(4, 64, 16)
    with pytest.raises(MovesPending):
        manager.prepare(seq, 1, other)
    assert step.moves.tolist() == moves
    manager.mark_moved(last)
    manager.prepare(seq, 1, other)
    assert not any(move[0] == LOAD for move in other.moves.tolist())
    assert other.needs > 0  # its pass waits all the same


def larger_pool() -> tuple[BlockManager, StepArrays]:
    """As `full_host`, with room for a second sequence of these tokens, and nothing left to offload."""
    manager, step = BlockManager(9, BLOCK, host_blocks=20), host_step(4, 64, 16)
    visit(manager, range(12), step)
    for first in (100, 200, 300):
        visit(manager, range(first, first + 24), step)
    visit(manager, [400], step)
    assert manager.match(range(13), tiers=True) == (0, 12)
    manager.landed(manager.moves_marked)
    return manager, step


def next_needs(manager: BlockManager, seq: int, step: StepArrays) -> int:
    """What the next pass of a sequence waits for; it is committed."""
    left = manager.lengths(seq)
    step_id = manager.prepare(seq, int(left.num_tokens[0] - left.num_computed[0]), step)
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    return step.needs


def test_a_fork_waits_for_the_loads_of_its_parent() -> None:
    manager, step = larger_pool()
    parent, _ = manager.admit(range(13))
    [child] = manager.fork(parent)
    loads = next_needs(manager, parent, step)
    assert next_needs(manager, child, step) >= loads > 0


def test_a_second_hit_waits_for_the_loads_of_the_first() -> None:
    manager, step = larger_pool()
    manager.admit(range(13))
    second, cached = manager.admit(range(13))
    assert cached == 12
    assert next_needs(manager, second, step) > 0


def test_a_sequence_that_takes_the_block_of_an_equal_one_waits_for_its_load() -> None:
    manager, step = larger_pool()
    late, cached = manager.admit(range(13), host=False)
    assert cached == 0
    manager.admit(range(13))  # brings back what the first one is about to compute
    next_needs(manager, late, step)
    assert manager.stats().merged == 3
    manager.append(late, 7)
    assert next_needs(manager, late, step) > 0


class Torn(StepArrays):
    """Arrays whose way to the device is cut."""

    def _upload(self) -> None:
        raise RuntimeError("the device is gone")


def torn_step() -> Torn:
    ids, positions, slots = (np.empty(64, np.int64) for _ in range(3))
    table, copies = np.empty((4, 16), np.int32), np.empty((4, 2), np.int64)
    return Torn(ids, positions, slots, table, np.empty(4, np.int32), np.empty(5, np.int32), copies, uploads=True)


def test_a_prepare_that_raises_keeps_its_moves_for_the_next() -> None:
    manager, step = full_host()
    seq, _ = manager.admit(range(13))
    torn = torn_step()
    for _ in range(100):
        with pytest.raises(RuntimeError, match="gone"):
            manager.prepare(seq, 1, torn)
        assert (torn.needs, torn.last_move, torn.waits) == (0, 0, False)
        manager.mark_moved(manager.moves_marked)  # what was marked before: it says nothing of those that are kept
        manager.audit()
    step_id = manager.prepare(seq, 1, step)
    moves = step.moves.tolist()
    assert sum(move[0] == LOAD for move in moves) == 3
    assert len({tuple(move) for move in moves}) == len(moves)
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    manager.audit()


def test_a_kept_load_is_dropped_with_its_block() -> None:
    """The step never came to be, its sequence went, and its blocks are others' now: nothing may be loaded there."""
    manager, step = full_host()
    seq, _ = manager.admit(range(13))
    with pytest.raises(RuntimeError, match="gone"):
        manager.prepare(seq, 1, torn_step())
    manager.free(seq)
    _, cached, moves = run(manager, range(300, 316), step)
    assert cached == 0
    assert not any(move[0] == LOAD for move in moves)
    manager.audit()


def test_numbers_that_no_move_has() -> None:
    manager, step = full_host()
    marked = manager.moves_marked
    for call in (manager.mark_moved, manager.landed):
        for number in (-1, marked + 1, 2**62):
            with pytest.raises(ValueError, match=rf"number={number} must be 0 to {marked}, the newest move"):
                call(number)
        with pytest.raises(TypeError, match="number must be an integer"):
            call(1.5)  # type: ignore[arg-type]
    manager.prepare(manager.admit(range(13))[0], 1, step)
    with pytest.raises(ValueError, match="that is marked as made"):
        manager.landed(step.last_move)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_blocks": -1}, "host_blocks=-1 must be 0 to 2147483646"),
        ({"host_blocks": 2**31}, "host_blocks=2147483648 must be 0 to"),
        ({"host_blocks": 1, "write_ahead": 0}, "write_ahead=0 must be 1 to 1048576"),
        ({"host_blocks": 3, "prefix_caching": False}, "host_blocks=3 needs prefix_caching=True"),
    ],
)
def test_pools_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockManager(4, BLOCK, **options)


@pytest.mark.parametrize("call", ["admit", "can_admit", "match"])
def test_switches_are_bools(call: str) -> None:
    manager = BlockManager(4, BLOCK, host_blocks=4)
    name = "tiers" if call == "match" else "host"
    with pytest.raises(TypeError, match=f"{name} must be a bool, not int"):
        getattr(manager, call)([1], **{name: 1})


def test_without_a_host_pool_nothing_is_said_of_it() -> None:
    manager, step = BlockManager(4, BLOCK), host_step(4, 64, 16)
    assert (manager.host_blocks, manager.num_free_host_blocks) == (0, 0)
    seq, _, moves = run(manager, range(9), step)
    assert moves == []
    assert (step.needs, step.last_move) == (0, 0)
    assert manager.lengths(seq).num_loading.tolist() == [0]
    assert manager.match(range(9), tiers=True) == (8, 0)
    manager.landed(0)


SCRIPT = """
import hashlib, random, numpy as np
from kvblocks.config import Chunk, Window
from kvblocks.errors import NoFreeBlocks
from kvblocks.manager import BlockManager, StepArrays
groups = (None, Window(9), Chunk(8))
manager = BlockManager(120, 4, groups=groups, host_blocks=150, write_ahead=20)
arrays = [np.empty(64, np.int64), np.empty(64, np.int64), np.empty((3, 64), np.int64), np.empty((3, 2, 32), np.int32)]
step = StepArrays(*arrays, np.empty(2, np.int32), np.empty(3, np.int32), np.empty((6, 2), np.int64))
rng, digest, known = random.Random(1), hashlib.sha256(), []
for _ in range(400):
    tokens = rng.choice(known)[: rng.randint(1, 60)] if known and rng.random() < 0.7 else []
    tokens = tokens + [rng.randint(0, 9) for _ in range(rng.randint(1, 20))]
    known = [*known[-30:], tokens]
    seq, cached = manager.admit(tokens[:64])
    step_id = manager.prepare(seq, len(tokens[:64]) - cached, step)
    digest.update(repr((cached, manager.block_table(seq).tolist(), step.moves.tolist(), step.needs)).encode())
    manager.mark_moved(step.last_move)
    if rng.random() < 0.5:
        manager.landed(step.last_move)
    manager.commit(step_id)
    manager.free(seq)
manager.audit()
assert manager.stats().loads > 300, manager.stats()
print(digest.hexdigest())
"""


def test_two_processes_give_the_same_blocks_and_moves() -> None:
    made = [subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120) for _ in "ab"]
    assert [process.stderr for process in made] == ["", ""]
    assert made[0].stdout == made[1].stdout != ""


def test_a_block_that_slid_out_of_a_window_is_not_offloaded() -> None:
    manager, step = BlockManager(4, BLOCK, groups=(Window(2),), host_blocks=8), host_step(4, 64, 16)
    seq, _ = manager.admit(range(12), reserve=4)
    for _ in range(3):
        step_id = manager.prepare(seq, 4, step)
        manager.mark_moved(step.last_move)
        manager.commit(step_id)
    manager.free(seq)
    assert [move[2] for move in visit(manager, [50] * 3, step)] == [2]  # of three published blocks the last


@needs_hooks
@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("slot_node", 0, 1),
        ("slot_group", 0, 1),
        ("slot_newer", 0, 1),
        ("slot_of", 0, 1),
        ("slot_move", 0, 1000),
        ("oldest", 0, 1),
        ("examined", 0, 1),
        ("shadow_move", 0, 1000),
        ("moves_landed", 0, 1000),
    ],
)
def test_audit_finds_a_broken_host_pool(field: str, index: int, value: int) -> None:
    manager, _ = full_host()
    poke: Callable[[BlockManager, str, int, int], None] = hook("_poke")
    poke(manager, field, index, value)
    with pytest.raises(InvariantViolation) as caught:
        manager.audit()
    assert caught.value.invariant == 10 or field == "slot_node"
    poke(manager, field, index, -value)
    manager.audit()


@needs_hooks
def test_every_allocation_of_a_host_pool_may_fail() -> None:
    fail: Callable[[int], int] = hook("_fail_allocation")
    failures = 0
    while True:
        fail(failures)
        try:
            BlockManager(100, BLOCK, host_blocks=50)
            break
        except MemoryError:
            failures += 1
        finally:
            left = fail(-1)
    assert left >= 0
    assert failures >= 15
