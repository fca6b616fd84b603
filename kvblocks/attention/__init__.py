"""Attention over the blocks. `call` checks its arguments and attends on CPU, `backends` picks a kernel on CUDA."""

from kvblocks.attention.arguments import StepLike
from kvblocks.attention.call import paged_attention

__all__ = ["StepLike", "paged_attention"]
