"""StepBuffers: the arrays of one forward pass as torch tensors at fixed addresses, on the host or on a device.

The manager fills the arrays on the host; here they are allocated, viewed as tensors and brought to the device. Imports
torch, the compiled manager and `kvblocks.step.upload`.

What is written while another may still read it, with a CUDA device, and what keeps the two apart:

| memory | written by | while it is read by | kept apart by |
| --- | --- | --- | --- |
| host arrays | `prepare` N + 1 | the packing of step N | `prepare` packs before it returns; one thread a step |
| pinned image A | the packing of step N + 2 | the copy of step N | A's event, which the host waits for |
| pinned image B | the packing of step N + 1 | the copy of step N | another image |
| landing buffer | the copy of step N + 1 | the kernel that spreads step N's patches | the stream |
| device's image | that kernel, in step N + 1 | the pass of step N, a graph's replay | the stream |
| blocks | the pass of step N + 1, its copies | the pass of step N | the stream |
| blocks of step N | a later owner, once `commit` gave them back | the pass of step N | the stream |
| an image that is freed | whoever gets its memory | uploads on another stream | `record_stream` |

The stream is the device's current one when `prepare` is called, and must be the one that the pass runs on. Where it
changed since the last step, it is made to wait for the last upload; that it waits for the last pass is up to whoever
changed it. The image holds one step: enqueue its pass before the next `prepare` into the same buffers, or use two. A
CUDA graph is captured after a `prepare`, never around one; its replay works on the step that was prepared last.
"""

import math
from collections.abc import Hashable
from typing import Any, Self, SupportsIndex, TypeAlias

import torch

from kvblocks.checks import checked_device
from kvblocks.config import CacheConfig
from kvblocks.errors import OutOfMemory
from kvblocks.manager import StepArrays
from kvblocks.memory import mappable, room, zeroed
from kvblocks.sizes import checked_size
from kvblocks.step.upload import Upload, transport

__all__ = ["StepBuffers"]

_ALIGNMENT = 256  # bytes; what CUDA allocations have, so that every tensor of an image is as well aligned as its own
_Field: TypeAlias = tuple[torch.dtype, tuple[int, ...]]


