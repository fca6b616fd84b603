"""Attention over the blocks. `call` checks and holds the plain torch path, `backends` picks a kernel on CUDA."""

from kvblocks.attention.call import paged_attention
from kvblocks.attention.request import StepLike

__all__ = ["StepLike", "paged_attention"]
