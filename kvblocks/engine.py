"""CacheEngine: the caches of all layers of a model, allocated together and handed out.

Knows sizes and storage, and neither the manager nor the model. Imports torch through storage only.
"""

import logging
from collections.abc import Iterator
from typing import SupportsIndex

import torch

from kvblocks.config import CacheConfig
from kvblocks.storage import Indices, PagedKVCache, _integer, copy_blocks, together, zero_blocks

__all__ = ["CacheEngine"]

_log = logging.getLogger("kvblocks")


class CacheEngine:
    """One `PagedKVCache` for each layer of `config`.

    All memory is allocated, zeroed, before the constructor returns; one INFO line of the logger "kvblocks" says how
    much. The caches are handed out as they are: whoever writes through one is seen by all who hold it.

    Args:
        config: sizes.
        dtype, device, layout, prefault: as for `PagedKVCache`.

    Raises:
        OutOfMemory: the layers do not all fit; none stays allocated.
        NotImplementedError: `config` has more than one layer group.
        OverflowError, ValueError, TypeError: as for `PagedKVCache`.

    Example:
        >>> engine = CacheEngine(CacheConfig(2, 8, 128, 64), "float16", "cpu")
        >>> len(engine), engine.memory_bytes
        (2, 8388608)
        >>> engine.get_cache(0) is engine[0], engine.get_cache(2)
        (True, None)

    Thread-safety: caches may be taken from any thread; for writing see `PagedKVCache`.
    """

    def __init__(
        self,
        config: CacheConfig,
        dtype: torch.dtype | str,
        device: torch.device | str,
        *,
        layout: str = "HDN",
        prefault: bool = False,
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config is a {type(config).__name__}; give a CacheConfig")
        if len(config.groups) > 1:
            raise NotImplementedError(f"config has {len(config.groups)} groups; only one layer group is supported")
        self._config = config
        self._caches = tuple(
            PagedKVCache.layers(
                config.num_layers,
                config.num_gpu_blocks,
                config.num_kv_heads,
                config.head_dim,
                config.block_size,
                dtype,
                device,
                layout=layout,
                v_head_dim=config.v_head_dim,
                prefault=prefault,
            )
        )
        self._mover = together(self._caches)
        _log.info(
            "KV cache on %s: %d blocks x %d layers = %.1f MB",
            self.device,
            self.num_blocks,
            len(self),
            self.memory_bytes / 1e6,
        )

    @property
    def config(self) -> CacheConfig:
        return self._config

    @property
    def num_blocks(self) -> int:
        return self._config.num_gpu_blocks

    @property
    def block_size(self) -> int:
        return self._config.block_size

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors together; the same as `config.memory_bytes(dtype)`."""
        return sum(cache.memory_bytes for cache in self._caches)

    @property
    def dtype(self) -> torch.dtype:
        return self._caches[0].dtype

    @property
    def device(self) -> torch.device:
        return self._caches[0].device

    @property
    def layout(self) -> str:
        return self._caches[0].layout

    def get_cache(self, layer: SupportsIndex) -> PagedKVCache | None:
        """The cache of `layer`, or None past the last.

        Raises:
            ValueError: `layer` is negative.
            TypeError: `layer` is not an integer.
        """
        index = _integer("layer", layer)
        if index < 0:
            raise ValueError(f"layer={index} is negative; layers are 0..{len(self) - 1}")
        return self._caches[index] if index < len(self) else None

    def get_all_caches(self) -> list[PagedKVCache]:
        """The caches of all layers, in order, in a list of the caller's own."""
        return list(self._caches)

    def __getitem__(self, layer: SupportsIndex) -> PagedKVCache:
        """The cache of `layer`, negative ones from the end; IndexError outside."""
        index = _integer("layer", layer)
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer {index} is outside {-len(self)}..{len(self) - 1}")
        return self._caches[index]

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[PagedKVCache]:
        return iter(self._caches)

    def __repr__(self) -> str:
        return f"CacheEngine({self.config!r}, dtype={self.dtype}, device='{self.device}', layout={self.layout!r})"

    def copy_blocks(self, pairs: Indices) -> None:
        """`PagedKVCache.copy_blocks` in every layer; the pairs are checked once, before anything is copied."""
        copy_blocks(self._caches[0], self._mover, pairs)

    def zero_blocks(self, ids: Indices) -> None:
        """`PagedKVCache.zero_blocks` in every layer; the ids are checked once, before anything is changed."""
        zero_blocks(self._caches[0], self._mover, ids)
