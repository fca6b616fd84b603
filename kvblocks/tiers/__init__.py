"""Blocks outside of this process: the interface of stores, the format of their objects, and stores."""

from kvblocks.tiers.disk import DiskStore
from kvblocks.tiers.memory_store import MemoryStore
from kvblocks.tiers.mooncake import MooncakeStore
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.redis import RedisStore
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats
from kvblocks.tiers.urls import open_store

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
    "open_store",
]
