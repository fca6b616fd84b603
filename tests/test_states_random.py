"""States of models under random orders of events: whatever happens to a pool, every logit is the model's own.

Generations and caches take turns on one pool that is too small for them. Chats come back, fork, are preempted, cut and
cancelled; rows are padded; prefixes are pinned; passes fail in the middle; the weights change with a reset of the
prefix cache. `test_states_stores_random` lets stores and restarts come into it.

`HYPOTHESIS_PROFILE=long` makes ten runs of every type instead of one of a few.
"""

import os
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
import torch
from states_world import World, in_double

from kvblocks import Pool
from kvblocks.generation.scheduler import Scheduler
from kvblocks.integrations.transformers.blocks import Blocks
from kvblocks.integrations.transformers.rows import Rows
from kvblocks.integrations.transformers.states import SlotStates, States
from kvblocks.storage.state import StateSlots

# Every type with states that transformers runs over its DynamicCache; those of images are here as their text halves.
NAMES = ["bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "inkling2_loop_text", "inkling2_text"]
NAMES += ["inkling_text", "jamba", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid"]
NAMES += ["qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "zamba", "zamba2", "zaya"]
# Gated delta rule; Mamba 2 and Mamba 1 beside attention; convolutions beside windows; the type that bounds time steps.
FEW = ["qwen3_next", "falcon_h1", "jamba", "lfm3", "zamba2"]
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def random_run(name: str, seed: int, turns: int = 150) -> Counter[str]:
    """One pool of a model of type `name`, and what happens on it. Every logit is compared; nothing stays held.

    Returns:
        How often what happened.
    """
    with in_double():
        world = World(name, Random(f"{name} {seed}"))
        for _ in range(turns):
            world.turn()
        world.end()
    return world.seen


# What runs must have had.
EVENTS = ["logits compared", "hit tokens", "preemptions", "failed passes", "passes of caches", "resets", "pins"]
EVENTS += ["padded rows found", "padding taken for tokens", "marked prompts"]


def check_seen(runs: list[Counter[str]], events: list[str]) -> None:
    """Whether runs had all events; where each type runs alone the first two of them, as not every type has all."""
    seen = sum(runs, Counter())
    for event in events[:2] if LONG else events:
        assert seen[event], f"no {event}"


@pytest.mark.parametrize("names", [[name] for name in NAMES] if LONG else [FEW])
def test_no_state_of_anything_else(names: list[str]) -> None:
    runs = [random_run(name, seed, 150 if LONG else 100) for name in names for seed in range(10 if LONG else 1)]
    check_seen(runs, EVENTS)


# The same runs find what goes wrong where a rule is left out. Each is planted in one place.

_move, _read, _write = StateSlots.move, SlotStates.read, SlotStates.write

PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a hit is handed the checkpoint beside its own": lambda patch: patch.setattr(
        StateSlots,
        "move",
        lambda self, zeroed, pairs: _move(self, zeroed, (pairs + torch.tensor([1, 0])) % self.num_slots),
    ),
    "a state is not copied before it is written": lambda patch: patch.setattr(
        StateSlots, "move", lambda self, zeroed, pairs: _move(self, zeroed, pairs[:0])
    ),
    "rows of one length get each other's states": lambda patch: patch.setattr(
        SlotStates, "read", lambda self, slots: _read(self, slots.flip(0))
    ),
    "a cache keeps the states of a pass that was aborted": lambda patch: patch.setattr(
        States, "restore", lambda self: self.keep()
    ),
    "passes of a cache write the states that forks share": lambda patch: patch.setattr(
        States, "begin", lambda self: setattr(self, "_saved", self.held())
    ),
    "a cache leaves the states of another row": lambda patch: patch.setattr(
        SlotStates,
        "write",
        lambda self, slots, fields, rows=None: _write(self, slots, fields, None if rows is None else rows.flip(0)),
    ),
    "a cache reads a state that has not come from the host": lambda patch: patch.setattr(
        Blocks, "bring", lambda self, device: None
    ),
    "a reset forgets nothing": lambda patch: (
        patch.setattr(Scheduler, "reset_prefix_cache", lambda self: None),
        patch.setattr(Pool, "reset_prefix_cache", lambda self: None),
    )[0],
    "rows of which padding was computed are shared": lambda patch: patch.setattr(Rows, "_set_apart", lambda self: None),
    "a cache goes on after a reset": lambda patch: patch.setattr(
        Rows, "_resets", property(lambda self: self.blocks.manager.num_resets, lambda self, value: None), raising=False
    ),
}


def all_runs(name: str, first: int) -> None:
    for seed in range(first, first + 20):
        random_run(name, seed)


# The first seed that shows it, where few do.
SHOWN_BY = {
    "rows of one length get each other's states": 2,
    "a cache keeps the states of a pass that was aborted": 5,
    "passes of a cache write the states that forks share": 10,
    "rows of which padding was computed are shared": 30,
    "a cache goes on after a reset": 6,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[fault](monkeypatch)
    with pytest.raises(AssertionError, match="logits are off by"):
        all_runs("lfm2", SHOWN_BY.get(fault, 0))