class StepBuffers(StepArrays):
    """What attention kernels and `PagedKVCache.write` need to know of one forward pass.

    `BlockManager.prepare` fills it, and `for_config` sizes it for a cache. The tensors stay where they are for good, so
    that a CUDA graph can be captured over them; only the first `num_tokens` or `num_seqs` elements count, the rest is
    padding.

    Args:
        max_seqs: rows, one for each sequence.
        max_tokens: query tokens of all rows together.
        max_blocks_per_seq: columns of the block table.
        device: where the tensors lie.
        groups: layer groups, 1 to 64.
        kv_indices: also keep `kv_indptr`, `kv_indices`, `kv_last_page_len`, the form that FlashInfer takes.
        states: also keep `state_slots`, `state_zero`, `state_drafts`, `state_copies`, for a manager with a `State`.

    Attributes:
        input_ids: int64 [max_tokens]. Pads 0; -1 where the token is a placeholder, for the caller to fill.
        positions: int64 [max_tokens]. Pads 0.
        slot_mapping: int64 [max_tokens], `block_id * block_size + offset`. Pads -1.
        block_table: int32 [max_seqs, max_blocks_per_seq]. Pads -1.
        seq_lens: int32 [max_seqs]: tokens of each sequence, those of this step included. Pads 0.
        query_start_loc: int32 [max_seqs + 1]: where each row's query tokens start. Pads repeat `num_tokens`.
        kv_indptr: int32 [max_seqs + 1], kv_indices: int32 [max_seqs * max_blocks_per_seq],
            kv_last_page_len: int32 [max_seqs]; None unless asked for. Blocks that a group does not reach
            are left out.
        state_slots: int64 [max_seqs]: the slot in which the pass reads and writes the state of each row. Pads -1.
        state_zero: int64 [max_seqs]: of these the ones that begin at zero, `num_state_zero` of them. Pads -1.
        state_drafts: int64 [max_tokens]: with `keep_state` the slot for the state after each token; `state_slots` says
            then where the state before them is read. Pads -1. All three None unless asked for.
        num_seqs, num_tokens, num_copies, num_state_copies, num_state_zero, max_query_len, max_seq_len: ints on the
            host.
        derived: what the first layer of a pass has checked in and computed from these arrays, for the others; empty
            again after a `prepare`.

    Raises:
        ValueError: a size is not 1 to 2**31 - 1, or there is no such device.
        TypeError: a size is not an integer.
        OutOfMemory: the arrays do not fit the host's memory.

    With several groups `slot_mapping`, `block_table`, `kv_indptr` and `kv_indices` are [groups, ...]: `block_table[g]`
    and `slot_mapping[g]` are what the layers of group g take. Blocks out of reach are padding in a block table.

    On a CUDA device `prepare` enqueues one copy of what changed, and a kernel that puts it in place, on the current
    stream, and returns; the host may be two steps ahead of the device. The module's docstring says what cannot race.
    """

    def __init__(
        self,
        max_seqs: SupportsIndex,
        max_tokens: SupportsIndex,
        max_blocks_per_seq: SupportsIndex,
        *,
        device: str | torch.device = "cpu",
        groups: SupportsIndex = 1,
        kv_indices: bool = False,
        states: bool = False,
    ) -> None:
        max_seqs = checked_size("max_seqs", max_seqs)
        max_tokens = checked_size("max_tokens", max_tokens)
        max_blocks_per_seq = checked_size("max_blocks_per_seq", max_blocks_per_seq)
        groups = checked_size("groups", groups)
        self.device = checked_device(device)
        fields = _fields(groups, max_seqs, max_tokens, max_blocks_per_seq, kv_indices, states)
        size = sum(map(_aligned_bytes, fields.values()))
        carrier = transport(self.device)
        with torch.inference_mode(False):  # what is made in inference mode could not be filled outside of it
            self._host = _zeroed(size)
            tensors = _carve(self._host, fields)
            super().__init__(**{name: tensor.numpy() for name, tensor in tensors.items()}, uploads=carrier is not None)
            if carrier is not None:
                self._to_device = Upload(carrier, self._host, self._pack_bytes(size))
                tensors = _carve(self._to_device.image, fields)
        self.input_ids = tensors["input_ids"]
        self.positions = tensors["positions"]
        self.slot_mapping = tensors["slot_mapping"]
        self.block_table = tensors["block_table"]
        self.seq_lens = tensors["seq_lens"]
        self.query_start_loc = tensors["query_start_loc"]
        self.kv_indptr = tensors.get("kv_indptr")
        self.kv_indices = tensors.get("kv_indices")
        self.kv_last_page_len = tensors.get("kv_last_page_len")
        self.state_slots = tensors.get("state_slots")
        self.state_zero = tensors.get("state_zero")
        self.state_drafts = tensors.get("state_drafts")
        self._copies_image = tensors["copies"]
        self._state_copies_image = tensors.get("state_copies")
        self._derived: dict[Hashable, Any] = {}
        self._derived_from = self.fills

    @classmethod
    def for_config(
        cls,
        config: CacheConfig,
        *,
        max_seqs: SupportsIndex,
        max_tokens: SupportsIndex,
        max_seq_len: SupportsIndex,
        device: str | torch.device = "cpu",
        kv_indices: bool = False,
    ) -> Self:
        """Buffers whose block table and groups are those of a cache of `config`.

        Args:
            config: of the cache that the passes read.
            max_seqs, max_tokens, device, kv_indices: as for the class.
            max_seq_len: tokens that one sequence has at most, which sizes the block table.

        Raises:
            TypeError: `config` is not a `CacheConfig`, or a size not an integer.
            ValueError, OutOfMemory: as for the class, and for `max_seq_len` likewise.

        Example:
            >>> config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, num_gpu_blocks=64)
            >>> StepBuffers.for_config(config, max_seqs=4, max_tokens=256, max_seq_len=100).max_blocks_per_seq
            7
        """
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config is a {type(config).__name__}; give a CacheConfig")
        return cls(
            max_seqs,
            max_tokens,
            config.num_blocks_for(checked_size("max_seq_len", max_seq_len)),
            device=device,
            groups=len(config.groups),
            kv_indices=kv_indices,
            states=any(tensor.per == "sequence" for layer in config.layers for tensor in layer),
        )

    def __repr__(self) -> str:
        sizes = f"max_seqs={self.max_seqs}, max_tokens={self.max_tokens}, max_blocks_per_seq={self.max_blocks_per_seq}"
        holds = f"num_seqs={self.num_seqs}, num_tokens={self.num_tokens}"
        return f"StepBuffers({sizes}, groups={self.num_groups}, device={str(self.device)!r}; {holds})"

    @property
    def copies(self) -> torch.Tensor:
        """int64 [num_copies, 2]: (source, target) blocks to copy before the step's writes."""
        return self._copies_image[: self.num_copies]

    @property
    def state_copies(self) -> torch.Tensor | None:
        """int64 [num_state_copies, 2]: (source, target) slots to copy before the pass; None unless asked for."""
        return None if self._state_copies_image is None else self._state_copies_image[: self.num_state_copies]

    @property
    def derived(self) -> dict[Hashable, Any]:
        if self._derived_from != self.fills:
            self._derived, self._derived_from = {}, self.fills
        return self._derived

    def _upload(self) -> None:
        try:
            self._to_device.send(self._pack)
        except BaseException:
            self._forget()  # what has arrived is not known: the next step sends everything
            raise


