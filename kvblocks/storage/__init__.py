"""What holds blocks: `pool` the memory of all, `cache` the tensors of a layer, `host` memory of the host.

`movers` and `on_torch` move what is in them.
"""

from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.host import HostArena

__all__ = ["HostArena", "PagedKVCache"]
