"""What every launch of a kernel needs: the right device, and whether Triton compiles or interprets.

Imports torch and Triton.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "on_device_of", "power_of_2"]

# Triton decides once, when a kernel is defined: TRITON_INTERPRET=1 runs them in Python, on CPU tensors too.
INTERPRETED: bool = triton.knobs.runtime.interpret

_NOWHERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device and its current stream, so the tensor's device has to be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NOWHERE


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`; Triton's tiles have such sizes."""
    return 1 << max(0, number - 1).bit_length()
