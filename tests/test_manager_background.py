"""Fetches and spills of a block manager: what its callers are told, wrong calls, memory that is out."""

import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from manager_compiled import make_step
from manager_hooks import hook, needs_hooks

from kvblocks.config import State, Window
from kvblocks.errors import InvariantViolation
from kvblocks.manager import BlockManager, Fetch, Spill, SpilledNode, StepArrays
from kvblocks.replay import host_step

BLOCK = 4


def visit(manager: BlockManager, tokens: Any, step: StepArrays, **identity: Any) -> None:
    """A sequence that is computed and freed, and whose moves have landed."""
    seq, cached = manager.admit(tokens, **identity)
    commit(manager, manager.prepare(seq, len(tokens) - cached, step), step)
    manager.free(seq)


def commit(manager: BlockManager, step_id: int, step: StepArrays) -> None:
    manager.mark_moved(step.last_move)
    manager.landed(manager.moves_marked)
    manager.commit(step_id)


def flush(manager: BlockManager, step: StepArrays) -> None:
    commit(manager, manager.prepare([], [], step), step)


def new_pool(host_blocks: int = 32) -> tuple[BlockManager, StepArrays]:
    return BlockManager(6, BLOCK, host_blocks=host_blocks), host_step(4, 64, 16)


def spilled() -> tuple[BlockManager, StepArrays, Spill]:
    """The blocks of range(12) are in host slots, and being spilled."""
    manager, step = new_pool()
    visit(manager, range(12), step, salt=b"tenant", extra=[(5, b"image")])
    flush(manager, step)
    return manager, step, manager.begin_spill(8)


def test_a_spill_says_what_its_blocks_are() -> None:
    manager, _, spill = spilled()
    assert spill.blocks.tolist() == [[0, 0, 2], [1, 0, 1], [2, 0, 0]]  # the end of the path is evicted first
    assert [node.parent for node in spill.nodes] == [-1, 0, 1]
    assert [node.salt for node in spill.nodes] == [b"tenant", None, None]
    assert all(node.parent_digest is None for node in spill.nodes)
    tokens = b"".join(node.tokens for node in spill.nodes)
    assert np.frombuffer(tokens, "<i4").tolist() == list(range(12))
    extras = manager.block_extras([(5, b"image")], 3)
    assert [node.extra for node in spill.nodes] == extras
    assert extras == [b"", struct.pack("<qq5sq", 1, 5, b"image", 5), b""]
    assert manager.num_background_slots == 3
    assert len(manager.begin_spill(8).blocks) == 0  # each slot once
    manager.audit()


def test_digests_are_kept_beside_their_nodes() -> None:
    manager, step, spill = spilled()
    digests = [hashlib.sha256(node.tokens).digest() for node in spill.nodes]
    manager.end_spill(spill, [True] * 3, digests)
    assert manager.num_background_slots == 0
    visit(manager, range(16), step, salt=b"tenant", extra=[(5, b"image")])
    flush(manager, step)
    [node] = manager.begin_spill(8).nodes
    assert node == SpilledNode(-1, digests[2], None, np.arange(12, 16, dtype="<i4").tobytes(), b"")
    manager.audit()


def test_what_was_not_stored_is_spilled_again_and_what_was_is_not() -> None:
    manager, _, spill = spilled()
    manager.end_spill(spill, np.array([True, False, True]))
    again = manager.begin_spill(8)
    assert again.blocks[:, 0].tolist() == [1]
    manager.end_spill(again, [True])
    assert len(manager.begin_spill(8).blocks) == 0


def test_a_slot_in_flight_is_not_spilled() -> None:
    manager, step = new_pool()
    visit(manager, range(12), step)
    step_id = manager.prepare([], [], step)
    manager.mark_moved(step.last_move)
    manager.commit(step_id)
    assert len(manager.begin_spill(8).blocks) == 0
    manager.landed(step.last_move)
    assert len(manager.begin_spill(8).blocks) == 3


