"""Triton kernels for CUDA devices, one job a file. This file only finds them, and imports neither Triton nor torch.

They import torch and Triton, know addresses and strides, and neither caches nor the manager.
"""

import importlib
import logging
from functools import cache
from types import ModuleType

__all__ = ["kernels"]

_log = logging.getLogger("kvblocks")


@cache
def kernels(name: str) -> ModuleType | None:
    """The module `kvblocks.kernels.<name>`; None, said once by the logger "kvblocks", where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        _log.warning(
            "Triton is not installed, so plain torch operations take the place of kvblocks.kernels.%s: right, and "
            "slower; `pip install triton` in the version that belongs to your torch",
            name,
        )
        return None
    return importlib.import_module(f"kvblocks.kernels.{name}")
