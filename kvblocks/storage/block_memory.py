"""BlockMemory: the memory of all blocks, all of it or none, and how it is divided among the tensors of layers.

Knows bytes, not what they mean. Imports torch, the errors and `memory`.

A block belongs to one layer group at a time, so that groups share its bytes, in which the tensors of a group's layers
lie one after the other. A block is cut at each offset at which a tensor ends in all groups that use so many bytes. Each
part is a storage of its own, in which blocks follow each other without gaps. With one group, or with layers that are
all alike, each tensor has a storage of its own. Otherwise several tensors may lie in one storage, one after the other
in each block.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvblocks import memory
from kvblocks.errors import OutOfMemory

__all__ = ["BlockMemory", "free_memory"]


class BlockMemory:
    """Zeroed memory for `num_blocks` blocks.

    Args:
        num_blocks: at least 1.
        groups: for each group (bytes of a block, bytes of an element) of each of its tensors, in order.
        device: where it lies.
        prefault: touch every page of CPU memory now.
        name: what an error calls the blocks.

    Attributes:
        storages: (uint8 [num_blocks * width], width) of each part of a block, in order.
        sizes: bytes of a block that each group uses, from its beginning.

    Raises:
        OutOfMemory: the memory is not there; nothing stays allocated.
        ValueError: elements of a group would not lie at multiples of their size.
    """

    def __init__(
        self,
        num_blocks: int,
        groups: Sequence[Sequence[tuple[int, int]]],
        device: torch.device,
        *,
        prefault: bool,
        name: str = "blocks",
    ) -> None:
        ends = [list(accumulate(nbytes for nbytes, _ in group)) for group in groups]
        self.sizes = [own[-1] for own in ends]
        cuts = _cuts(ends)
        starts = [0, *cuts[:-1]]
        widths = [end - start for start, end in zip(starts, cuts, strict=True)]
        # Of each tensor of each group: the index of its storage, and where it begins and ends in a block of that.
        self._ranges: list[list[tuple[int, int, int]]] = []
        for group, own in zip(groups, ends, strict=True):
            ranges: list[tuple[int, int, int]] = []
            at = 0
            for (nbytes, size), end in zip(group, own, strict=True):
                while cuts[at] < end:
                    at += 1
                low, high = end - nbytes - starts[at], end - starts[at]
                if low % size or widths[at] % size:
                    raise ValueError(
                        f"layer groups of several dtypes share blocks of {widths[at]} bytes, in which a tensor with "
                        f"elements of {size} bytes begins at byte {low}; use a block_size that is a multiple of 8"
                    )
                ranges.append((at, low, high))
            self._ranges.append(ranges)
        memories = _zeroed([num_blocks * width for width in widths], num_blocks, cuts[-1], device, prefault, name)
        self.storages = list(zip(memories, widths, strict=True))

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Of each part of a block, in order: its address in block 0, and in bytes the stride between blocks and its
        length."""
        return [(storage.data_ptr(), width, width) for storage, width in self.storages]

    @torch.inference_mode(False)  # views made in inference mode could not be written outside of it
    def of_group(self, group: int) -> list[Tensor]:
        """The bytes of each tensor of a group, uint8: all of a storage, or [num_blocks, bytes of a block] of it."""
        return [self._view(*place) for place in self._ranges[group]]

    def _view(self, at: int, low: int, high: int) -> Tensor:
        storage, width = self.storages[at]
        return storage if high - low == width else storage.view(-1, width)[:, low:high]


def _cuts(ends: Sequence[Sequence[int]]) -> list[int]:
    """The offsets in a block at which a tensor ends in all groups that use so many bytes; `ends` are those of each."""
    own = [(set(group), group[-1]) for group in ends]
    every = sorted({end for group in ends for end in group})
    return [end for end in every if all(end in group or end > last for group, last in own)]


@torch.inference_mode(False)
def _zeroed(
    sizes: Sequence[int], num_blocks: int, block_bytes: int, device: torch.device, prefault: bool, name: str
) -> list[Tensor]:
    """Zeroed storages of these sizes in bytes, uint8, that together hold the blocks.

    Raises:
        OutOfMemory: there is no room for all; none stays allocated.
    """
    requested = sum(sizes)
    storages: list[Tensor] = []
    fits = device.type != "cpu" or requested <= memory.room().nbytes
    try:
        for size in sizes if fits else ():
            storages.append(_storage(size, device, prefault))
    except (MemoryError, torch.OutOfMemoryError):
        fits = False
    # Outside of `except`, so that no traceback keeps what was allocated.
    if not fits:
        storages.clear()
        free, limit = free_memory(device)
        if free >= requested:
            free, limit = _refused(device, requested, free)
        fitting = min(free // block_bytes, num_blocks - 1)
        raise OutOfMemory(
            f"{num_blocks} {name} of {block_bytes} bytes are {requested} bytes, and {device} has {free} available: "
            f"{fitting} {name} fit. The limit is {limit}",
            requested,
            free,
            fitting,
        )
    return storages


def _storage(nbytes: int, device: torch.device, prefault: bool) -> Tensor:
    if device.type == "cpu":
        return memory.zeroed(nbytes, prefault=prefault)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def free_memory(device: torch.device) -> memory.Room:
    """The memory that is free for caches on `device` now, and what limits it; 0 bytes where it does not say."""
    if device.type == "cpu":
        return memory.room()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return memory.Room(torch.cuda.mem_get_info(device)[0], "the device's memory")
    return memory.Room(0, f"unknown, as {device} does not say how much it has")


def _refused(device: torch.device, requested: int, free: int) -> memory.Room:
    """What can be had where enough seemed to be free and the allocation failed."""
    if device.type == "cpu":
        return memory.Room(
            memory.mappable(requested),
            f"what the system maps, though {free} bytes seemed to be free: see locked memory (ulimit -l), "
            "vm.overcommit_memory and vm.max_map_count",
        )
    return memory.Room(free, "torch's allocator, which rounds each tensor up and needs it in one piece")
