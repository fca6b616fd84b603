"""Tiers under random orders of events, with stores that fail in every way: every byte that a sequence reads is checked.

`HYPOTHESIS_PROFILE=long` makes 10,000 runs instead of 160.
"""

import os
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from faulty_store import Fault
from tiers_world import DEADLINE, StagedStore, StagedTiers, World

from kvblocks.config import Chunk, Window
from kvblocks.tiers.fetches import Loading, Looking
from kvblocks.tiers.objects import ObjectFormat
from kvblocks.tiers.tiers import Ticket, _Quarantine, _Spill

GROUPS: list[tuple[Any, ...]] = [(None,), (None,), (None, Window(3)), (Window(4), None), (Window(5),), (Chunk(4), None)]
SALTS = [b"", b"", b"a"]
RUNS = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 160
ACTIONS = ["fetch"] * 8 + ["serve"] * 8 + ["free", "free", "free", "offload", "offload", "release", "reset", "renew"]


def chances(rng: Random) -> dict[Fault, float]:
    """Of a few faults at once, now and then of none."""
    faults = rng.sample(list(Fault), rng.choice([0, 1, 2, 3, 5]))
    return {fault: 0.01 if fault is Fault.DEAD else rng.choice([0.05, 0.2, 0.5]) for fault in faults}


def random_run(
    seed: int, faults: dict[Fault, float] | None = None, resets: float = 0.4, every: int | None = None
) -> dict[str, int]:
    """Processes one after the other on the same stores. What they read is checked, and what they leave behind.

    Args:
        faults: of all stores, instead of some that are drawn.
        resets: how much of what could be a reset of the prefix cache is one.
        every: tokens from one checkpoint of a state to the next, 0 for no states; None for what is drawn.
    """
    rng = Random(seed)
    groups = rng.choice(GROUPS)
    drawn = rng.choice([0, 0, 2, 4, 6])
    every = drawn if every is None else every
    secret = rng.choice([None, None, b"0123456789abcdef"])
    capacity = rng.choice([1 << 20, 60_000])
    stores = [StagedStore(faults or chances(rng), rng.randrange(2**32), capacity) for _ in range(rng.choice([1, 1, 2]))]
    prefixes = [[rng.randrange(3) for _ in range(rng.randrange(4, 30))] for _ in range(4)]
    truth: dict[Any, bytes] = {}
    seen = dict.fromkeys(["fetched", "timed out", "spilled", "served"], 0)
    for _ in range(4):
        world = World(
            stores,
            rng,
            groups=groups,
            every=every,
            num_states=rng.choice([1, 2, 6]),
            host_states=rng.choice([8, 9, 16]),
            num_blocks=rng.choice([24, 40]) * len(groups),
            host_blocks=rng.choice([16, 64, 128]) * len(groups),
            weights=rng.choice([0, 0, 0, 0, 1]),
            truth=truth,
            secret=secret,
            lag=rng.choice([0, 0.3, 0.8]),
        )
        one_process(world, rng, prefixes, resets, seen)
        if rng.random() < 0.9:
            world.settle()
            world.end()
        else:  # it dies in the middle of everything
            world.workers.stage.die()
        seen["spilled"] += sum(world.check_store(store) for store in stores)
    return seen


