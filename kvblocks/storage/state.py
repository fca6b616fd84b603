"""StateCache: what one layer keeps once for a sequence, in slots, as named tensors; and the memory of all slots.

Knows slots by their numbers, not who stands on them. Imports torch, the sizes, the pool and the movers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvblocks.checks import Indices, checked_indices, dtype_of
from kvblocks.config import CacheConfig, LayerTensor
from kvblocks.movement import first_outside
from kvblocks.storage.block_memory import BlockMemory
from kvblocks.storage.movers import mover, whole_blocks

__all__ = ["StateCache", "StateSlots"]


class StateCache:
    """The states of one layer: a tensor [slots, ...] for each `LayerTensor` that it keeps for a sequence.

    A slot's elements of one tensor follow each other without gaps; from slot to slot lie those of other layers too, so
    that `stride(0)` is more than one slot's elements. A slot is zero until something is written to it.

    Attributes:
        num_slots: of each tensor.
        tensors: by name. They share memory with nothing else; write them in place.
    """

    def __init__(self, num_slots: int, tensors: dict[str, Tensor]) -> None:
        self.num_slots, self.tensors = num_slots, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of this layer."""
        return sum(tensor[0].nbytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        kept = ", ".join(f"{name} {list(tensor.shape[1:])}" for name, tensor in self.tensors.items())
        return f"<StateCache of {self.num_slots} slots: {kept}>"


class StateSlots:
    """The memory of all slots of a config, zeroed, and the `StateCache` of each layer.

    Args:
        config: what layers keep for a sequence.
        num_slots: at least 1.
        dtype: of the tensors that have none of their own.
        device: where they lie.
        prefault: touch every page of CPU memory now.

    Attributes:
        caches: of each layer, None where it keeps nothing for a sequence.
        memory: where the slots lie, as one layer group.

    A slot of all layers lies in one piece for each size of element, so that slots are copied in a few operations, and
    takes no more bytes than `config.state_bytes` says.

    Raises:
        OutOfMemory: the memory is not there; nothing stays allocated.
    """

    def __init__(
        self, config: CacheConfig, num_slots: int, dtype: torch.dtype, device: torch.device, *, prefault: bool = False
    ) -> None:
        self.num_slots = num_slots
        kept = [[tensor for tensor in layer if tensor.per == "sequence"] for layer in config.layers]
        of_size: dict[int, list[LayerTensor]] = {}
        for tensor in (tensor for layer in kept for tensor in layer):
            of_size.setdefault(dtype_of(tensor, dtype).itemsize, []).append(tensor)
        totals = [(sum(_elements(tensor) for tensor in of_size[size]) * size, size) for size in of_size]
        self.memory = BlockMemory(num_slots, [totals], device, prefault=prefault, name="slots for states")
        rows = {
            size: storage.view(num_slots, -1) for size, (storage, _) in zip(of_size, self.memory.storages, strict=True)
        }
        taken = dict.fromkeys(of_size, 0)
        self.caches: list[StateCache | None] = []
        for layer in kept:
            tensors = {}
            for tensor in layer:
                own = dtype_of(tensor, dtype)
                low = taken[own.itemsize]
                high = taken[own.itemsize] = low + _elements(tensor) * own.itemsize
                tensors[tensor.name] = _view(rows[own.itemsize], low, high, own, tensor.shape)
            self.caches.append(StateCache(num_slots, tensors) if tensors else None)
        self._mover = mover([whole_blocks(storage, width) for storage, width in self.memory.storages])

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage, _ in self.memory.storages)

    def move(self, zeroed: Tensor, pairs: Tensor) -> None:
        """Set the slots `zeroed` [n] to zero, and make slot `pairs[i][1]` a copy of slot `pairs[i][0]`; all exist."""
        if len(zeroed):
            self._mover.zero_blocks(zeroed)
        if len(pairs):
            self._mover.copy_blocks(pairs)

    def checked(self, name: str, given: Indices) -> Tensor:
        """Slots, checked where they lie on the host; an error says `name`."""
        index = checked_indices(name, given)
        if index.is_cpu:
            flat = index.reshape(-1)
            bad = first_outside(flat.data_ptr(), len(flat), 0, self.num_slots - 1)
            if bad >= 0:
                raise ValueError(f"{name} names slot {int(flat[bad])}, which is outside 0..{self.num_slots - 1}")
        return index


@torch.inference_mode(False)  # views made in inference mode could not be written outside of it
def _view(rows: Tensor, low: int, high: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return rows.view(dtype)[:, low // dtype.itemsize : high // dtype.itemsize].view(len(rows), *shape)


def _elements(tensor: LayerTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count
