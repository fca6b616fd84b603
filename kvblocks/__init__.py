"""The paged KV cache for PyTorch, as a library.

Names are imported when first used: sizes and bookkeeping (`CacheConfig`, `BlockManager`) need no torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvblocks.attention import paged_attention
    from kvblocks.config import CacheConfig, Chunk, Group, LayerTensor, State, Window, key_value
    from kvblocks.engine import CacheEngine
    from kvblocks.errors import (
        InvariantViolation,
        KVBlocksError,
        MovesPending,
        NoFreeBlocks,
        NoFreeStates,
        OutOfMemory,
        StaleSequence,
        TooManySequences,
    )
    from kvblocks.generation import generate
    from kvblocks.integrations.transformers import Pool
    from kvblocks.manager import Admission, BlockManager
    from kvblocks.planner import Plan, plan
    from kvblocks.step import StepBuffers
    from kvblocks.storage import PagedKVCache

__version__ = "0.2.0"

_HOMES = {
    "Admission": "manager",
    "BlockManager": "manager",
    "CacheConfig": "config",
    "CacheEngine": "engine",
    "Chunk": "config",
    "Group": "config",
    "InvariantViolation": "errors",
    "KVBlocksError": "errors",
    "LayerTensor": "config",
    "MovesPending": "errors",
    "NoFreeBlocks": "errors",
    "NoFreeStates": "errors",
    "OutOfMemory": "errors",
    "PagedKVCache": "storage",
    "Plan": "planner",
    "Pool": "integrations.transformers",
    "StaleSequence": "errors",
    "State": "config",
    "StepBuffers": "step",
    "TooManySequences": "errors",
    "Window": "config",
    "generate": "generation",
    "key_value": "config",
    "paged_attention": "attention",
    "plan": "planner",
}

__all__ = [
    "Admission",
    "BlockManager",
    "CacheConfig",
    "CacheEngine",
    "Chunk",
    "Group",
    "InvariantViolation",
    "KVBlocksError",
    "LayerTensor",
    "MovesPending",
    "NoFreeBlocks",
    "NoFreeStates",
    "OutOfMemory",
    "PagedKVCache",
    "Plan",
    "Pool",
    "StaleSequence",
    "State",
    "StepBuffers",
    "TooManySequences",
    "Window",
    "generate",
    "key_value",
    "paged_attention",
    "plan",
]
_NEED_TRANSFORMERS = ("Pool", "generate")


class _WithoutTransformers:
    """Says what to install to whoever writes `from kvblocks import generate` without transformers.

    Python drops what `__getattr__` says then, and looks for a submodule of that name before it gives up.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        package, _, last = name.rpartition(".")
        if package == __name__ and last in _NEED_TRANSFORMERS:
            raise ModuleNotFoundError(_needs_transformers(last), name="transformers")


def _needs_transformers(name: str) -> str:
    return f'kvblocks.{name} needs transformers, which is not installed; run: pip install "kvblocks[generate]"'


# What cannot be had is not offered, so that `from kvblocks import *`, `dir` and `hasattr` work; asked for by name it
# says why.
if (sys.modules["transformers"] if "transformers" in sys.modules else find_spec("transformers")) is None:
    __all__[:] = [name for name in __all__ if name not in _NEED_TRANSFORMERS]
    sys.meta_path.append(_WithoutTransformers)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvblocks' has no attribute {name!r}")
    try:
        home = import_module(f"kvblocks.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "transformers":
            raise
        raise AttributeError(_needs_transformers(name)) from None
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
