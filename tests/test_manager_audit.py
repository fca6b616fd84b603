"""The audit finds what is broken, and running out of memory breaks nothing: tests with planted faults."""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from manager_hooks import hook, needs_hooks

from kvblocks.config import Window
from kvblocks.errors import InvariantViolation
from kvblocks.manager import BlockManager, StepArrays
from kvblocks.step.buffers import StepBuffers

BLOCK = 4


def busy_manager(num_blocks: int = 32) -> tuple[BlockManager, dict[str, int]]:
    """Cached, published, shared, pinned and stepping blocks at once; the handles by name."""
    manager = BlockManager(num_blocks, BLOCK)
    step = StepBuffers(4, 64, 16)
    gone, _ = manager.admit(range(100, 112))
    manager.commit(manager.prepare([gone], 12, step))
    manager.free([gone])  # blocks 0, 1, 2 are cached; nodes 1, 2, 3
    first, _ = manager.admit(range(10))
    manager.commit(manager.prepare([first], 10, step))  # two published blocks, one partly filled
    child = manager.fork(first)[0]
    pin = manager.pin(range(8))
    other, _ = manager.admit([7, 7, 7])
    manager.append([first], [50])
    step_id = manager.prepare([first, other], [1, 3], step)  # the first row writes into a copy
    manager.mark_moved(step.last_move)
    manager.audit()
    return manager, {"first": first, "child": child, "pin": pin, "other": other, "step": step_id}


Poke = tuple[str, str | int, int]

SWAPPED: list[Poke] = [  # the cached blocks, 2 then 1 then 0, come as 1 then 2 then 0
    ("queue", 0, -1),
    ("queue", 1, 1),
    ("link", 2, 1),
    ("link", 1, -1),
]


@needs_hooks
@pytest.mark.parametrize(
    ("pokes", "invariant"),
    [
        ([("refs", "held", 1)], 1),
        ([("refs", "held", -1)], 1),
        ([("refs", 1, 1)], 1),
        ([("table", "other", 100)], 1),
        ([("num_rows", "other", -1)], 1),
        ([("num_cached", 0, 1)], 1),
        ([("link", 1, 1)], 1),
        ([("queue", 1, 1)], 1),
        ([("num_waiting", 0, 1)], 2),
        ([("block_node", "held", 1)], 3),
        ([("node_token", 2, 1)], 3),
        ([("node_hash", 2, 1)], 3),
        ([("node_parent", 2, 1)], 3),
        ([("node_block", 2, 1)], 3),
        ([("node_uses", 2, 1)], 3),
        ([("node_uses", 0, 5)], 3),
        ([("passed", 0, 1)], 3),
        ([("num_nodes", 0, 1)], 3),
        ([("last_node", "first", 1)], 3),
        (SWAPPED, 4),
        ([("reserved", "other", 4)], 5),
        ([("num_computed", "first", 1000)], 5),
        ([("row_start", 0, -8)], 6),
        ([("row_slot", 1, -3), ("row_start", 1, 8)], 7),
    ],
)
def test_audit_names_the_broken_invariant(pokes: list[Poke], invariant: int) -> None:
    manager, handles = busy_manager()
    places = {"held": int(manager.block_table(handles["first"])[0])} | handles
    for field, where, value in pokes:
        hook("_poke")(manager, field, places[where] if isinstance(where, str) else where, value)
    with pytest.raises(InvariantViolation, match=f"invariant {invariant}:") as caught:
        manager.audit()
    assert caught.value.invariant == invariant
    for field, where, value in pokes:
        hook("_poke")(manager, field, places[where] if isinstance(where, str) else where, -value)
    manager.audit()


def admit_again(manager: BlockManager, handles: dict[str, int], step: StepBuffers) -> None:
    manager.admit(range(100, 113))


def end_all(manager: BlockManager, handles: dict[str, int], step: StepBuffers) -> None:
    manager.commit(handles["step"])
    manager.unpin(handles["pin"])
    manager.free([handles["first"], handles["child"], handles["other"]])


def fill_the_pool(manager: BlockManager, handles: dict[str, int], step: StepBuffers) -> None:
    manager.admit([9] * BLOCK * manager.num_free_blocks)


