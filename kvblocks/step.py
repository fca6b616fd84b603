"""StepBuffers: the arrays of one forward pass as torch tensors at fixed addresses, on the host or on a device.

The manager fills the host image; here it is only allocated, carved into tensors and carried over. Imports torch, the
compiled manager, and storage for its checks.
"""

import math
from typing import SupportsIndex

import torch

from kvblocks.errors import OutOfMemory
from kvblocks.manager import StepArrays
from kvblocks.memory import available_memory
from kvblocks.storage import checked_device, checked_size

__all__ = ["StepBuffers"]

_ALIGNMENT = 256  # bytes; what CUDA allocations have, so that every tensor of an image is as well aligned as its own


class StepBuffers(StepArrays):
    """What attention kernels and `PagedKVCache.write` need to know of one forward pass.

    `BlockManager.prepare` fills it. The tensors stay where they are for good, so that a CUDA graph can be captured over
    them; only the first `num_tokens`, `num_seqs` elements say something, the rest is padding.

    Args:
        max_seqs: rows.
        max_tokens: query tokens of all rows together.
        max_blocks_per_seq: columns of the block table.
        device: where the tensors lie.
        groups: layer groups, 1 to 64.
        kv_indices: also keep `kv_indptr`, `kv_indices`, `kv_last_page_len`, the form that FlashInfer takes.

    Attributes:
        input_ids: int64 [max_tokens]. Pads 0; -1 where the token is a placeholder, for the caller to fill.
        positions: int64 [max_tokens]. Pads 0.
        slot_mapping: int64 [max_tokens], `block_id * block_size + offset`. Pads -1.
        block_table: int32 [max_seqs, max_blocks_per_seq]. Pads 0.
        seq_lens: int32 [max_seqs]: tokens of each sequence, those of this step included. Pads 0.
        query_start_loc: int32 [max_seqs + 1]: where each row's query tokens start. Pads repeat `num_tokens`.
        kv_indptr: int32 [max_seqs + 1], kv_indices: int32 [max_seqs * max_blocks_per_seq],
            kv_last_page_len: int32 [max_seqs]; None unless asked for. Blocks that a group does not reach
            are left out.
        num_seqs, num_tokens, num_copies, max_query_len, max_seq_len: ints on the host.

    Raises:
        ValueError: a size is not 1 to 2**31 - 1, or there is no such device.
        TypeError: a size is not an integer.
        OutOfMemory: the arrays do not fit the host's memory.

    With several groups `slot_mapping`, `block_table`, `kv_indptr` and `kv_indices` are [groups, ...]: `block_table[g]`
    and `slot_mapping[g]` are what the layers of group g take. In a block table what lies out of reach is padding.

    On a CUDA device the copy is enqueued on the current stream. Two pinned images take turns, each guarded by an event,
    so the host may prepare the next step while the device still reads this one.
    """

    def __init__(
        self,
        max_seqs: SupportsIndex,
        max_tokens: SupportsIndex,
        max_blocks_per_seq: SupportsIndex,
        *,
        device: str | torch.device = "cpu",
        groups: int = 1,
        kv_indices: bool = False,
    ) -> None:
        max_seqs = checked_size("max_seqs", max_seqs)
        max_tokens = checked_size("max_tokens", max_tokens)
        max_blocks_per_seq = checked_size("max_blocks_per_seq", max_blocks_per_seq)
        each = () if checked_size("groups", groups) == 1 else (checked_size("groups", groups),)
        self.device = checked_device(device)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "input_ids": (torch.int64, (max_tokens,)),
            "positions": (torch.int64, (max_tokens,)),
            "slot_mapping": (torch.int64, (*each, max_tokens)),
            "copies": (torch.int64, (groups * max_seqs, 2)),
            "block_table": (torch.int32, (*each, max_seqs, max_blocks_per_seq)),
            "seq_lens": (torch.int32, (max_seqs,)),
            "query_start_loc": (torch.int32, (max_seqs + 1,)),
        }
        if kv_indices:
            shapes["kv_indptr"] = (torch.int32, (*each, max_seqs + 1))
            shapes["kv_indices"] = (torch.int32, (*each, max_seqs * max_blocks_per_seq))
            shapes["kv_last_page_len"] = (torch.int32, (max_seqs,))
        offsets, size = {}, 0
        for name, (dtype, shape) in shapes.items():
            offsets[name] = size
            size += -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT

        def carve(image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: image[offsets[name] :][: dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
                for name, (dtype, shape) in shapes.items()
            }

        free = available_memory()
        if size > free:
            raise OutOfMemory(f"step buffers of {size} bytes, and {free} are available", size, free, 0)
        self._host = torch.zeros(size, dtype=torch.uint8, device="cpu")
        on_host = carve(self._host)
        uploads = self.device.type != "cpu"
        super().__init__(**{name: tensor.numpy() for name, tensor in on_host.items()}, uploads=uploads)
        self._image = torch.empty(size, dtype=torch.uint8, device=self.device) if uploads else self._host
        tensors = carve(self._image) if uploads else on_host
        self.input_ids = tensors["input_ids"]
        self.positions = tensors["positions"]
        self.slot_mapping = tensors["slot_mapping"]
        self.block_table = tensors["block_table"]
        self.seq_lens = tensors["seq_lens"]
        self.query_start_loc = tensors["query_start_loc"]
        self.kv_indptr = tensors.get("kv_indptr")
        self.kv_indices = tensors.get("kv_indices")
        self.kv_last_page_len = tensors.get("kv_last_page_len")
        self._copies_image = tensors["copies"]
        self._turn = 0
        if uploads:
            self._staging = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            self._upload()

    @property
    def copies(self) -> torch.Tensor:
        """int64 [num_copies, 2]: (source, target) blocks to copy before the step's writes."""
        return self._copies_image[: self.num_copies]

    def _upload(self) -> None:
        self._turn = 1 - self._turn
        event, staging = self._events[self._turn], self._staging[self._turn]
        event.synchronize()
        staging.copy_(self._host)
        self._image.copy_(staging, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))
