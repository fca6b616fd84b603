"""The Triton kernel that brings what changed in a step into the device's image of it. Imports torch and Triton."""

import triton
import triton.language as tl
from torch import Tensor

from kvblocks.kernels.launch import on_device_of

__all__ = ["apply_patches"]

_WORDS = 1024  # of a patch that one program takes at a time
_SHARES = 16  # programs among which a long patch is divided


@triton.jit(do_not_specialize=["patches_at"])
def _apply(image, packed, patches_at, words_at_once: tl.constexpr):
    patch = (packed + patches_at).to(tl.pointer_type(tl.int64), bitcast=True) + tl.program_id(0) * 3
    target = tl.load(patch)
    source = tl.load(patch + 1)
    words = tl.load(patch + 2)
    start = tl.program_id(1).to(tl.int64) * words_at_once
    while start < words:
        at = start + tl.arange(0, words_at_once)
        tl.store(image + target + at, tl.load(packed + source + at, mask=at < words, other=0), mask=at < words)
        start += tl.num_programs(1).to(tl.int64) * words_at_once


def apply_patches(image: Tensor, packed: Tensor, patches_at: int, count: int, longest: int) -> None:
    """Copy the words of every patch to their places.

    Args:
        image: int32, contiguous.
        packed: int32, its address a multiple of 8: words, and from `patches_at` on (even) patches of three int64: the
            first word in `image`, the first in `packed`, the number of words. No two change the same word.
        patches_at, count, longest: where the patches start, their number, and the words of the longest; `count` >= 1.
    """
    with on_device_of(image):
        _apply[(count, min(_SHARES, -(-longest // _WORDS)))](image, packed, patches_at, _WORDS)