@needs_hooks
@pytest.mark.parametrize(
    ("pokes", "call", "said"),
    [
        ([("refs", "held", -1)], end_all, "a block is held as often as it is released"),
        ([("refs", 0, -1)], admit_again, "a shared block is held or cached"),
        ([("link", 1, 1)], admit_again, "the queue has a cached block where the block says"),
        ([("refs", 0, 1)], fill_the_pool, "a block that is evicted is held by nobody"),
        ([("node_uses", 3, 1), ("node_block", 3, 5)], fill_the_pool, "a published block hangs on its node"),
    ],
)
def test_the_checked_build_stops_at_the_call_that_goes_wrong(
    pokes: list[Poke], call: Callable[[BlockManager, dict[str, int], StepBuffers], None], said: str
) -> None:
    """An assertion ends the process, so a child makes the call."""
    manager, handles = busy_manager()
    step = StepBuffers(4, 64, 16)
    places = {"held": int(manager.block_table(handles["first"])[0])} | handles
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 2)
            faulthandler.disable()
            try:
                for field, where, value in pokes:
                    hook("_poke")(manager, field, places[where] if isinstance(where, str) else where, value)
                call(manager, handles, step)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        assert f"assertion failed: {said}" in output.read().decode(errors="replace")
    assert os.WTERMSIG(status) == signal.SIGABRT


def observe(manager: BlockManager, handles: dict[str, int]) -> tuple[Any, ...]:
    seqs = [handles[name] for name in ("first", "child", "other")]
    return (
        manager.num_free_blocks,
        manager.num_sequences,
        manager.stats(),
        [column.tolist() for column in manager.lengths(seqs)],
        [manager.tokens(seq).tolist() for seq in seqs],
        [manager.block_table(seq).tolist() for seq in seqs],
        manager.match(range(12)),
        manager.match(range(100, 112)),
    )


long_prompt = np.arange(1000, 1020)

CALLS: dict[str, Callable[[BlockManager, dict[str, int], StepBuffers], Any]] = {
    "admit": lambda m, h, step: m.admit(long_prompt, salt=b"tenant", extra=[(1, b"x"), (9, b"y")]),
    "match": lambda m, h, step: m.match(list(range(12)), salt=b"s"),
    "can_admit": lambda m, h, step: m.can_admit(tuple(range(12)), extra=[(0, b"")]),
    "extend": lambda m, h, step: m.extend([h["first"], h["child"]], long_prompt, [12, 8]),
    "extend with extra": lambda m, h, step: m.extend(
        [h["first"], h["child"]], long_prompt, [12, 8], extra=[[(0, b"x"), (9, b"y")], [(7, b"z")]]
    ),
    "append": lambda m, h, step: m.append([h["first"], h["other"]]),
    "append with extra": lambda m, h, step: m.append([h["first"], h["other"]], [1, 2], extra=[[(0, b"x")], []]),
    "prepare": lambda m, h, step: m.prepare([h["child"]], [41], step),
    "fork": lambda m, h, step: m.fork(h["child"], 3),
    "reorder": lambda m, h, step: m.reorder([h["child"], h["second"]], [h["second"], h["child"]]),
    "pin": lambda m, h, step: m.pin(range(100, 112)),
    "resume": lambda m, h, step: m.resume(h["second"]),
    "set_tokens": lambda m, h, step: m.set_tokens([h["first"]], (5,)),
    "commit": lambda m, h, step: m.commit(h["step"], [1, 3]),
    "free": lambda m, h, step: m.free([h["child"], h["first"]]),
    "abort": lambda m, h, step: m.abort(h["step"]),
    "mark_moved": lambda m, h, step: m.mark_moved(1),
    "trim": lambda m, h, step: m.trim(h["child"], 5),
    "preempt": lambda m, h, step: m.preempt(h["second"]),
    "unpin": lambda m, h, step: m.unpin(h["pin"]),
    "reset_prefix_cache": lambda m, h, step: m.reset_prefix_cache(),
    "blocks_needed": lambda m, h, step: m.blocks_needed(10_000, reserve=64, max_new_tokens=300),
    "block_table": lambda m, h, step: m.block_table(h["first"]),
    "tokens": lambda m, h, step: m.tokens(h["first"]),
    "lengths": lambda m, h, step: m.lengths([h["first"], h["other"]]),
    "stats": lambda m, h, step: m.stats(),
    "audit": lambda m, h, step: m.audit(),
    "repr": lambda m, h, step: repr(m),
}
# What makes no object of Python, and what takes no memory of C besides: calls that are given no list.
NO_OBJECT = {"append", "commit", "free", "mark_moved", "abort", "trim", "preempt", "unpin", "reset_prefix_cache"}
NO_OBJECT |= {"audit"}
NO_MEMORY = {
    "append",
    "mark_moved",
    "abort",
    "trim",
    "preempt",
    "unpin",
    "reset_prefix_cache",
    "blocks_needed",
    "stats",
}
NO_MEMORY |= {"block_table", "tokens", "repr"}


