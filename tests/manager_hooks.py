"""The hooks of the checked build: they break a manager's books, or look where no caller has to."""

from typing import Any

import pytest

import kvblocks.manager

needs_hooks = pytest.mark.skipif(
    not hasattr(kvblocks.manager, "_poke"),
    reason="needs hooks that only the checked build has: python3 dev.py test --checked",
)


def hook(name: str) -> Any:
    return getattr(kvblocks.manager, name)