def test_what_was_fetched_is_found_and_loaded() -> None:
    manager, step = new_pool()
    visit(manager, range(4), step)
    fetch = manager.begin_fetch(range(13), num_blocks=3)
    assert (fetch.number, fetch.num_local, fetch.num_tokens) == (1, 4, 12)
    assert fetch.blocks.tolist() == [[1, 0, 0], [2, 0, 1]]
    assert not fetch.blocks.flags.writeable
    assert manager.match(range(13)) == 4  # nobody sees it yet
    assert manager.num_free_host_blocks == 30
    assert manager.end_fetch(fetch, 2) == 12
    assert manager.match(range(13), tiers=True) == (4, 8)
    seq, cached = manager.admit(range(13), fetched=fetch)
    assert cached == 12
    assert manager.num_background_slots == 0
    manager.prepare(seq, 1, step)
    assert sorted(move[2] for move in step.moves.tolist() if move[0] == 1) == [0, 1]
    assert len(manager.begin_spill(8).blocks) == 0  # it came from there
    manager.audit()


@pytest.mark.parametrize(("num_ok", "served"), [(0, 0), (1, 4), (2, 8), (3, 12)])
def test_a_fetch_may_bring_less(num_ok: int, served: int) -> None:
    manager, _ = new_pool()
    fetch = manager.begin_fetch(range(13), num_blocks=3)
    assert manager.end_fetch(fetch, num_ok) == served == manager.match(range(13))
    assert manager.num_background_slots == num_ok
    manager.release(fetch)
    assert manager.num_free_host_blocks == 32 - num_ok
    manager.audit()


def test_one_length_for_all_groups() -> None:
    """The group with a window needs its last blocks only; without them nothing is served."""
    manager = BlockManager(20, BLOCK, groups=(None, Window(4)), host_blocks=64)
    fetch = manager.begin_fetch(range(17), num_blocks=4)
    assert fetch.blocks[:, :2].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]]
    assert manager.end_fetch(fetch, 4) == 0
    assert manager.num_free_host_blocks == 64
    again = manager.begin_fetch(range(17), num_blocks=4)
    assert manager.end_fetch(again, 5) == 16
    manager.audit()


def test_twins() -> None:
    manager, _ = new_pool()
    first, second = (manager.begin_fetch(range(13), num_blocks=3) for _ in "ab")
    assert len(second.blocks) == 3
    assert not set(first.blocks[:, 2].tolist()) & set(second.blocks[:, 2].tolist())
    assert manager.end_fetch(second, 2) == 8
    assert manager.end_fetch(first, 3) == 12  # the last block is its own
    assert manager.num_background_slots == 3
    manager.audit()


def test_a_quarter_of_the_pool_is_held_at_most() -> None:
    manager, _ = new_pool(host_blocks=8)
    fetch = manager.begin_fetch(range(100), num_blocks=10**9)
    assert len(fetch.blocks) == 2 == manager.num_background_slots
    assert fetch.num_tokens == 8
    other = manager.begin_fetch(range(100, 200), num_blocks=5)
    assert (len(other.blocks), other.num_tokens) == (0, 0)
    manager.end_fetch(fetch, 0)
    assert len(manager.begin_fetch(range(100, 200), num_blocks=5).blocks) == 2


def test_after_a_reset_a_fetch_brings_nothing() -> None:
    manager, step, spill = spilled()
    fetch = manager.begin_fetch(range(50, 63), num_blocks=3)
    manager.reset_prefix_cache()
    assert manager.num_background_slots == 6  # they may still be read and written
    manager.audit()
    assert manager.end_fetch(fetch, 3) == 0
    manager.end_spill(spill, [True] * 3, [bytes(32)] * 3)
    manager.release(fetch)
    assert manager.num_free_host_blocks == 32
    visit(manager, range(12), step)
    flush(manager, step)
    assert manager.begin_spill(8).nodes[0].salt == b""  # nothing of before is known
    manager.audit()