def ready_for(name: str) -> tuple[BlockManager, dict[str, int], StepBuffers]:
    """A busy manager on which the call of that name succeeds, and has to allocate where it can."""
    manager, handles = busy_manager(300 if name == "resume" else 32)
    step = StepBuffers(4, 64, 16)
    handles["second"], _ = manager.admit(np.arange(60, 69))
    manager.append([handles["child"]], [3])
    if name == "resume":  # its result is past the small integers that Python keeps
        manager.commit(handles["step"])
        manager.extend([handles["second"]], np.arange(300), [300])
        manager.commit(manager.prepare([handles["second"]], 309, StepBuffers(1, 309, 80)))
        manager.preempt(handles["second"])
        manager.extend([handles["second"]], np.arange(640), [640])  # its table has to grow
    if name == "set_tokens":
        manager.append([handles["first"]])
    if name == "prepare":  # its table has to grow, and its result is no small integer either
        manager.extend([handles["child"]], np.arange(40), [40])
        for _ in range(256):
            manager.abort(manager.prepare([handles["second"]], 1, step))
    return manager, handles, step


@pytest.fixture
def allocations() -> Iterator[Callable[[int], int]]:
    fail_allocation = hook("_fail_allocation")
    yield fail_allocation
    fail_allocation(-1)


@needs_hooks
@pytest.mark.parametrize("name", CALLS)
def test_every_allocation_may_fail(name: str, allocations: Callable[[int], int]) -> None:
    """Each allocation of a call fails in turn: MemoryError, nothing changed; the same call then works."""
    failures = 0
    while True:
        manager, handles, step = ready_for(name)
        before = observe(manager, handles)
        allocations(failures)
        try:
            CALLS[name](manager, handles, step)
        except MemoryError:
            allocations(-1)
            assert observe(manager, handles) == before
            manager.audit()
            failures += 1
            CALLS[name](manager, handles, step)
            manager.audit()
            continue
        left = allocations(-1)
        manager.audit()
        assert left >= 0, "the call made an allocation that was not counted"
        break
    least = {"fork": 2, "reorder": 5, "admit": 5, "prepare": 2}
    assert failures >= least.get(name, name not in NO_MEMORY)


@pytest.mark.parametrize("name", CALLS)
def test_every_allocation_of_python_may_fail(name: str) -> None:
    """As above for the objects that a call makes, its result among them."""
    testcapi = pytest.importorskip("_testcapi")
    failures = 0
    while True:
        manager, handles, step = ready_for(name)
        call = CALLS[name]
        before = observe(manager, handles)
        failed = False
        testcapi.set_nomemory(failures, 0)
        try:
            call(manager, handles, step)
        except MemoryError:
            failed = True
        finally:
            testcapi.remove_mem_hooks()
        manager.audit()
        if not failed:
            break
        now = observe(manager, handles)  # the peak was reached, if for no longer than the call
        assert (*now[:2], now[2]._replace(peak_used_blocks=before[2].peak_used_blocks), *now[3:]) == before
        failures += 1
        call(manager, handles, step)
        manager.audit()
    assert failures or name in NO_OBJECT


@needs_hooks
def test_every_allocation_of_a_new_manager_may_fail(allocations: Callable[[int], int]) -> None:
    arrays = [np.zeros(size, np.int64) for size in (8, 8, 8)] + [np.zeros((2, 4), np.int32), np.zeros(2, np.int32)]
    arrays += [np.zeros(3, np.int32), np.zeros((2, 2), np.int64)]
    busy = busy_manager()
    makers: list[Callable[[], object]] = [
        lambda: BlockManager(100, 4, groups=(None, Window(9))),
        lambda: BlockManager(1_000_000, 16, prefix_caching=False),
        lambda: StepArrays(*arrays),
        lambda: busy[0].audit(),
    ]
    for make in makers:
        failures = 0
        while True:
            allocations(failures)
            try:
                make()
            except MemoryError:
                failures += 1
                continue
            finally:
                left = allocations(-1)
            assert left >= 0
            break
        assert failures >= 1


@needs_hooks
def test_what_must_not_fail_allocates_nothing(allocations: Callable[[int], int]) -> None:
    manager, handles = busy_manager()
    allocations(0)
    manager.commit(handles["step"])
    manager.trim(handles["first"], 9)
    manager.preempt(handles["first"])
    manager.free(handles["child"])  # one handle: no list to convert
    manager.unpin(handles["pin"])
    assert allocations(-1) == 0
    manager.audit()
    manager, handles = busy_manager()
    allocations(0)
    manager.abort(handles["step"])
    assert allocations(-1) == 0
    manager.audit()