def _fields(
    groups: int, max_seqs: int, max_tokens: int, max_blocks_per_seq: int, kv_indices: bool, states: bool
) -> dict[str, _Field]:
    """The arrays of a step, in the order in which they lie in its image."""
    each = () if groups == 1 else (groups,)
    fields: dict[str, _Field] = {
        "input_ids": (torch.int64, (max_tokens,)),
        "positions": (torch.int64, (max_tokens,)),
        "slot_mapping": (torch.int64, (*each, max_tokens)),
        "copies": (torch.int64, (groups * max_seqs, 2)),
        "block_table": (torch.int32, (*each, max_seqs, max_blocks_per_seq)),
        "seq_lens": (torch.int32, (max_seqs,)),
        "query_start_loc": (torch.int32, (max_seqs + 1,)),
    }
    if kv_indices:
        fields["kv_indptr"] = (torch.int32, (*each, max_seqs + 1))
        fields["kv_indices"] = (torch.int32, (*each, max_seqs * max_blocks_per_seq))
        fields["kv_last_page_len"] = (torch.int32, (max_seqs,))
    if states:
        fields["state_slots"] = fields["state_zero"] = (torch.int64, (max_seqs,))
        fields["state_copies"] = (torch.int64, (max_seqs, 2))
        fields["state_drafts"] = (torch.int64, (max_tokens,))
    return fields


def _nbytes(field: _Field) -> int:
    dtype, shape = field
    return dtype.itemsize * math.prod(shape)


def _aligned_bytes(field: _Field) -> int:
    return -(-_nbytes(field) // _ALIGNMENT) * _ALIGNMENT


def _carve(image: torch.Tensor, fields: dict[str, _Field]) -> dict[str, torch.Tensor]:
    """A tensor for each field, one after the other in the bytes of `image`."""
    tensors, offset = {}, 0
    for name, field in fields.items():
        dtype, shape = field
        tensors[name] = image[offset:][: _nbytes(field)].view(dtype).view(shape)
        offset += _aligned_bytes(field)
    return tensors


def _zeroed(nbytes: int) -> torch.Tensor:
    free, limit = room()
    if nbytes <= free:
        try:
            return zeroed(nbytes)
        except MemoryError as error:
            free, limit = mappable(nbytes), f"what the system maps ({error})"
    message = f"step buffers are {nbytes} bytes, and {free} are available. The limit is {limit}"
    raise OutOfMemory(message, nbytes, free, 0)
