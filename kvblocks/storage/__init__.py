"""Memory for blocks: `block_memory` has that of all layers, `cache` the tensors of one, `state` slots for states,
`host` slots of host memory.

`movers` and `on_torch` move what lies in them.
"""

from kvblocks.storage.cache import PagedKVCache
from kvblocks.storage.host import HostArena
from kvblocks.storage.state import StateCache

__all__ = ["HostArena", "PagedKVCache", "StateCache"]