def test_a_step_without_rows_brings_everything_to_the_host() -> None:
    manager, step = BlockManager(20_000, 1, host_blocks=20_000, write_ahead=9000), host_step(1, 20_000, 20_000)
    visit(manager, range(19_000), step)
    moved: list[int] = []
    while not moved or moved[-1]:
        step_id = manager.prepare([], [], step)
        moved.append(len(step.moves))
        commit(manager, step_id, step)
    assert moved == [9000, 9000, 1000, 0]  # past the horizon of other steps, which is 8192
    manager.audit()
    with pytest.raises(ValueError, match="at least one sequence"):
        BlockManager(4, BLOCK).prepare([], [], step)


def test_steps_without_rows_beside_states() -> None:
    options: dict[str, Any] = {"groups": (None, State(BLOCK)), "num_states": 4, "host_blocks": 8}
    manager, step = BlockManager(6, BLOCK, **options), make_step(4, 64, 16)
    for keep in (False, True, False, True):
        manager.commit(manager.prepare([], [], step, keep_state=keep))
    visit(manager, range(8), step)
    flush(manager, step)
    assert len(manager.begin_spill(8).blocks) == 2
    manager.abort(manager.prepare([], [], step))
    manager.audit()


def test_a_fetch_plans_no_length_without_its_state() -> None:
    """Blocks that nobody could go on from are not brought."""
    options: dict[str, Any] = {"groups": (None, State(BLOCK)), "num_states": 4, "host_blocks": 32}
    manager = BlockManager(6, BLOCK, **options)
    fetch = manager.begin_fetch(range(13), num_blocks=3)
    assert (len(fetch.blocks), fetch.num_tokens) == (0, 0)
    manager.end_fetch(fetch, 0)
    manager.release(fetch)
    manager.audit()


# Of states


def stateful(
    host_states: int = 8, groups: Any = (None,), every: int = BLOCK, num_states: int = 4
) -> tuple[BlockManager, StepArrays]:
    states: dict[str, Any] = {"num_states": num_states, "host_states": host_states}
    manager = BlockManager(8, BLOCK, groups=[*groups, State(every)], host_blocks=32, **states)
    return manager, make_step(4, 64, 16, len(groups))


def test_a_state_is_spilled_as_the_last_group_of_its_node() -> None:
    manager, step = stateful()
    visit(manager, range(12), step)
    flush(manager, step)
    held = manager.begin_spill(8, max_states=0)
    assert held.blocks[:, 1].tolist() == [0, 0, 0]
    spill = manager.begin_spill(8)
    assert spill.blocks.tolist() == [[0, 1, 2]]  # its slot is the first of those for states
    assert [node.parent for node in spill.nodes] == [-1, 0, 1]
    manager.end_spill(spill, [False])
    assert manager.begin_spill(8).blocks.tolist() == [[0, 1, 2]]
    assert manager.num_background_slots == 4
    manager.audit()


def test_a_state_is_fetched_after_the_last_block() -> None:
    manager, _ = stateful()
    fetch = manager.begin_fetch(range(15), num_blocks=3, checkpoints=[1, 2])
    assert fetch.num_tokens == 8
    assert fetch.blocks.tolist() == [[0, 0, 0], [1, 0, 1], [1, 1, 0]]
    assert manager.end_fetch(fetch, 3) == 8 == manager.match(range(15))
    seq, cached = manager.admit(range(15), fetched=fetch)
    assert cached == 8
    assert manager.state_slot(seq) >= 0
    manager.audit()
    for num_ok in (0, 1, 2):  # without the state blocks are of no use
        manager, _ = stateful()
        fetch = manager.begin_fetch(range(15), num_blocks=3, checkpoints=[2])
        assert manager.end_fetch(fetch, num_ok) == 0 == manager.match(range(15))
        assert manager.num_background_slots == 0
        assert (manager.num_free_host_blocks, manager.num_free_host_states) == (32, 8)
        manager.audit()


