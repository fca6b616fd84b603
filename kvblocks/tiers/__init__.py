"""Blocks outside of this process: the interface of stores, the format of their objects, and two stores."""

from kvblocks.tiers.disk import DiskStore
from kvblocks.tiers.memory_store import MemoryStore
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats

__all__ = ["Block", "Buffer", "DiskStore", "MemoryStore", "ObjectFormat", "Status", "Store", "StoreStats"]
