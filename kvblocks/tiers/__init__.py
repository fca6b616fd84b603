"""Blocks outside of this process: stores, the format of their objects, and what moves blocks to and from stores.

`Tiers` is imported when it is first used, as stores alone need no torch.
"""

from typing import TYPE_CHECKING, Any

from kvblocks.tiers.disk import DiskStore
from kvblocks.tiers.guarded import TierStats
from kvblocks.tiers.memory_store import MemoryStore
from kvblocks.tiers.mooncake import MooncakeStore
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.redis import RedisStore
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats
from kvblocks.tiers.urls import open_store

if TYPE_CHECKING:
    from kvblocks.tiers.tiers import Ticket, Tiers

__all__ = [
    "Block",
    "Buffer",
    "DiskStore",
    "MemoryStore",
    "MooncakeStore",
    "ObjectFormat",
    "RedisStore",
    "Status",
    "Store",
    "StoreStats",
    "Ticket",
    "TierStats",
    "Tiers",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in ("Ticket", "Tiers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvblocks.tiers import tiers

    return getattr(tiers, name)
