"""Tiers: what a manager's host pool holds goes down to stores, and comes back up before its prompt is admitted.

Here is decided when a fetch or a spill begins and ends, in the same order on every rank. What they do in between runs
on other threads and is in `fetches` and `spills`. Imports torch, the steps' arrays, and the rest of tiers.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import torch

from kvblocks.manager import BlockManager, Fetch, Spill
from kvblocks.sizes import checked_integer
from kvblocks.step.buffers import StepBuffers
from kvblocks.storage.host import HostArena
from kvblocks.tiers.fetches import Loading, Looking, Prompt, Slots
from kvblocks.tiers.guarded import GuardedStore, TierStats
from kvblocks.tiers.names import PRIVATE_SALT
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.spills import Spilling
from kvblocks.tiers.store import Store
from kvblocks.tiers.workers import Workers

__all__ = ["FEWEST", "Agree", "Ticket", "Tiers"]

LOADED = 16  # blocks that one call loads
SPILLED = 64  # blocks of one spill at most
SPILLS = 2  # that are under way at once, those that are late not counted
FEWEST = {"host_blocks": 4, "host_states": 8}  # slots, a quarter of which may come and go at once
_POLL_SECONDS = 0.01  # between two looks where a call waits

# The elementwise least of the integers that each rank gives, the same number of them on all.
Agree: TypeAlias = Callable[[list[int]], Sequence[int]]

# What an operation reports to the other ranks: the least of these counts.
_OVER, _PENDING, _DONE = 0, 1, 2  # a count is added to the last


class _Engine(Protocol):
    """What Tiers needs of a `CacheEngine`."""

    @property
    def arena(self) -> HostArena | None: ...
    @property
    def state_arena(self) -> HostArena | None: ...
    @property
    def device(self) -> Any: ...
    def group_bytes(self, group: int) -> int: ...
    def landed(self) -> int: ...
    def move(self, step: StepBuffers) -> None: ...


class Ticket:
    """A prompt whose blocks are being fetched: what `Tiers.fetch` returns, and `Tiers.poll` brings on.

    Attributes:
        done: whether the prompt can be admitted; what follows is known then.
        fetch: for `manager.admit(tokens, fetched=ticket.fetch)`; None where nothing was fetched.
        num_tokens: leading tokens of the prompt that can be served without computing them, from wherever they lie.
        num_local: those of them that lay in this process before.
        tokens_by_store: those that came from each store, in the order of the stores.
        timed_out: whether the deadline came first. Then nothing was fetched.
    """

    def __init__(
        self, prompt: dict[str, Any], num_stores: int, num_local: int, resets: int, ends: Sequence[int] = ()
    ) -> None:
        self.done = False
        self.fetch: Fetch | None = None
        self.num_tokens = self.num_local = num_local
        self.tokens_by_store = [0] * num_stores
        self.timed_out = False
        self._prompt = prompt  # the arguments of begin_fetch
        self._ends = ends  # where layers keep a state: the numbers of blocks after which it may be found
        self._resets = resets  # of the prefix cache when it was asked for
        self._deadline = 0.0
        self._cancelled = False
        self._looking: Looking | None = None
        self._loading: Loading | None = None
        self._begun: Fetch | None = None  # the manager's, from its begin on

    @property
    def _number(self) -> int:
        """Of its begin; 0 before."""
        return 0 if self._begun is None else self._begun.number

    def _report(self, now: float) -> list[int]:
        """While it is looked for also, for each of `_ends`, whether the state is there."""
        loading, looking = self._loading, self._looking
        if loading is not None and loading.ended:
            return [_OVER if loading.unsafe else _DONE + loading.num_ok]
        state = _OVER if now >= self._deadline else _PENDING
        if loading is not None or looking is None:
            return [state]
        if state == _OVER or not looking.ended:
            return [state, *[0] * len(self._ends)]
        return [_DONE + looking.num_blocks, *(end in looking.checkpoints for end in self._ends)]

    def __repr__(self) -> str:
        return f"Ticket(done={self.done}, num_tokens={self.num_tokens}, timed_out={self.timed_out})"


class _Quarantine:
    """A fetch that nobody waits for any more, and whose slots a call may still write."""

    def __init__(self, fetch: Fetch, loading: Loading) -> None:
        self.fetch = fetch
        self._loading = loading
        self._number = fetch.number

    def _report(self, now: float) -> list[int]:
        return [_DONE if self._loading.at_rest and not self._loading.unsafe else _PENDING]


class _Spill:
    """A spill under way."""

    def __init__(self, spill: Spill, spilling: Spilling, num_states: int, deadline: float) -> None:
        self.spill, self.spilling = spill, spilling
        self.num_states = num_states
        self.late = False
        self._deadline = deadline
        self._number = spill.number

    def _report(self, now: float) -> list[int]:
        """One for each row."""
        if self.spilling.at_rest:
            return [_DONE + (ok and self.spilling.ended) for ok in self.spilling.ok]
        return [_OVER if now >= self._deadline else _PENDING] * len(self.spilling.ok)


class Tiers:
    """Stores below the host pool of a manager.

    A prompt is fetched before it is admitted, and what has landed in the host pool, blocks and checkpoints of states,
    is spilled to each store that lacks it. Threads call the stores; `poll`, once a step, begins and ends what they work
    on and never waits.
    Whatever goes wrong in a store is a miss: it never raises here.

    Args:
        manager: with `host_blocks`, and with `host_states` where layers keep a state.
        engine: of the same blocks, with as many `host_blocks` and `host_states`.
        stores: asked in this order. Whoever made them closes them, after `close`.
        namespace: of model, weights and layout, as `namespace_of(engine, ...)` gives it.
        secret: as of `ObjectFormat`: without it, who can write a store decides what the model answers.
        shard: the part of the model's layers and heads that this rank's blocks hold, as `shard_name` gives it.
        threads: that load from each store at once, 1 to 64; half as many store to it.
        deadline: seconds after which a prompt is no longer waited for, and a call of a store counts as failed.

    Raises:
        ValueError: a manager without slots in host memory, or with fewer than 4 for blocks or 8 for states; an engine
            with fewer than that; no stores; an argument out of bounds.
        TypeError: a store that is none.
        ModuleNotFoundError: as for `ObjectFormat`.

    Example:
        >>> tiers = Tiers(manager, engine, [DiskStore("/var/cache/kv", "10GiB")], namespace=namespace)
        >>> ticket = tiers.fetch(tokens)
        >>> while not ticket.done:  # or run other sequences' steps meanwhile
        ...     tiers.poll()
        >>> sequence, num_cached = manager.admit(tokens, fetched=ticket.fetch)

    With several ranks each has a `Tiers`, and the same calls of it and of the manager are made on all, in the same
    order. `poll(agree)` then exchanges a list of integers once, and does what all of them have got to, `manager.landed`
    included. So all managers hand out the same blocks, whatever clocks, disks and networks do.

        >>> def agree(numbers):
        ...     least = torch.tensor(numbers)
        ...     torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        ...     return least.tolist()

    Salts that begin with `kvblocks.tiers.names.PRIVATE_SALT` stay in this process.

    After `manager.reset_prefix_cache` everything misses and nothing is spilled until `renew`.

    Thread-safety: the thread that drives the manager.
    """

    def __init__(
        self,
        manager: BlockManager,
        engine: _Engine,
        stores: Iterable[Store],
        *,
        namespace: str,
        secret: bytes | None = None,
        shard: str = "all",
        threads: int = 4,
        deadline: float = 5.0,
    ) -> None:
        given = list(stores)
        for number, store in enumerate(given):
            if not isinstance(store, Store):
                raise TypeError(f"stores[{number}] is a {type(store).__name__}; give a kvblocks.tiers.Store")
        if not given:
            raise ValueError("there are no stores; give one or more")
        if not manager.host_blocks:
            raise ValueError("the manager has no host_blocks, through which blocks come and go; give it some")
        if manager.num_states and not manager.host_states:
            raise ValueError("the manager has no host_states, without which a prefix is of no use; give it some")
        arenas = _arenas(manager, engine)
        threads = checked_integer("threads", threads, 1, 64)
        if not deadline > 0:
            raise ValueError(f"deadline={deadline} must be more than 0 seconds")
        form = ObjectFormat(namespace, secret=secret)
        form.key(form.block(form.root(), b""), 0, shard)  # raises where a shard cannot be named so
        self._manager, self._engine = manager, engine
        self._secret, self._deadline = secret, float(deadline)
        self._slots = Slots(
            form,
            shard,
            manager.groups,
            manager.block_size,
            (
                *((arenas[0], engine.group_bytes(group)) for group in range(len(manager.groups))),
                *((arena, arena.payload_bytes) for arena in arenas[1:]),
            ),
            manager.state_every // manager.block_size,
        )
        self._namespace = namespace
        self._resets = manager.num_resets
        self._clock = self._make_clock()
        self._stores = [GuardedStore(store, self._deadline, self._clock) for store in given]
        self._fetchers, self._spillers = self._make_workers(threads), self._make_workers(max(1, threads // 2))
        self._operations: list[Ticket | _Quarantine | _Spill] = []
        self._abandoned: list[Looking] = []  # under a call of a store still, which nothing depends on
        self._spill_blocks = max(1, min(SPILLED, manager.host_blocks // 16))
        self._landed = 0  # the newest move of which that is known on all ranks
        self._may_spill = False
        self._spilled_all = False  # whether nothing was left to spill, or no slot might be held any more
        self._in_the_way = 0  # slots that were held then
        self._closed = False
        for store in given:
            for arena in arenas:
                store.register(arena.buffer)
                if type(store).register is not Store.register:  # it may keep the memory, which then has to outlive it
                    weakref.finalize(store, _let_go, arena.buffer).atexit = False
        for workers in (self._fetchers, self._spillers):
            weakref.finalize(self, workers.close).atexit = False

    def _make_clock(self) -> Callable[[], float]:
        return time.monotonic

    def _make_workers(self, threads: int) -> Workers:
        """A lane of threads for each store, and one for what needs none."""
        return Workers([*[threads] * len(self._stores), 1])

    @property
    def is_suspended(self) -> bool:
        """Whether the prefix cache was reset, and `renew` not called since: everything misses, nothing is spilled."""
        return self._resets != self._manager.num_resets

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def namespace(self) -> str:
        """The namespace under which blocks are shared now."""
        return self._namespace

    @property
    def num_operations(self) -> int:
        """Prompts that are fetched, spills under way, and what was given up and still holds host slots."""
        return len(self._operations)

    def stats(self) -> list[TierStats]:
        """Counters of each store."""
        return [store.stats() for store in self._stores]

    def fetch(
        self,
        tokens: Any,
        *,
        salt: bytes = b"",
        extra: Sequence[tuple[int, bytes]] = (),
        deadline: float | None = None,
    ) -> Ticket:
        """Look for a prompt's blocks in the stores, and bring what is there to the host pool.

        A fetch has what it brings in host slots until its prompt is admitted. One for which a quarter of the slots has
        no room left brings less, or nothing; where layers keep a state each takes a slot of `host_states`.

        Args:
            tokens, salt, extra: as of `manager.admit`.
            deadline: seconds from now; by default the one of all.

        Returns:
            A ticket, done at once where there is nothing to look for. When it is done, admit the prompt with
            `fetched=ticket.fetch`, which keeps what was fetched from being evicted until then, or `release` it.

        Raises:
            ValueError, TypeError: as for `manager.admit`, or a deadline that is not above 0.
        """
        seconds = self._deadline if deadline is None else deadline
        if not seconds > 0:
            raise ValueError(f"deadline={deadline} must be more than 0 seconds")
        marks = list(extra)
        found = self._manager.match(tokens, salt=salt, extra=marks)
        ids = np.array(tokens, np.int32).reshape(-1)
        block_size = self._manager.block_size
        local = found // block_size
        ends = self._slots.ends(local, (len(ids) - 1) // block_size)
        prompt = {"tokens": ids, "salt": salt, "extra": marks}
        ticket = Ticket(prompt, len(self._stores), found, self._resets, ends if self._slots.every else ())
        if self._closed or self.is_suspended or not ends or salt.startswith(PRIVATE_SALT):
            ticket.done = True
            return ticket
        ticket._deadline = self._clock() + seconds
        wanted = ends[-1]
        extras = self._manager.block_extras(marks, wanted)
        part = Prompt(ids[: wanted * block_size], salt, extras, local)
        ticket._looking = looking = Looking(self._slots, part, self._stores)
        self._operations.append(ticket)
        self._fetchers.start(looking, [(len(self._stores), looking.job())])
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Let go of a ticket whose prompt is not admitted after all, done or not.

        Raises:
            ValueError: what it fetched was admitted or released before.
        """
        if ticket.done:
            if ticket.fetch is not None:
                self._manager.release(ticket.fetch)
                ticket.fetch = None
        else:
            ticket._cancelled = True

    def poll(self, agree: Agree | None = None) -> None:
        """Begin and end what is due. Call it once a step, on every rank; it never waits for a store.

        Args:
            agree: of several ranks, called once: gives each the elementwise least of what all give, a list of the same
                length on all of them.

        Raises:
            RuntimeError: `agree` gives another number of integers.
        """
        self._poll([], agree)

    def wait(self, tickets: Iterable[Ticket], agree: Agree | None = None) -> None:
        """Poll until tickets are done, which each is at its deadline."""
        left = list(tickets)
        while True:
            self._poll([], agree)
            left = [ticket for ticket in left if not ticket.done]
            if not left:
                return
            self._fetchers.wait(_POLL_SECONDS)

    def flush(self, timeout: float, agree: Agree | None = None) -> bool:
        """Bring what no sequence holds, blocks and checkpoints, down to the stores; returns whether all is there.

        It runs empty steps, which copy to the host pool, and spills. Call it while no step is open. Blocks that earlier
        steps have copied, and pushed out before they could be spilled, are not copied once more and do not count.

        Args:
            timeout: seconds after which it stops.
            agree: as of `poll`.

        Raises:
            ValueError: too many steps are open.
        """
        end = self._clock() + timeout
        groups, states = len(self._manager.groups), self._manager.num_states > 0
        step = StepBuffers(1, 1, 1, device=self._engine.device, groups=groups, states=states)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        offloaded = 0  # the newest move that this call has begun
        while True:
            [in_time] = self._poll([self._clock() < end], agree)
            if self._closed or self.is_suspended or not self._may_spill or not in_time:
                return False
            if self._landed < offloaded or not self._spilled_all or self._in_the_way or self._spills():
                self._spillers.wait(_POLL_SECONDS)
                continue
            step_id = self._manager.prepare([], [], step)
            offloads, last = len(step.moves), step.last_move
            self._engine.move(step)
            self._manager.commit(step_id)
            if not offloads:
                return not self._manager.num_background_slots
            offloaded = last

    def renew(self, namespace: str, *, same_weights: bool = False) -> None:
        """Go on after `manager.reset_prefix_cache`, under the namespace of the new weights.

        Args:
            namespace: of what is computed from now on.
            same_weights: the weights are those of before, so that the namespace may be too.

        Raises:
            ValueError: the old namespace without `same_weights`; there was no reset, so that blocks of the old weights
                are still there; or as for `ObjectFormat`.
        """
        if namespace == self._namespace and not same_weights:
            raise ValueError(
                f"namespace={namespace!r:.80} is that of the weights before, whose blocks would be found; give the new "
                "weights' one, or same_weights=True"
            )
        if namespace != self._namespace and not self.is_suspended:
            raise ValueError("blocks under the old namespace are still there; call manager.reset_prefix_cache() first")
        form = ObjectFormat(namespace, secret=self._secret)
        self._slots = replace(self._slots, format=form)
        self._namespace = namespace
        self._resets = self._manager.num_resets

    def close(self, timeout: float = 10.0, agree: Agree | None = None) -> bool:
        """Wait for calls that run, and give the host slots back. Afterwards all is a miss, and nothing is spilled.

        Tickets that are not done become done, with nothing fetched. Slots under calls that hang beyond `timeout`
        stay taken for good, and the memory stays allocated as long as the calls run. A second call does nothing.

        Args:
            timeout: seconds.
            agree: as of `poll`.

        Returns:
            Whether all calls have returned. Where not, the stores must not be closed.
        """
        if not self._closed:
            self._closed = True
            end = self._clock() + timeout
            for each in self._operations:
                if isinstance(each, Ticket):
                    each._cancelled = True
                elif isinstance(each, _Spill):
                    each.spilling.give_up()
            while True:
                [in_time] = self._poll([self._clock() < end], agree)
                if not self._operations or not in_time:
                    break
                self._fetchers.wait(_POLL_SECONDS)
            while not self._is_idle() and self._clock() < end:
                self._fetchers.wait(_POLL_SECONDS)
            self._fetchers.close()
            self._spillers.close()
        return self._is_idle()

    def _is_idle(self) -> bool:
        """Whether no call of a store runs, nor holds anything."""
        return not self._operations and all(task.at_rest for task in self._abandoned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(type(store.store).__name__ for store in self._stores)
        return f"Tiers([{names}], namespace={self._namespace!r}, num_operations={self.num_operations})"

    # One poll. All that it does follows from the calls made so far and from what `agree` says, so that it is the same
    # on all ranks: no clock, store or thread of one rank is asked behind `agree`.

    def _poll(self, more: Sequence[int], agree: Agree | None) -> list[int]:
        """Poll; returns the least that any rank gave as `more`."""
        now = self._clock()
        for store in self._stores:
            store.expire()
        can_spill = any(store.takes_objects for store in self._stores)
        reports = [each._report(now) for each in self._operations]
        given = [*map(int, more), self._engine.landed(), int(can_spill), *(n for report in reports for n in report)]
        said = given if agree is None else list(map(int, agree(list(given))))
        if len(said) != len(given):
            raise RuntimeError(
                f"agree gave {len(said)} integers for {len(given)}; are the same calls made on all ranks, in one order?"
            )
        answers = iter(said)
        others = [next(answers) for _ in more]
        landed, self._may_spill = next(answers), bool(next(answers))
        agreed = [[next(answers) for _ in report] for report in reports]
        if landed != self._landed:
            self._landed, self._spilled_all = landed, False
            self._manager.landed(landed)
        due = list(zip(self._operations, agreed, strict=True))
        for each, values in sorted(due, key=lambda pair: pair[0]._number):
            self._end(each, values)
        for each, values in due:
            if isinstance(each, Ticket) and each._loading is None and not each.done:
                self._begin_when_found(each, values)
        self._begin_spill()
        return others

    def _end(self, each: "Ticket | _Quarantine | _Spill", values: list[int]) -> None:
        """End an operation as far as all ranks have got with it."""
        if isinstance(each, Ticket):
            if self._is_lost(each):
                self._finish(each, timed_out=False)
            elif values[0] == _OVER:
                self._finish(each, timed_out=True)
            elif values[0] != _PENDING and each._loading is not None:
                self._end_fetch(each, values[0] - _DONE)
        elif isinstance(each, _Quarantine):
            if values[0] != _PENDING:
                self._spilled_all = False
                self._operations.remove(each)
                self._manager.end_fetch(each.fetch, 0)
                self._manager.release(each.fetch)
        elif values[0] == _OVER:
            self._spilled_all = self._spilled_all and each.late  # others may take its turn now
            each.late = True
        elif values[0] != _PENDING:
            self._spilled_all = False
            self._operations.remove(each)
            # Digests belong to the tokens alone, whatever became of the bytes.
            digests = each.spilling.digests if any(value > _DONE for value in values) else None
            self._manager.end_spill(each.spill, [value > _DONE for value in values], digests)

    def _is_lost(self, ticket: Ticket) -> bool:
        """Whether nobody wants a ticket's blocks any more, or they are those of other weights."""
        return ticket._cancelled or ticket._resets != self._manager.num_resets

    def _finish(self, ticket: Ticket, *, timed_out: bool) -> None:
        """The ticket is done. What is being loaded for it is let go when the calls have returned."""
        ticket.done, ticket.timed_out = True, timed_out
        self._operations.remove(ticket)
        looking, loading = ticket._looking, ticket._loading
        assert looking is not None
        looking.give_up()
        self._abandoned = [task for task in (*self._abandoned, looking) if not task.at_rest]
        if loading is not None and ticket._begun is not None:
            loading.give_up()
            self._operations.append(_Quarantine(ticket._begun, loading))
        ticket._looking = ticket._loading = ticket._begun = None

    def _begin_when_found(self, ticket: Ticket, values: list[int]) -> None:
        if values[0] == _PENDING:
            return
        looking = ticket._looking
        assert looking is not None
        num_blocks, checkpoints = values[0] - _DONE, []
        if ticket._ends:  # checkpoints that all ranks have; the last one of each may be another
            checkpoints = [end for end, is_there in zip(ticket._ends, values[1:], strict=True) if is_there]
            num_blocks = max(checkpoints, default=0)
        missing = looking.blocks[ticket.num_local // self._manager.block_size : num_blocks]
        if not missing:
            self._finish(ticket, timed_out=False)
        elif not self._loads_any(missing):  # else they come with another ticket's fetch, which is on its way
            self._begin_fetch(ticket, looking, num_blocks, checkpoints)

    def _loads_any(self, blocks: Sequence[Block]) -> bool:
        """Whether one of these blocks is being loaded for a ticket."""
        tickets = (each for each in self._operations if isinstance(each, Ticket))
        loaded = [ticket._loading.digests for ticket in tickets if ticket._loading is not None]
        return any(block.digest in digests for digests in loaded for block in blocks)

    def _begin_fetch(self, ticket: Ticket, looking: Looking, num_blocks: int, checkpoints: list[int]) -> None:
        ticket._begun = fetch = self._manager.begin_fetch(
            **ticket._prompt, num_blocks=num_blocks, checkpoints=checkpoints
        )
        ticket.num_tokens = ticket.num_local = fetch.num_local
        ticket._loading = loading = Loading(self._slots, fetch.blocks, looking.blocks, looking.where, self._stores)
        if loading.rows:
            jobs = [(len(self._stores), job) for job in loading.jobs(LOADED)]
            self._fetchers.start(loading, jobs)
        else:
            self._end_fetch(ticket, 0)

    def _end_fetch(self, ticket: Ticket, num_ok: int) -> None:
        loading, ticket.fetch = ticket._loading, ticket._begun
        assert loading is not None
        assert ticket.fetch is not None
        ticket.num_tokens = self._manager.end_fetch(ticket.fetch, num_ok)
        self._spilled_all = False
        block_size = self._manager.block_size
        served = range(ticket.num_local // block_size, ticket.num_tokens // block_size)
        for number, blocks in enumerate(loading.blocks_by_store(num_ok, served, len(self._stores))):
            ticket.tokens_by_store[number] = blocks * block_size
        ticket._loading = None
        self._finish(ticket, timed_out=False)

    def _spills(self) -> int:
        """How many are under way and not late."""
        return sum(isinstance(each, _Spill) and not each.late for each in self._operations)

    def _spill_states(self) -> int:
        """States that may be spilled now: half of those that can be held at once, as the others are for fetches."""
        spills = (each for each in self._operations if isinstance(each, _Spill) and not each.late)
        return max(0, self._manager.host_states // 8 - sum(spill.num_states for spill in spills))

    def _begin_spill(self) -> None:
        """Begin to spill what has landed, unless nothing has since there was no more, and nothing was given back."""
        if self._spilled_all and self._manager.num_background_slots < self._in_the_way:
            self._spilled_all = False  # an admission or a release has let some go
        if self._spilled_all or self._closed or self.is_suspended:
            return
        if not self._may_spill or self._spills() >= SPILLS:
            return
        spill = self._manager.begin_spill(self._spill_blocks, max_states=self._spill_states())
        if not len(spill.blocks):
            self._manager.end_spill(spill, [])
            self._spilled_all, self._in_the_way = True, self._manager.num_background_slots
            return
        spilling = Spilling(self._slots, spill.blocks, spill.nodes, self._stores)
        num_states = int((spill.blocks[:, 1] == len(self._slots.reaches)).sum())
        self._operations.append(_Spill(spill, spilling, num_states, self._clock() + self._deadline))
        self._spillers.start(spilling, [(len(self._stores), spilling.job())])


def _arenas(manager: BlockManager, engine: _Engine) -> list[HostArena]:
    """The slots of an engine that a manager counts on: those of blocks, and those of states if there are any."""
    arenas = []
    counts = {"host_blocks": (manager.host_blocks, engine.arena)}
    if manager.host_states:
        counts["host_states"] = (manager.host_states, engine.state_arena)
    for name, (count, arena) in counts.items():
        if count < FEWEST[name]:
            raise ValueError(
                f"the manager has {name}={count}, of which a quarter may come and go; give at least {FEWEST[name]}"
            )
        if arena is None or arena.num_slots < count:
            slots = 0 if arena is None else arena.num_slots
            raise ValueError(f"the manager has {name}={count} and the engine {slots}; make both with one number")
        arenas.append(arena)
    return arenas


def _let_go(memory: memoryview) -> None:
    """Called when a store is gone: until then its finalizer has held the memory."""