def test_a_fetch_ends_at_a_checkpoint_for_which_there_is_room() -> None:
    manager, _ = stateful(host_states=4)
    first = manager.begin_fetch(range(15), num_blocks=3, checkpoints=[3])
    second = manager.begin_fetch(range(50, 65), num_blocks=3, checkpoints=[3])
    assert (first.num_tokens, second.num_tokens) == (12, 0)  # one slot of four
    manager.end_fetch(first, 4)
    assert len(manager.begin_fetch(range(50, 65), num_blocks=3, checkpoints=[3]).blocks) == 0
    manager.release(first)
    third = manager.begin_fetch(range(50, 65), num_blocks=3, checkpoints=[3])
    assert third.num_tokens == 12
    few, _ = stateful(host_states=3)
    assert few.begin_fetch(range(15), num_blocks=3, checkpoints=[3]).num_tokens == 0
    assert manager.begin_fetch(range(15), num_blocks=3).num_tokens == 12  # that is there
    manager.audit()


def test_a_state_that_is_here_is_not_fetched_again() -> None:
    manager, step = stateful()
    visit(manager, range(12), step)
    flush(manager, step)
    fetch = manager.begin_fetch(range(20), num_blocks=4, checkpoints=[3, 4])
    assert fetch.blocks.tolist() == [[3, 0, 3], [3, 1, 1]]
    manager.end_fetch(fetch, 2)
    manager.release(fetch)
    manager.reset_prefix_cache()
    assert manager.num_free_host_states == 8


@pytest.mark.parametrize(("num_ok", "served"), [(0, 0), (1, 16)])
def test_a_state_alone_may_be_fetched(num_ok: int, served: int) -> None:
    """Its blocks are on the device, and no slot for blocks was ever used."""
    manager, step = stateful(num_states=1, every=2 * BLOCK)
    visit(manager, range(17), step)  # in one slot, so that nothing is left of its states
    assert manager.match(range(17)) == 0
    fetch = manager.begin_fetch(range(17), num_blocks=4, checkpoints=[2, 4])
    assert (fetch.blocks.tolist(), fetch.num_tokens) == ([[3, 1, 0]], 16)
    assert manager.end_fetch(fetch, num_ok) == served == manager.match(range(17))
    manager.audit()
    manager.release(fetch)
    manager.audit()


def test_a_reset_takes_the_node_of_a_state_away() -> None:
    manager, _ = stateful()
    fetch = manager.begin_fetch(range(15), num_blocks=3, checkpoints=[3])
    manager.reset_prefix_cache()
    assert manager.end_fetch(fetch, 4) == 0
    manager.release(fetch)
    assert manager.num_free_host_states == 8
    manager.audit()


def test_what_has_slid_out_of_a_window_goes_along_with_a_checkpoint() -> None:
    """A hit at 8 tokens needs the window before them, which the sequence has left behind."""
    manager, step = stateful(groups=(None, Window(6)), every=2 * BLOCK)
    seq, _ = manager.admit(range(14))
    for count in (8, 4, 2):
        commit(manager, manager.prepare(seq, count, step), step)
    manager.free(seq)
    flush(manager, step)
    assert manager.match(range(14), tiers=True) == (8, 0)
    spill = manager.begin_spill(32)
    nodes = [len(spill.nodes) - 1 - index for index in spill.blocks[:, 2]]
    assert sorted(zip(spill.blocks[:, 1].tolist(), nodes, strict=True)) == [
        *((0, node) for node in range(3)),
        *((1, node) for node in range(3)),
        (2, 1),
    ]
    manager.audit()


