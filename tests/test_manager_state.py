"""The compiled block manager against its plain-Python model: the state machine, hits, wrong handles, threads."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manager_compiled import COMPILED, make_step, read_step
from manager_device import Device, Truth, first_reached
from manager_machine import GROUPS, MODEL, Driver, machine_for, plain

from kvblocks.config import Window
from kvblocks.errors import MovesPending, NoFreeBlocks, StaleSequence, TooManySequences
from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers

THREADS = 6
ROUNDS = 400
PATIENCE_S = 60


class TestStateMachine(machine_for(COMPILED).TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=2 * settings().max_examples,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Hits


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple[list[int], bytes, list[tuple[int, bytes]]]]:
    """Prompts that share prefixes, with few salts and marks."""
    made: list[tuple[list[int], bytes, list[tuple[int, bytes]]]] = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
        salt = draw(st.sampled_from([b"", b"", b"a"]))
        extra: list[tuple[int, bytes]] = []
        continues = draw(st.booleans())
        if made and continues:
            old, salt, extra = draw(st.sampled_from(made))
            tokens = old[: draw(st.integers(0, len(old)))] + tokens
        if draw(st.booleans()):
            extra = [(draw(st.integers(0, len(tokens) - 1)), draw(st.sampled_from([b"x", b"y"])))]
        made.append((tokens, salt, [mark for mark in extra if mark[0] < len(tokens)]))
    return made


@pytest.mark.parametrize("driver", [COMPILED, MODEL], ids=["compiled", "model"])
@given(prompts=prompts(), block_size=st.integers(1, 4), groups=st.sampled_from(GROUPS), data=st.data())
def test_hits_are_what_a_trie_of_computed_prefixes_gives(
    driver: Driver,
    prompts: list[tuple[list[int], bytes, list[tuple[int, bytes]]]],
    block_size: int,
    groups: tuple[Any, ...],
    data: st.DataObject,
) -> None:
    """In a pool that never evicts, also what slid out of a window is found again."""
    manager = driver.manager(256 * len(groups), block_size, groups=groups)
    step = driver.step(1, 64, 64, len(groups))
    computed: set[Any] = set()  # every prefix of whole blocks that went through a step
    for tokens, salt, extra in prompts:

        def prefix(
            num_blocks: int, tokens: list[int] = tokens, salt: bytes = salt, extra: list[tuple[int, bytes]] = extra
        ) -> Any:
            end = num_blocks * block_size
            return salt, tuple(tokens[:end]), tuple(mark for mark in extra if mark[0] < end)

        expected = 0
        while (expected + 1) * block_size < len(tokens) and prefix(expected + 1) in computed:
            expected += 1
        assert manager.match(tokens, salt=salt, extra=extra) == expected * block_size
        seq, cached = manager.admit(tokens, salt=salt, extra=extra)
        assert cached == expected * block_size
        end = data.draw(st.integers(cached, len(tokens)))
        while cached < end:
            chunk = data.draw(st.integers(1, end - cached))
            accepted = data.draw(st.integers(0, chunk))
            manager.commit(manager.prepare([seq], [chunk], step), [accepted])
            cached += accepted
            if accepted < chunk:
                break  # what was not accepted is gone, and the rest of the prompt with it
        computed |= {prefix(n) for n in range(1, cached // block_size + 1)}
        if data.draw(st.booleans()):
            manager.free(seq)
        manager.audit()


class Served:
    """A small pool, whose K/V are played as they are written: a block is there as long as nothing was written over it.

    That is the oracle for hits in groups of different reach, as whatever is computed is published, and free blocks that
    are not are taken before one that is.
    """

    def __init__(self, driver: Driver, num_blocks: int, block_size: int, groups: tuple[Any, ...]) -> None:
        self.driver, self.block_size, self.groups = driver, block_size, groups
        self.manager = driver.manager(num_blocks, block_size, groups=groups, max_nodes=1000)
        self.step = driver.step(1, 64, 64, len(groups))
        self.device = Device(block_size, groups)

    def names(self, tokens: list[int]) -> list[int]:
        return self.device.identities(Truth(b"", tokens, {}, 0))

    def expected_hit(self, tokens: list[int]) -> int:
        size, slots = self.block_size, self.device.slots
        blocks = range(self.manager.num_blocks)
        there = {tuple(slots.get(b * size + i) for i in range(size)) for b in blocks}
        names = self.names(tokens)

        def serves(hit: int) -> bool:
            return all(
                tuple((g, name) for name in names[row * size : (row + 1) * size]) in there
                for g, reach in enumerate(self.groups)
                for row in range(first_reached(reach, hit) // size, hit // size)
            )

        return max(hit for hit in range(0, len(tokens), size) if serves(hit))

    def serve(self, tokens: list[int], chunks: list[int]) -> int:
        found = self.manager.match(tokens)
        assert found == self.expected_hit(tokens)
        seq, cached = self.manager.admit(tokens, reserve=0)
        rows = -(-len(tokens) // self.block_size) * len(self.groups)
        assert cached == found or (cached < found and rows > self.manager.num_blocks)  # what follows would not fit
        names = self.names(tokens)
        while cached < len(tokens):
            chunk = min(len(tokens) - cached, chunks.pop() if chunks else len(tokens))
            try:
                step_id = self.manager.prepare([seq], [chunk], self.step)
            except NoFreeBlocks:
                self.manager.free(seq)
                return 0
            view = self.driver.read(self.step)
            for g, written in enumerate(view.slot_mapping):
                for i in range(chunk):
                    block, offset = divmod(written[i], self.block_size)
                    for later in range(offset, self.block_size):  # what was there before is over with its first token
                        self.device.slots.pop(block * self.block_size + later, None)
                    self.device.slots[written[i]] = g, names[cached + i]
            self.manager.commit(step_id)
            cached += chunk
        self.manager.audit()
        return int(seq)


@pytest.mark.parametrize("driver", [COMPILED, MODEL], ids=["compiled", "model"])
@given(
    prompts=prompts(),
    block_size=st.integers(1, 3),
    groups=st.sampled_from([groups for groups in GROUPS if groups != (None,)]),
    num_blocks=st.integers(4, 16),
    data=st.data(),
)
def test_hits_in_groups_are_what_the_memory_still_holds(
    driver: Driver,
    prompts: list[tuple[list[int], bytes, list[tuple[int, bytes]]]],
    block_size: int,
    groups: tuple[Any, ...],
    num_blocks: int,
    data: st.DataObject,
) -> None:
    served = Served(driver, num_blocks, block_size, groups)
    live: list[int] = []
    texts = [tokens for tokens, _, _ in prompts]
    for tokens in texts * 2:
        seq = served.serve(tokens, data.draw(st.lists(st.integers(1, 5), max_size=4)))
        live += [seq] if seq else []
        while live and (not seq or data.draw(st.integers(0, 1))):
            served.manager.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        for asked in texts:
            assert served.manager.match(asked) == served.expected_hit(asked)


# Handles


def visible(manager: Any, handles: list[int]) -> Any:
    tables = [plain(manager.block_table(h)) + plain(manager.tokens(h)) for h in handles]
    return manager.num_free_blocks, manager.num_sequences, manager.stats(), plain(manager.lengths(handles)), tables


@given(st.data())
def test_a_handle_that_was_not_given_out_is_refused_by_every_call(data: st.DataObject) -> None:
    manager, step = BlockManager(16, 2, max_seqs=6), make_step(4, 16, 8)
    live = [manager.admit([1, 2, 3])[0] for _ in range(3)]
    manager.commit(manager.prepare(live, [3, 3, 3], step))
    manager.free(live.pop(1))
    live.append(manager.admit([4])[0])
    manager.append(live, [7, 7, 7])
    near = st.builds(lambda h, slot, age: h + slot + (age << 24), st.sampled_from(live), *[st.integers(-9, 9)] * 2)
    wrong = data.draw(st.one_of(near, st.integers(-(2**63), 2**63 - 1)).filter(lambda h: h not in live))
    batch = [live[0], wrong, live[1]]
    before = visible(manager, live)
    calls: list[Callable[[], object]] = [
        lambda: manager.append(batch, [1, 1, 1]),
        lambda: manager.append(np.array(batch)),
        lambda: manager.extend(batch, [1, 1, 1], [1, 1, 1]),
        lambda: manager.set_tokens([wrong], [1]),
        lambda: manager.prepare(batch, [1, 1, 1], step),
        lambda: manager.trim(wrong, 0),
        lambda: manager.fork(wrong),
        lambda: manager.reorder(batch, live),
        lambda: manager.reorder(live, batch),
        lambda: manager.free(wrong),
        lambda: manager.free(batch),
        lambda: manager.preempt(wrong),
        lambda: manager.resume(wrong),
        lambda: manager.unpin(wrong),
        lambda: manager.block_table(wrong),
        lambda: manager.tokens(wrong),
        lambda: manager.lengths(batch),
    ]
    for call in calls:
        with pytest.raises(StaleSequence) as caught:
            call()
        assert caught.value.handle == wrong
    assert visible(manager, live) == before
    manager.audit()


def test_arguments_come_as_lists_arrays_and_tensors() -> None:
    frozen = np.array([1, 2, 3, 4, 5])
    frozen.flags.writeable = False
    kinds: list[Callable[[list[int]], Any]] = [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda values: np.array(values, np.int32) if max(values) < 2**31 else np.array(values),
        lambda values: np.repeat(values, 3)[::3],
        lambda values: torch.tensor(values).repeat_interleave(2)[::2],
    ]
    manager, step = BlockManager(64, 4), make_step(4, 64, 8)
    assert manager.match(frozen) == 0
    for kind in kinds:
        a = manager.admit(kind([1, 2, 3, 4, 5]))[0]
        b = manager.admit(kind([6]))[0]
        manager.append(kind([a, b]), kind([7, 8]))
        manager.extend(kind([a, b]), None, kind([1, 2]))
        manager.set_tokens(kind([b, a]), kind([9, 10, 11]), kind([2, 1]))
        assert plain(manager.tokens(a)) == [1, 2, 3, 4, 5, 7, 11]
        assert plain(manager.tokens(b)) == [6, 8, 9, 10]
        lens = [n - c for n, c in zip(*(plain(manager.lengths(kind([a, b])))[i] for i in (3, 1)), strict=True)]
        manager.commit(manager.prepare(kind([a, b]), kind(lens), step), kind(lens))
        manager.reorder(kind([a]), kind([b]))
        assert plain(manager.tokens(a)) == [6, 8, 9, 10]
        manager.free(kind([a, b]))
        manager.audit()


@pytest.mark.parametrize(
    "wrong",
    ["12", 1.0, [1.0], [None], None, [[1]], np.ones(2), np.ones((1, 2), np.int64), np.ones(2, bool), torch.ones(2), {}],
    ids=repr,
)
def test_anything_else_is_a_type_error(wrong: Any) -> None:
    manager, step = BlockManager(8, 2), make_step(2, 8, 4)
    seq = manager.admit([1, 2])[0]
    before = visible(manager, [seq])
    calls: list[Callable[[], object]] = [
        lambda: manager.admit(wrong),
        lambda: manager.match(wrong),
        lambda: manager.can_admit(wrong),
        lambda: manager.pin(wrong),
        lambda: manager.append(wrong, [1]),
        lambda: manager.extend([seq], wrong, [1]) if wrong is not None else manager.extend([seq], [1], wrong),  # type: ignore[arg-type]
        lambda: manager.extend([seq], [1], wrong),
        lambda: manager.set_tokens([seq], wrong),
        lambda: manager.prepare(wrong, [1], step),
        lambda: manager.prepare([seq], wrong, step),
        lambda: manager.free(wrong),
        lambda: manager.reorder(wrong, wrong),
        lambda: manager.lengths(wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert visible(manager, [seq]) == before


@given(lens=st.lists(st.integers(1, 13), min_size=1, max_size=5), block_size=st.integers(1, 5), data=st.data())
def test_pages_are_the_block_tables_in_another_form(lens: list[int], block_size: int, data: st.DataObject) -> None:
    manager, step = BlockManager(80, block_size), StepBuffers(6, 80, 13, kv_indices=True)
    seqs = [manager.admit([1] * n)[0] for n in lens]
    for batch in (seqs, seqs[:1]):  # the second leaves padding where the first wrote
        ends = [n if data.draw(st.booleans()) else data.draw(st.integers(1, n)) for n in lens[: len(batch)]]
        manager.abort(manager.prepare(batch, ends, step))
        assert step.kv_indptr is not None
        assert step.kv_indices is not None
        assert step.kv_last_page_len is not None
        starts, pages, last = step.kv_indptr.tolist(), step.kv_indices.tolist(), step.kv_last_page_len.tolist()
        assert starts[0] == 0
        for i, (seq, end) in enumerate(zip(batch, ends, strict=True)):
            num_pages = -(-end // block_size)
            assert pages[starts[i] : starts[i + 1]] == plain(manager.block_table(seq))[:num_pages]
            assert starts[i + 1] - starts[i] == num_pages
            assert (num_pages - 1) * block_size + last[i] == end
        assert set(starts[len(batch) :]) == {starts[len(batch)]}
        assert not any(last[len(batch) :])


# Threads


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as Python can let them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


class Worker(threading.Thread):
    """Serves requests of its own on a shared manager, and reads back what it wrote to the shared K/V."""

    def __init__(self, number: int, manager: BlockManager, device: Device, deadline: float) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.rng = Random(number)
        self.manager = manager
        self.device = device
        self.deadline = deadline
        self.step = make_step(2, 64, 16, len(manager.groups))
        self.admitted = 0
        self.hit_tokens = 0
        self.prompt_tokens = 0
        self.preempted = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(ROUNDS):
                self.serve()
        except BaseException as error:
            self.error = error

    def until(self, call: Callable[[], Any], *busy: type[Exception]) -> Any:
        """Again and again while the others hold what the call needs."""
        while True:
            try:
                return call()
            except busy:
                if time.monotonic() > self.deadline:
                    raise
                time.sleep(0)

    def serve(self) -> None:
        manager, rng = self.manager, self.rng
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
        seq, cached = self.until(lambda: manager.admit(tokens), NoFreeBlocks, TooManySequences)
        self.admitted += 1
        self.prompt_tokens += len(tokens)
        self.hit_tokens += cached
        truth = Truth(b"", tokens, {}, 0)
        while cached < len(tokens):
            chunk = rng.randint(1, len(tokens) - cached)
            self.compute([seq], [truth], [cached], [chunk])
            cached += chunk
        children: list[int] = []
        try:
            children = manager.fork(seq)
            twin = truth.copy()
            manager.append([seq, *children], [0, 1])
            truth.tokens.append(0)
            twin.tokens.append(1)
            self.compute([seq, *children], [truth, twin], [cached, cached], [1, 1])
        except (NoFreeBlocks, TooManySequences):
            manager.preempt(seq)
            self.preempted += 1
        assert plain(manager.tokens(seq)) == truth.tokens
        manager.free([seq, *children])

    def compute(self, seqs: list[int], truths: list[Truth], starts: list[int], lens: list[int]) -> None:
        """One step; only the oldest can be committed, so the others may have to come first."""
        while True:
            try:
                step_id = self.manager.prepare(seqs, lens, self.step)
                break
            except MovesPending:  # another thread has prepared a step and is about to copy what that needs
                time.sleep(0)
        view = read_step(self.step)
        self.device.copy_blocks(view.copies)
        self.manager.mark_moved(self.step.last_move)
        for i, truth in enumerate(truths):
            names = self.device.identities(truth)
            tables = [table[i] for table in view.block_table]
            self.device.check(tables, names[: starts[i]], starts[i], f"{self.name}, row {i}")
            for g, slots in enumerate(view.slot_mapping):
                for j in range(lens[i]):
                    self.device.slots[slots[view.query_start_loc[i] + j]] = g, names[starts[i] + j]
        self.until(lambda: self.manager.commit(step_id), ValueError)


@pytest.mark.parametrize("groups", [(None,), (None, Window(5))], ids=["one group", "two groups"])
def test_threads_lose_nothing_and_never_read_each_other(groups: tuple[Window | None, ...]) -> None:
    manager = BlockManager(8 * THREADS * len(groups), 2, groups=groups, max_seqs=THREADS + 3, max_open_steps=THREADS)
    device = Device(2, groups)
    deadline = time.monotonic() + PATIENCE_S
    workers = [Worker(number, manager, device, deadline) for number in range(THREADS)]
    with eager_switching():
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            manager.audit()  # also in the middle of it
            assert 0.0 <= manager.usage <= 1.0
            time.sleep(0.01)
    errors = [worker.error for worker in workers if worker.error is not None]
    assert not errors
    manager.audit()
    stats = manager.stats()
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_sequences == 0
    assert stats.admitted == THREADS * ROUNDS == sum(worker.admitted for worker in workers)
    assert stats.prompt_tokens == sum(worker.prompt_tokens for worker in workers)
    assert stats.hit_tokens == sum(worker.hit_tokens for worker in workers) > 0
    assert stats.preemptions == sum(worker.preempted for worker in workers) > 0
    assert stats.copies > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_process_is_not_kept_waiting_by_a_thread_that_it_does_not_have() -> None:
    """The lock is held nearly all the time, as each of the threads walks a long way through the prefix tree."""
    prompt = np.arange(200_000, dtype=np.int32)
    manager, step = BlockManager(13_000, 16), StepBuffers(1, len(prompt), 12_500)
    seq, _ = manager.admit(prompt)
    manager.commit(manager.prepare([seq], len(prompt), step))
    done = threading.Event()

    def busy() -> None:
        while not done.is_set():
            manager.match(prompt)

    workers = [threading.Thread(target=busy) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any fork beside threads
            children = []
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    signal.alarm(5)  # a child that hangs ends with an error
                    os._exit(0 if manager.num_sequences == 1 and len(manager.tokens(seq)) == len(prompt) else 1)
                children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    finally:
        done.set()
        for worker in workers:
            worker.join()
    manager.audit()


FORKS = """
import os, signal, sys, threading
from kvblocks.manager import BlockManager
kept = [BlockManager(2, 1, max_seqs=4) for _ in range(300)]
def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
for i in range(500):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + i % 100 * 2e-6)
        fork()
    except (KeyboardInterrupt, ChildProcessError):
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
def make():
    while True:
        BlockManager(2, 1, max_seqs=4)
sys.setswitchinterval(1e-5)
threading.Thread(target=make, daemon=True).start()
for _ in range(100):
    fork()
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_leaves_no_lock_behind_whatever_comes_in_between() -> None:
    """Managers that another thread makes, and a signal whose handler raises."""
    made = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert made.stdout == "done\n", made.stderr
