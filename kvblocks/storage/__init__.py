"""Where K, V and states lie, and what moves them.

`block_memory` allocates the blocks of all layers, `cache` makes the tensors of one layer, `state` has slots for states,
and `host` has slots of host memory. `movers` and `on_torch` move what lies in them.
"""

from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.host import HostArena
from kvblocks.storage.state import StateCache

__all__ = ["HostArena", "PagedKVCache", "StateCache"]
