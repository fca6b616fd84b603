"""HostArena: host memory for blocks that have left the device, in slots that disks and networks can use too.

Knows bytes, not what they mean. Imports torch, the sizes and `memory`.
"""

import weakref
from typing import SupportsIndex

import torch

from kvblocks import memory
from kvblocks.sizes import HEADER_BYTES, checked_integer, checked_size

__all__ = ["PAGE_BYTES", "HostArena", "slot_bytes"]

_PORTABLE, _MAPPED = 1, 2  # flags of cudaHostRegister: for every device, and at an address that kernels can use
PAGE_BYTES = 4096  # what slots are padded to, for reads and writes that go past the page cache


def slot_bytes(payload_bytes: int) -> int:
    """Bytes of a slot for a block of `payload_bytes`, header and padding included."""
    return -(-(HEADER_BYTES + payload_bytes) // PAGE_BYTES) * PAGE_BYTES


class HostArena:
    """Slots of host memory in one mapping, each with room for a header and right behind it the bytes of one block.

    A slot begins at a multiple of 4 KiB: its header of 4,096 bytes, the payload, and padding. So the same memory serves
    copies from and to a device, disks past the page cache, and networks that need registered memory.

    Args:
        num_slots: 1 to 2**31 - 1.
        payload_bytes: bytes of the largest block that a slot must hold.
        pinned: register the memory with CUDA, so that copies to and from a device run beside other work. None: where
            torch has a CUDA device.

    Attributes:
        slot_bytes: bytes of a slot, a multiple of 4,096.
        buffer: all slots, as one memoryview.

    Memory is zeroed. Unless it is pinned, no page of it is touched before it is written.

    Raises:
        MemoryError: the system cannot map so much memory, or CUDA cannot register it.
        ValueError: a number out of bounds, or `pinned=True` without a CUDA device.
        TypeError: a number that is not an integer.

    Example:
        >>> arena = HostArena(8, 100_000)
        >>> arena.slot_bytes, arena.object(3, 100_000).nbytes
        (106496, 104096)

    Thread-safety: immutable. Callers see to it that nobody writes a slot that others use.
    """

    def __init__(self, num_slots: SupportsIndex, payload_bytes: SupportsIndex, *, pinned: bool | None = None) -> None:
        self.num_slots = checked_size("num_slots", num_slots)
        self.payload_bytes = checked_integer("payload_bytes", payload_bytes)
        self.slot_bytes = slot_bytes(self.payload_bytes)
        if self.payload_bytes < 1 or self.num_slots * self.slot_bytes >= 2**63:
            raise ValueError(
                f"payload_bytes={self.payload_bytes} for {self.num_slots} slots is outside 1 byte to 2**63 bytes in all"
            )
        has_cuda = torch.cuda.is_available()
        if pinned and not has_cuda:
            raise ValueError(f"pinned=True needs a CUDA device, and torch {torch.__version__} sees none")
        self.pinned = has_cuda if pinned is None else pinned
        self._memory = memory.zeroed(self.num_slots * self.slot_bytes)
        self.buffer: memoryview = self._memory.numpy().data
        if self.pinned:
            self._pin()

    @property
    def address(self) -> int:
        """The address of slot 0; slot i begins `i * slot_bytes` bytes after it."""
        return self._memory.data_ptr()

    @property
    def memory_bytes(self) -> int:
        """Bytes of all slots."""
        return self._memory.nbytes

    def object(self, slot: SupportsIndex, payload_bytes: SupportsIndex) -> memoryview:
        """Header and payload of a slot in one piece, as stores take it.

        Args:
            slot: 0 to num_slots - 1.
            payload_bytes: bytes of the block that lies there, 1 to those of the arena.

        Raises:
            ValueError: one of them is out of bounds.
            TypeError: one of them is not an integer.
        """
        index = checked_integer("slot", slot, 0, self.num_slots - 1)
        length = checked_integer("payload_bytes", payload_bytes, 1, self.payload_bytes)
        start = index * self.slot_bytes
        return self.buffer[start : start + HEADER_BYTES + length]

    def __repr__(self) -> str:
        return f"HostArena({self.num_slots}, {self.payload_bytes}, pinned={self.pinned})"

    def _pin(self) -> None:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(cudart.cudaHostRegister(self.address, self.memory_bytes, _PORTABLE | _MAPPED))
        if status:
            raise MemoryError(f"CUDA did not register {self.memory_bytes} bytes of host memory: error {status}")
        # The finalizer holds the memory, so that it outlives its registration.
        weakref.finalize(self, _unregister, cudart, self._memory)


def _unregister(cudart: object, registered: torch.Tensor) -> None:
    cudart.cudaHostUnregister(registered.data_ptr())  # type: ignore[attr-defined]
