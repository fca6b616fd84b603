"""A process with a cache, as `Tiers` sees it: blocks and states by identity, threads and clocks that a test moves.

Nothing runs by itself. `StagedWorkers` runs one part of one job when it is told to, and a call of a `StagedStore` may
stop halfway and go on later, so that all orders of events come from one seed.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from faulty_store import Fault, FaultyStore, StoreDied

from kvblocks.config import Chunk, State, Window
from kvblocks.errors import NoFreeBlocks, NoFreeStates
from kvblocks.manager import BlockManager
from kvblocks.sizes import HEADER_BYTES
from kvblocks.step.buffers import StepBuffers
from kvblocks.storage.host import HostArena
from kvblocks.tiers import Tiers
from kvblocks.tiers.fetches import first_block
from kvblocks.tiers.objects import ObjectFormat, fault_of, read_header
from kvblocks.tiers.tiers import Agree, Ticket
from kvblocks.tiers.workers import Job, Task, Workers

Reach = Window | Chunk | None

PAYLOADS = (64, 32, 96)  # bytes of a block of each group
STATE_BYTES = 80
DEADLINE = 1.0


def identity(
    weights: int, salt: bytes, tokens: Sequence[int], extra: dict[int, bytes], group: int, num_bytes: int
) -> bytes:
    """What the block of a group that ends these tokens holds, or the state after them."""
    marks = sorted((position, data) for position, data in extra.items() if position < len(tokens))
    digest = hashlib.sha256(repr((weights, salt, list(tokens), marks, group)).encode()).digest()
    return (digest * 3)[:num_bytes]


class Stage:
    """Calls that have stopped halfway."""

    def __init__(self) -> None:
        self.stopped: list[_Part] = []
        self.is_dead = False
        self.current: _Part | None = None  # the part that runs on a thread of its own

    def stop(self) -> None:
        """Called from inside a part: let others go on before it does; a part that cannot stop goes on."""
        part = self.current
        if part is None or threading.current_thread() is threading.main_thread():
            return
        self.stopped.append(part)
        part.give_back.release()
        part.go_on.acquire()
        if self.is_dead:
            raise StoreDied("the process is gone")

    def run(self, work: Callable[[], None], *, may_stop: bool) -> None:
        if not may_stop:
            work()
            return
        part = _Part(work)
        self.resume(part)

    def die(self) -> None:
        """The process ends: calls that have stopped do nothing more."""
        self.is_dead = True
        while self.stopped:
            self.resume(self.stopped.pop())

    def resume(self, part: "_Part") -> None:
        before, self.current = self.current, part
        part.resume()
        self.current = before


class _Part:
    """Work on a thread of its own; that thread and the caller's never run at the same time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.give_back, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self._work: Callable[[], None] | None = work

    def resume(self) -> None:
        if self._work is not None:
            work, self._work = self._work, None

            def run() -> None:
                try:
                    work()
                finally:
                    self.give_back.release()

            threading.Thread(target=run, daemon=True).start()
        else:
            self.go_on.release()
        self.give_back.acquire()


class StagedWorkers(Workers):
    """Runs parts of jobs one at a time, in an order that is drawn."""

    def __init__(self, lanes: int, rng: Random) -> None:
        super().__init__([0] * lanes)
        self.stage = Stage()
        self.rng = rng
        self.ready: list[tuple[Task, Job]] = []
        self.chance_to_stop = 0.0

    @property
    def idle(self) -> bool:
        return not self.ready and not self.stage.stopped

    def start(self, task: Task, jobs: list[tuple[int, Job]]) -> None:
        task.expect(len(jobs))
        self.ready += [(task, job) for _, job in jobs]

    def wait(self, seconds: float) -> None:
        self.run_one(1.0)

    def close(self) -> None:
        self.ready.clear()

    def run_one(self, resuming: float) -> None:
        """Go on with a call that has stopped, with some chance, or else run a part of a job that waits."""
        stopped = self.stage.stopped
        if stopped and self.rng.random() < resuming:
            self.stage.resume(stopped.pop(self.rng.randrange(len(stopped))))
        elif self.ready:
            task, job = self.ready.pop(self.rng.randrange(len(self.ready)))
            self.stage.run(lambda: self._part(task, job), may_stop=self.rng.random() < self.chance_to_stop)

    def finish(self) -> None:
        while not self.idle:
            self.run_one(1.0)

    def _part(self, task: Task, job: Job) -> None:
        if task.run(job) is not None:
            self.ready.append((task, job))


