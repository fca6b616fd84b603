"""A hash only says where to look: with every hash equal the manager does the same, slower. And hashes do spread."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from manager_compiled import COMPILED
from manager_hooks import hook, needs_hooks
from manager_machine import machine_for

from kvblocks.manager import BlockManager

pytestmark = needs_hooks


def colliding(*args: Any, **kwargs: Any) -> BlockManager:
    manager = BlockManager(*args, **kwargs)
    hook("_collide")(manager)
    return manager


class TestEveryHashEqual(machine_for(replace(COMPILED, manager=colliding)).TestCase):  # type: ignore[misc]
    settings = settings(
        settings(),
        max_examples=settings().max_examples // 2,
        stateful_step_count=30,
        suppress_health_check=list(HealthCheck),
    )


def test_two_prompts_of_one_hash_do_not_share() -> None:
    manager = colliding(64, 4)
    step = COMPILED.step(8, 64, 16)
    first, _ = manager.admit(range(9))
    manager.commit(manager.prepare([first], 9, step))
    assert manager.match(range(9)) == 8
    assert manager.match([0, 1, 2, 3, 4, 5, 6, 8, 8]) == 4
    assert manager.match([1, 1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert manager.match(range(9), salt=b"x") == 0
    assert manager.match(range(9), extra=[(0, b"x")]) == 0
    manager.audit()


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("salted", [False, True])
def test_prompts_spread_over_the_lines(block_size: int, salted: bool) -> None:
    """First blocks, later blocks and salts: of 2,000 nodes in a table for as many none lies far from its line."""
    manager = BlockManager(2000, block_size)
    step = COMPILED.step(1, 4 * block_size, 8)
    rng = np.random.default_rng(0)
    for number in range(500):
        tokens = rng.integers(0, 3 if salted else 2**31, 4 * block_size)
        tokens[0] = 7 if salted else number
        seq, _ = manager.admit(tokens, salt=b"%d" % number if salted else b"")
        manager.commit(manager.prepare(seq, manager.lengths(seq).num_tokens - manager.lengths(seq).num_cached, step))
        manager.free(seq)
    assert manager.stats().published == 2000
    assert hook("_longest_walk")(manager) < 5