@pytest.mark.parametrize(
    ("error", "message", "checkpoints"),
    [
        (ValueError, r"checkpoints\[1\]=4 must be at least 1 and at most num_blocks=3", [2, 4]),
        (ValueError, r"checkpoints\[0\]=0 must be at least 1", [0]),
        (ValueError, r"checkpoints\[0\]=-2 must be at least 1", np.array([-2])),
        (ValueError, r"checkpoints\[0\]=1 blocks are 4 tokens, no multiple of every=8", [1]),
        (ValueError, r"checkpoints\[1\]=2 must be more than the 2 before it", [2, 2]),
        (ValueError, r"checkpoints\[0\]=\d+ does not fit in 64 bits", [2**70]),
        (TypeError, r"checkpoints\[0\] must be an integer", [2.0]),
        (TypeError, r"checkpoints\[0\] must be an integer", [True]),
        (TypeError, "checkpoints must be integers", None),
        (TypeError, "checkpoints must be integers", "2"),
        (TypeError, "checkpoints must be integers", {2}),
        (TypeError, "checkpoints must have one dimension", np.array([[2]])),
    ],
)
def test_wrong_checkpoints_of_a_fetch(error: type[Exception], message: str, checkpoints: Any) -> None:
    manager, _ = stateful(every=2 * BLOCK)
    with pytest.raises(error, match=message):
        manager.begin_fetch(range(15), num_blocks=3, checkpoints=checkpoints)
    assert manager.num_background_slots == 0
    assert manager.begin_fetch(range(15), num_blocks=3, checkpoints=np.array([2], np.int32)).number == 1
    homeless, _ = stateful(host_states=0)
    for one in (homeless, new_pool()[0]):
        with pytest.raises(ValueError, match="1 checkpoints are given, for which this manager has no slots in host"):
            one.begin_fetch(range(15), num_blocks=3, checkpoints=[2])
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match=f"max_states={wrong}"):
            manager.begin_spill(1, max_states=wrong)


def test_without_a_host_pool() -> None:
    manager = BlockManager(4, BLOCK)
    assert manager.num_background_slots == 0
    with pytest.raises(ValueError, match="begin_fetch needs host slots: this manager was made with host_blocks=0"):
        manager.begin_fetch([1, 2], num_blocks=1)
    with pytest.raises(ValueError, match="begin_spill needs host slots"):
        manager.begin_spill(1)
    assert manager.block_extras([], 2) == [b"", b""]


@pytest.mark.parametrize("number", [-1, 2**31, 2**70])
def test_numbers_out_of_range(number: int) -> None:
    manager, _ = new_pool()
    calls: list[Callable[[], object]] = [
        lambda: manager.begin_fetch([1] * 9, num_blocks=number),
        lambda: manager.begin_spill(number),
        lambda: manager.block_extras([], number),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=str(number)):
            call()
    fetch = manager.begin_fetch(range(13), num_blocks=3)
    for wrong in (number, 4):
        with pytest.raises(ValueError, match=f"num_ok={wrong} "):
            manager.end_fetch(fetch, wrong)
    assert manager.end_fetch(fetch, 3) == 12
    manager.audit()


def test_fetches_in_another_state() -> None:
    manager, _ = new_pool()
    other, _ = new_pool()
    fetch = manager.begin_fetch(range(13), num_blocks=3)
    with pytest.raises(ValueError, match="fetch 1 has not ended; call end_fetch first"):
        manager.release(fetch)
    with pytest.raises(ValueError, match="fetch 1 has not ended; call end_fetch first"):
        manager.admit([1], fetched=fetch)
    with pytest.raises(ValueError, match="fetch 1 belongs to another manager"):
        other.end_fetch(fetch, 0)
    manager.end_fetch(fetch, 3)
    with pytest.raises(ValueError, match="fetch 1 has ended before"):
        manager.end_fetch(fetch, 3)
    with pytest.raises(ValueError, match="fetch 1 belongs to another manager"):
        other.admit([1], fetched=fetch)
    assert (manager.num_sequences, other.num_sequences) == (0, 0)
    manager.release(fetch)
    calls: list[Callable[[], object]] = [
        lambda: manager.release(fetch),
        lambda: manager.end_fetch(fetch, 0),
        lambda: manager.admit([1], fetched=fetch),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="fetch 1 was released before"):
            call()
    manager.audit()