class StagedStore(FaultyStore):
    """A faulty store whose calls stop instead of sleeping. Several processes may use it, one after the other."""

    stage: Stage | None = None

    @property
    def chance_to_stop(self) -> float:
        """How many calls have to be made where they can stop."""
        return 1.0 if self.script else 0.3 * any(self._chances.get(fault) for fault in (Fault.SLOW, Fault.HANG))

    def _pause(self, fault: Fault) -> None:
        if self.stage is not None:
            self.stage.stop()


class StagedTiers(Tiers):
    """`Tiers` on staged workers and a clock that its test moves."""

    world: "World"

    def __init__(self, world: "World", *args: Any, **kwargs: Any) -> None:
        self.world = world
        super().__init__(*args, **kwargs)

    def _make_clock(self) -> Callable[[], float]:
        return lambda: self.world.now

    def _make_workers(self, threads: int) -> Workers:
        if hasattr(self.world, "workers"):
            return self.world.workers  # the same for fetches and spills
        self.world.workers = workers = StagedWorkers(len(self._stores) + 1, self.world.rng)
        for guarded in self._stores:
            if isinstance(guarded.store, StagedStore):
                guarded.store.stage = workers.stage
                workers.chance_to_stop = max(workers.chance_to_stop, guarded.store.chance_to_stop)
        return workers


class FakeEngine:
    """Blocks and states as bytes. Moves are done at once, and known to have landed later."""

    def __init__(self, manager: BlockManager, rng: Random, lag: float = 0.0) -> None:
        self.manager, self.rng, self.lag = manager, rng, lag
        self.device = torch.device("cpu")
        self.sizes = PAYLOADS[: len(manager.groups)]
        self.arena = HostArena(manager.host_blocks, max(self.sizes), pinned=False)
        self.state_arena = HostArena(manager.host_states, STATE_BYTES, pinned=False) if manager.host_states else None
        self.blocks: dict[int, bytes] = {}
        self.states: dict[int, bytes] = {}
        self.made = self.known = 0

    def group_bytes(self, group: int) -> int:
        return self.sizes[group]

    def landed(self) -> int:
        if self.rng.random() >= self.lag:
            self.known = self.made
        return self.known

    def move(self, step: StepBuffers) -> None:
        for loads, group, source, target in step.moves.tolist():
            block, slot = (target, source) if loads else (source, target)
            if group < len(self.sizes):
                held, payload = self.blocks, self.arena.object(slot, self.sizes[group])[HEADER_BYTES:]
            else:
                assert self.state_arena is not None
                held, payload = self.states, self.state_arena.object(slot, STATE_BYTES)[HEADER_BYTES:]
            if loads:
                held[block] = bytes(payload)
            else:
                payload[:] = held[block][: len(payload)]
        for source, target in step.copies.tolist():
            self.blocks[target] = self.blocks[source]
        if step.state_zero is not None and step.state_copies is not None:
            self.states.update(dict.fromkeys(step.state_zero[: step.num_state_zero].tolist(), bytes(STATE_BYTES)))
            for source, target in step.state_copies.tolist():
                self.states[target] = self.states[source]
        if step.last_move:
            self.made = step.last_move
            self.manager.mark_moved(self.made)


