"""Memory for blocks: `block_memory` has that of all layers, `cache` the tensors of one, `host` slots of host memory.

`movers` and `on_torch` move what lies in them.
"""

from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.host import HostArena

__all__ = ["HostArena", "PagedKVCache"]