def test_spills_in_another_state() -> None:
    manager, _, spill = spilled()
    other, _ = new_pool()
    with pytest.raises(ValueError, match="spill 1 belongs to another manager"):
        other.end_spill(spill, [True] * 3)
    wrong: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "ok has 2 elements for 3 blocks", [True] * 2, None),
        (TypeError, "one bool for each block", [1, 1, 1], None),
        (TypeError, "one bool for each block", None, None),
        (ValueError, "2 digests for 3 nodes", [True] * 3, [bytes(32)] * 2),
        (ValueError, r"digests\[1\] has 31 bytes", [True] * 3, [bytes(32), bytes(31), bytes(32)]),
        (TypeError, r"digests\[0\] must be bytes", [True] * 3, ["a" * 32] * 3),
        (TypeError, "not iterable", [True] * 3, 5),
    ]
    for error, message, ok, digests in wrong:
        with pytest.raises(error, match=message):
            manager.end_spill(spill, ok, digests)
    assert manager.num_background_slots == 3
    manager.end_spill(spill, [True] * 3)
    with pytest.raises(ValueError, match="spill 1 has ended before"):
        manager.end_spill(spill, [True] * 3)
    manager.audit()


def test_other_things_are_no_fetches() -> None:
    manager, _ = new_pool()
    for made in (Fetch, Spill):
        with pytest.raises(TypeError, match="is made by BlockManager"):
            made()
    empty: Any = Fetch.__new__(Fetch)
    others: list[Any] = [None, 1, "fetch", manager.begin_spill(0)]
    for wrong in others:
        with pytest.raises(TypeError):
            manager.end_fetch(wrong, 0)
        with pytest.raises(TypeError):
            manager.release(wrong)
        if wrong is not None:
            with pytest.raises(TypeError):
                manager.admit([1], fetched=wrong)
    with pytest.raises(ValueError, match="another manager"):
        manager.end_fetch(empty, 0)
    with pytest.raises(ValueError, match="another manager"):
        manager.release(empty)
    numbers: list[Any] = [None, 1.5, "1", True]
    for wrong in numbers:
        with pytest.raises(TypeError):
            manager.begin_spill(wrong)
        with pytest.raises(TypeError):
            manager.begin_fetch([1], num_blocks=wrong)
    assert manager.num_sequences == 0


def test_a_manager_goes_with_work_that_never_ended() -> None:
    manager, _, spill = spilled()
    fetch = manager.begin_fetch(range(50, 63), num_blocks=3)
    del manager
    assert (spill.number, fetch.number) == (1, 2)
    fetch.blocks.tolist()


SCRIPT = """
import hashlib, random, numpy as np
from kvblocks.config import Chunk, Window
from kvblocks.manager import BlockManager, StepArrays
manager = BlockManager(120, 4, groups=(None, Window(9), Chunk(8)), host_blocks=160, write_ahead=40)
arrays = [np.empty(64, np.int64), np.empty(64, np.int64), np.empty((3, 64), np.int64), np.empty((3, 2, 32), np.int32)]
step = StepArrays(*arrays, np.empty(2, np.int32), np.empty(3, np.int32), np.empty((6, 2), np.int64))
rng, digest, known, fetches, spills = random.Random(1), hashlib.sha256(), [], [], []
served = 0
for _ in range(600):
    tokens = rng.choice(known)[: rng.randint(1, 60)] if known and rng.random() < 0.7 else []
    tokens = (tokens + [rng.randint(0, 9) for _ in range(rng.randint(1, 20))])[:64]
    known = [*known[-30:], tokens]
    fetches.append(manager.begin_fetch(tokens, num_blocks=rng.randint(0, 16)))
    digest.update(fetches[-1].blocks.tobytes())
    spills.append(manager.begin_spill(rng.randint(0, 9)))
    digest.update(spills[-1].blocks.tobytes() + repr(spills[-1].nodes).encode())
    if rng.random() < 0.5:
        spill = spills.pop(rng.randrange(len(spills)))
        manager.end_spill(spill, [rng.random() < 0.9 for _ in spill.blocks], [bytes(32)] * len(spill.nodes))
    fetch = None
    if len(fetches) > 3 or rng.random() < 0.5:
        fetch = fetches.pop(rng.randrange(len(fetches)))
        served += manager.end_fetch(fetch, rng.randint(0, len(fetch.blocks)))
    seq, cached = manager.admit(tokens, fetched=fetch)
    step_id = manager.prepare(seq, len(tokens) - cached, step)
    digest.update(repr((cached, manager.block_table(seq).tolist(), step.moves.tolist(), step.needs)).encode())
    manager.mark_moved(step.last_move)
    if rng.random() < 0.5:
        manager.landed(step.last_move)
    manager.commit(step_id)
    manager.free(seq)
manager.audit()
assert served > 500, served
print(digest.hexdigest())
"""