class World:
    """One process: it serves prompts, and checks every cached block, and every state, that they read.

    Args:
        every: tokens from one checkpoint of a state to the next; 0 for no states, and no slots for them.

    Attributes:
        now: what its clock says.
        weights: which model it runs.
        truth: what each object that a store may hold must be, by namespace, digest and group; shared by processes.
        log: what the manager handed out, in order.
    """

    def __init__(
        self,
        stores: Sequence[Any],
        rng: Random,
        *,
        groups: Sequence[Reach] = (None,),
        every: int = 0,
        num_states: int = 6,
        host_states: int = 16,
        num_blocks: int = 24,
        host_blocks: int = 32,
        block_size: int = 2,
        weights: int = 0,
        truth: dict[tuple[str, bytes, int], bytes] | None = None,
        secret: bytes | None = None,
        tiers: type[StagedTiers] = StagedTiers,
        lag: float = 0.3,
    ) -> None:
        self.rng = rng
        self.groups, self.block_size, self.weights = tuple(groups), block_size, weights
        self.now = 0.0
        self.secret = secret
        self.workers: StagedWorkers
        self.truth = {} if truth is None else truth
        self.log: list[Any] = []
        options: dict[str, Any] = {"num_states": num_states, "host_states": host_states} if every else {}
        self.manager = BlockManager(
            num_blocks,
            block_size,
            groups=(*self.groups, State(every)) if every else self.groups,
            host_blocks=host_blocks,
            max_seqs=64,
            **options,
        )
        self.engine = FakeEngine(self.manager, rng, lag)
        self.step = StepBuffers(1, 512, 256, groups=len(self.groups), states=bool(every))
        self.tiers = tiers(
            self,
            self.manager,
            self.engine,
            stores,
            namespace=self.namespace(weights),
            secret=secret,
            deadline=DEADLINE,
        )
        self.held: list[int] = []

    @staticmethod
    def namespace(weights: int) -> str:
        return hashlib.sha256(b"%d" % weights).hexdigest()

    def poll(self, agree: Agree | None = None) -> None:
        self.tiers.poll(agree)

    def fetch(self, tokens: Sequence[int], salt: bytes = b"", extra: Sequence[tuple[int, bytes]] = ()) -> Ticket:
        self._learn(tokens, salt, extra)
        return self.tiers.fetch(list(tokens), salt=salt, extra=list(extra))

    def serve(
        self,
        tokens: Sequence[int],
        salt: bytes = b"",
        extra: Sequence[tuple[int, bytes]] = (),
        fetched: Any = None,
    ) -> int | None:
        """Admit a prompt, check what it finds, compute the rest; returns the cached tokens, None where it has no room.

        The sequence is held afterwards; `free` lets it go.
        """
        self._learn(tokens, salt, extra)
        try:
            seq, cached = self.manager.admit(list(tokens), salt=salt, extra=list(extra), fetched=fetched)
        except NoFreeBlocks:
            if fetched is not None:
                self.manager.release(fetched)
            return None
        self.held.append(seq)
        marks, computed = dict(extra), int(cached)
        while computed < len(tokens):  # a pass ends at the last checkpoint
            end = self.manager.next_checkpoint(seq) or len(tokens)
            try:
                step_id = self.manager.prepare([seq], [end - computed], self.step)
            except NoFreeStates:
                break
            self.engine.move(self.step)
            if computed == cached:
                tables = np.array(self.manager.block_table(seq)).reshape(len(self.groups), -1).tolist()
                self.log.append(("admit", cached, tables))
                self._check_hit(tables, salt, tokens, marks, computed)
            if self.engine.state_arena is not None:
                assert self.step.state_slots is not None
                [slot] = self.step.state_slots[:1].tolist()
                right = self._state(salt, tokens[:computed], marks)
                assert self.engine.states[slot] == right, f"the state after {computed} of {tokens} has other bytes"
                self.engine.states[slot] = self._state(salt, tokens[:end], marks)
            self.manager.commit(step_id)
            computed = end
        return int(cached)

    def _check_hit(
        self, tables: list[list[int]], salt: bytes, tokens: Sequence[int], marks: dict[int, bytes], cached: int
    ) -> None:
        """Check the cached blocks that a sequence reads, and write the others, as its passes will."""
        for group, (reach, table) in enumerate(zip(self.groups, tables, strict=True)):
            for index in range(len(tokens) // self.block_size):
                content = self._block(salt, tokens[: (index + 1) * self.block_size], marks, group)
                if index * self.block_size >= cached:
                    self.engine.blocks[table[index]] = content
                elif index >= first_block(reach, self.block_size, cached // self.block_size):
                    found = self.engine.blocks.get(table[index])
                    assert found is not None
                    found = found[: len(content)]
                    assert found == content, f"block {index} of group {group} of {tokens} has other bytes"
            if len(tokens) % self.block_size:
                self.engine.blocks[table[-1]] = bytes(max(PAYLOADS))

    def _block(self, salt: bytes, tokens: Sequence[int], marks: dict[int, bytes], group: int) -> bytes:
        return identity(self.weights, salt, tokens, marks, group, PAYLOADS[group])

    def _state(self, salt: bytes, tokens: Sequence[int], marks: dict[int, bytes]) -> bytes:
        """What the state has seen."""
        if not tokens:
            return bytes(STATE_BYTES)
        return identity(self.weights, salt, tokens, marks, len(self.groups), STATE_BYTES)

    def free(self, count: int | None = None) -> None:
        """End sequences, the oldest first."""
        gone = self.held[:count]
        del self.held[: len(gone)]
        self.manager.free(gone)

    def offload(self) -> None:
        """An empty step, which copies what is cached to the host pool."""
        step_id = self.manager.prepare([], [], self.step)
        self.engine.move(self.step)
        self.manager.commit(step_id)

    def run(self, parts: int, resuming: float = 0.3) -> None:
        for _ in range(parts):
            self.workers.run_one(resuming)

    def settle(self, agree: Agree | None = None) -> None:
        """Let all that runs end, with time to spare."""
        for _ in range(1000):
            self.workers.finish()
            self.tiers.poll(agree)
            if not self.tiers.num_operations:
                return
        raise AssertionError(f"after all calls have returned there is still {self.tiers._operations}")

    def end(self) -> None:
        """The process ends in order: nothing is held any more."""
        self.free()
        self.workers.finish()
        assert self.tiers.close()
        assert self.manager.num_background_slots == 0
        self.manager.audit()

    def _learn(self, tokens: Sequence[int], salt: bytes, extra: Sequence[tuple[int, bytes]]) -> None:
        """What objects of this prompt must hold, should they be spilled."""
        form = ObjectFormat(self.namespace(self.weights), secret=self.secret)
        count = len(tokens) // self.block_size
        extras = self.manager.block_extras(list(extra), count)
        blocks = form.blocks(form.root(salt), list(tokens)[: count * self.block_size], self.block_size, extras)
        for index, block in enumerate(blocks):
            for group in range(len(self.groups)):
                content = self._block(salt, tokens[: (index + 1) * self.block_size], dict(extra), group)
                self.truth[form.namespace, block.digest, group] = content
            state = self._state(salt, tokens[: (index + 1) * self.block_size], dict(extra))
            self.truth[form.namespace, block.digest, len(self.groups)] = state

    def check_store(self, store: FaultyStore) -> int:
        """Every object that verifies holds what it says; returns how many there are."""
        sound = 0
        for key, content in store.inner._objects.items():
            if fault_of(content, self.secret) is None:
                header = read_header(content)
                assert header is not None
                assert header.key == key
                right = self.truth[header.namespace, header.block.digest, header.group]
                assert content[HEADER_BYTES:] == right, f"{key} verifies and has another block's bytes"
                sound += 1
        return sound
