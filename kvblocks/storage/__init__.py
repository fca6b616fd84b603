"""What holds blocks: `cache` the tensors of a layer, `host` memory of the host. `movers`, `on_torch` move blocks."""

from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.host import HostArena

__all__ = ["HostArena", "PagedKVCache"]