def test_two_processes_plan_the_same() -> None:
    made = [subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120) for _ in "ab"]
    assert [process.stderr for process in made] == ["", ""]
    assert made[0].stdout == made[1].stdout != ""


@needs_hooks
@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("slot_holds", 0, 1),
        ("slot_holds", 3, -1),
        ("slot_known", 3, 1),
        ("slot_passed", 0, 1),
        ("num_held", 0, 1),
        ("num_held", 0, -1),
        ("spill_size", 0, 1),
        ("spills", 4, 1),
        ("place", 1, 1),
        ("named", 3, 1),
        ("work_slot", 0, 1),
    ],
)
def test_audit_finds_broken_books_of_the_background(field: str, index: int, value: int) -> None:
    manager, step, spill = spilled()
    manager.end_spill(spill, [False] * 3)
    visit(manager, range(100, 112), step)
    fetch = manager.begin_fetch(range(50, 63), num_blocks=3)
    manager.begin_spill(1)
    poke: Callable[[BlockManager, str, int, int], None] = hook("_poke")
    manager.audit()
    poke(manager, field, index, value)
    with pytest.raises(InvariantViolation) as caught:
        manager.audit()
    assert caught.value.invariant in (10, 12)
    poke(manager, field, index, -value)
    manager.audit()
    manager.end_fetch(fetch, 0)


@needs_hooks
@pytest.mark.parametrize("states", [False, True])
def test_every_allocation_of_work_in_the_background_may_fail(states: bool) -> None:
    fail: Callable[[int], int] = hook("_fail_allocation")
    calls: list[Callable[[], object]]
    if states:
        manager, step = stateful()
        visit(manager, range(12), step)
        flush(manager, step)
        calls = [
            lambda: manager.begin_fetch(range(60, 73), num_blocks=3, checkpoints=[1, 3], extra=[(5, b"image")]),
            lambda: manager.begin_spill(8),
        ]
    else:
        manager, step, spill = spilled()
        manager.end_spill(spill, [False] * 3)
        visit(manager, range(100, 124), step)
        calls = [
            lambda: manager.begin_fetch(range(13), num_blocks=3, salt=b"tenant", extra=[(5, b"image")]),
            lambda: manager.begin_fetch(range(60, 73), num_blocks=3, extra=[(5, b"image")]),
            lambda: manager.begin_spill(8),
        ]

    def seen() -> Any:
        free = manager.num_free_host_blocks, manager.num_free_host_states
        return manager.stats(), free, manager.num_background_slots, manager.match(range(13))

    for call in calls:
        before, failures = seen(), 0
        while True:
            fail(failures)
            try:
                call()
                break
            except MemoryError:
                failures += 1
            finally:
                left = fail(-1)
            assert seen() == before
            manager.audit()
        assert left >= 0
        assert failures >= 5
        manager.audit()