def one_process(world: World, rng: Random, prefixes: list[list[int]], resets: float, seen: dict[str, int]) -> None:
    waiting: list[tuple[Any, ...]] = []
    resuming, haste = rng.choice([0, 0.01, 0.1, 0.5]), rng.choice([0.01, 0.05, 0.2, 0.6])
    for _ in range(40):
        world.now += rng.choice([0, haste * DEADLINE])
        world.run(rng.choice([0, 2, 5, 10, 20]), resuming)
        if rng.random() < 0.8:
            world.poll()
        action = rng.choice(ACTIONS)
        if action == "fetch":
            prefix = rng.choice(prefixes)
            tokens = prefix[: rng.randrange(3, len(prefix) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(5))]
            salt = rng.choice(SALTS)
            extra = [(rng.randrange(len(tokens)), b"x")] if rng.random() < 0.1 else []
            waiting.append((tokens, salt, extra, world.fetch(tokens, salt, extra)))
        elif action == "serve":
            for entry in [entry for entry in waiting if entry[-1].done]:
                waiting.remove(entry)
                tokens, salt, extra, ticket = entry
                assert ticket.num_tokens >= sum(ticket.tokens_by_store)
                seen["fetched"] += sum(ticket.tokens_by_store)
                seen["timed out"] += ticket.timed_out
                world.free(rng.choice([0, 1, 1]))
                seen["served"] += world.serve(tokens, salt, extra, ticket.fetch) or 0
        elif action == "free":
            world.free(rng.choice([1, None]))
        elif action == "offload":
            world.offload()
        elif action == "release" and waiting:
            world.tiers.release(waiting.pop(rng.randrange(len(waiting)))[-1])
        elif action == "reset" and rng.random() < resets:
            world.manager.reset_prefix_cache()
            world.weights = rng.choice([0, 1])
        elif action == "renew" and world.tiers.is_suspended:
            world.tiers.renew(world.namespace(world.weights), same_weights=True)
        if rng.random() < 0.1:
            world.manager.audit()
    for *_, ticket in waiting:
        world.tiers.release(ticket)


@pytest.mark.parametrize("start", range(0, RUNS, 20))
def test_no_wrong_byte_whatever_stores_do(start: int) -> None:
    """Nothing wrong is read or stored, nothing waits, and in the end nothing is held."""
    seen = [random_run(seed) for seed in range(start, start + 20)]
    assert sum(run["fetched"] for run in seen)
    assert sum(run["spilled"] for run in seen)


def all_runs(count: int, first: int = 0, **kinds: Any) -> None:
    for seed in range(first, first + count):
        random_run(seed, **kinds)


# The same runs find what goes wrong where a rule of Tiers is left out.

PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing is verified": lambda patch: patch.setattr(ObjectFormat, "verify", lambda *_: True),
    "a fetch ends before its loads have": lambda patch: (
        patch.setattr(Loading, "ended", True),
        patch.setattr(Loading, "num_ok", property(lambda self: len(self.rows))),
    )[0],
    "all blocks that are right count, not only leading ones": lambda patch: patch.setattr(
        Loading, "num_ok", property(lambda self: len(self.rows) - self.sources.count(-1))
    ),
    "no quarantine: slots go back at the deadline": lambda patch: patch.setattr(
        _Quarantine, "_report", lambda self, now: [2]
    ),
    "a spill ends while its slots are read": lambda patch: patch.setattr(
        _Spill, "_report", lambda self, now: [3 if self.spilling.digests else 1] * len(self.spilling.ok)
    ),
    "a reset is not noticed": lambda patch: (
        patch.setattr(StagedTiers, "is_suspended", False),
        patch.setattr(StagedTiers, "_is_lost", lambda self, ticket: ticket._cancelled),
    )[0],
    "a ticket looked up before a reset is loaded after it": lambda patch: patch.setattr(
        StagedTiers, "_is_lost", lambda self, ticket: ticket._cancelled
    ),
    "what a spill holds is never given back": lambda patch: patch.setattr(
        _Spill, "_report", lambda self, now: [0] * len(self.spilling.ok)
    ),
}


