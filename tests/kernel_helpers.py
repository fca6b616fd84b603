"""Where tests of kernels run: under Triton's interpreter on CPU tensors, and on a CUDA device where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvblocks.config import CacheConfig
from kvblocks.engine import CacheEngine
from kvblocks.kernels.launch import INTERPRETED
from kvblocks.storage import cache as storage
from kvblocks.storage import movers
from kvblocks.storage.cache import PagedKVCache

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles; set TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def moved_by(kind: type[movers.Mover], *arguments: Any, **options: Any) -> PagedKVCache:
    """A cache whose blocks are moved by `kind`, wherever it lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "mover", kind)
        return PagedKVCache(*arguments, **options)


def engine_moved_by(kind: type[movers.Mover], config: CacheConfig, *arguments: Any, **options: Any) -> CacheEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "mover", kind)
        return CacheEngine(config, *arguments, **options)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Any bits at all: NaNs with payloads, both zeros, denormals."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, dtype=torch.uint8, generator=generator).view(dtype).to(device)


def bits(tensor: Tensor) -> bytes:
    # A copy: torch calls one element contiguous whatever its stride, and then cannot view it as bytes.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu().numpy().tobytes()
