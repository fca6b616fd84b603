"""A hash only says where to look: with every hash equal, the manager does the same, only slower."""

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from manager_compiled import COMPILED
from manager_machine import machine_for

from kvblocks.manager import BlockManager


def colliding(*args: Any, **kwargs: Any) -> BlockManager:
    manager = BlockManager(*args, **kwargs)
    manager._collide()
    return manager


class TestEveryHashEqual(machine_for(replace(COMPILED, manager=colliding)).TestCase):  # type: ignore[misc]
    settings = settings(
        settings(),
        max_examples=settings().max_examples // 2,
        stateful_step_count=30,
        suppress_health_check=list(HealthCheck),
    )


def test_two_prompts_in_one_bucket_do_not_share() -> None:
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
