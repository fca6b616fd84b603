"""Tensors that hold the blocks: `cache` has one layer's, `movers` and `on_torch` move blocks."""

from kvblocks.storage.cache import PagedKVCache

__all__ = ["PagedKVCache"]