# Where few of the runs would show a fault.
RUNS_FOR: dict[str, dict[str, Any]] = {
    "all blocks that are right count, not only leading ones": {"faults": {Fault.LIES: 0.3}, "every": 0},
    "no quarantine: slots go back at the deadline": {"faults": {Fault.HANG: 0.3}, "first": 35},
    "a spill ends while its slots are read": {"faults": {Fault.HANG: 0.1, Fault.SLOW: 0.5}},
    "a ticket looked up before a reset is loaded after it": {"resets": 1.0, "faults": {Fault.SLOW: 0.01}, "first": 25},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[fault](monkeypatch)
    with pytest.raises(AssertionError):
        all_runs(400, **RUNS_FOR.get(fault, {}))


class Agreement:
    """The least of what two threads give, each time that both have."""

    def __init__(self) -> None:
        self.given: list[list[int]] = [[], []]
        self.barrier = threading.Barrier(2, timeout=60)

    def of(self, rank: int) -> Callable[[list[int]], list[int]]:
        def agree(numbers: list[int]) -> list[int]:
            self.given[rank] = numbers
            self.barrier.wait()
            found = [min(pair) for pair in zip(*self.given, strict=True)]
            self.barrier.wait()
            return found

        return agree


def run_ranks(num_fetches: int, seed: int, agree_of: Any = None, every: int = 0) -> list[World]:
    """Two ranks that make the same calls, each with stores, threads and a clock of its own."""
    worlds: list[World] = []
    errors: list[BaseException] = []
    agreement = Agreement()

    def rank(number: int) -> None:
        try:
            one_rank(worlds[number], Random(seed), agree_of(number) if agree_of else agreement.of(number), num_fetches)
        except BaseException as error:
            errors.append(error)
            agreement.barrier.abort()

    faults = {Fault.SLOW: 0.3, Fault.HANG: 0.03, Fault.LIES: 0.02, Fault.TORN: 0.05, Fault.HALFWAY: 0.05}
    for number in range(2):
        rng = Random(seed + 1 + number)
        stores = [StagedStore(faults, seed + number)]
        worlds.append(World(stores, rng, groups=(None, Window(3)), every=every, num_blocks=60, host_blocks=96, lag=0.5))
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return worlds


def one_rank(world: World, rng: Random, agree: Callable[[list[int]], list[int]], num_fetches: int) -> None:
    """What is called follows from `rng`, which is the same on all ranks; what happens in between from the world's."""
    prefixes = [[rng.randrange(3) for _ in range(30)] for _ in range(8)]
    waiting: list[tuple[list[int], Ticket]] = []
    while num_fetches or waiting:
        world.now += world.rng.choice([0, 0.01, 0.1])
        world.run(world.rng.randrange(12), resuming=0.3)
        world.poll(agree)
        world.log.append(("runs", [(type(each).__name__, each._number) for each in world.tiers._operations]))
        if num_fetches and rng.random() < 0.6:
            num_fetches -= 1
            prefix = rng.choice(prefixes)
            tokens = prefix[: rng.randrange(3, 31)] + [rng.randrange(3) for _ in range(rng.randrange(5))]
            waiting.append((tokens, world.fetch(tokens)))
        if rng.random() < 0.3:
            world.offload()
        for tokens, ticket in [entry for entry in waiting if entry[1].done]:
            waiting.remove((tokens, ticket))
            if ticket.fetch is not None:
                world.log.append(("fetched", ticket.num_tokens, np.array(ticket.fetch.blocks).tolist()))
            world.free(1)
            world.serve(tokens, fetched=ticket.fetch)
    world.free()
    world.settle(agree)
    assert world.manager.num_background_slots == 0


@pytest.mark.parametrize(("every", "num_fetches"), [(0, 1000), (4, 400)])
def test_ranks_hand_out_the_same_blocks(every: int, num_fetches: int) -> None:
    first, second = run_ranks(num_fetches, 0, every=every)
    assert first.log == second.log
    fetched = [entry[1] for entry in first.log if entry[0] == "fetched"]
    assert len(fetched) > num_fetches // 20
    assert first.now != second.now


def test_a_rank_that_goes_by_its_own_checkpoints_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = StagedTiers._begin_fetch

    def own(self: StagedTiers, ticket: Ticket, looking: Looking, num_blocks: int, _: list[int]) -> None:
        begin(self, ticket, looking, max(looking.checkpoints, default=0), sorted(looking.checkpoints))

    monkeypatch.setattr(StagedTiers, "_begin_fetch", own)
    with pytest.raises(ValueError, match="is longer than"):  # other operations, of which they tell each other
        run_ranks(100, 0, every=4)


def test_ranks_that_do_not_agree_are_found() -> None:
    """Each with its own opinion hands out other blocks than the other, or another number of them."""
    first, second = run_ranks(50, 0, lambda number: lambda numbers: numbers)
    assert first.log != second.log
