from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, Self, SupportsIndex, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from kvblocks.config import CacheConfig, Chunk, Window

# A numpy array, a CPU tensor (both taken without a copy), anything else with an integer buffer, a list, or one int.
_Ints: TypeAlias = Any
_Extra: TypeAlias = Sequence[tuple[int, bytes]]

def _fail_allocation(after: int) -> int: ...

class Admission(IntEnum):
    NOW = 0
    LATER = 1
    NEVER = 2

    def __bool__(self) -> bool: ...

class Lengths(NamedTuple):
    num_cached: npt.NDArray[np.int64]
    num_computed: npt.NDArray[np.int64]
    reserved: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]

class Stats(NamedTuple):
    admitted: int
    prompt_tokens: int
    hit_tokens: int
    evictions: int
    preemptions: int
    resumed: int
    published: int
    merged: int
    copies: int
    peak_used_blocks: int

@disjoint_base
class StepArrays:
    num_groups: int
    max_seqs: int
    max_tokens: int
    max_blocks_per_seq: int
    num_seqs: int
    num_tokens: int
    num_copies: int
    needs: int
    manager: BlockManager | None
    @property
    def waits(self) -> bool: ...
    max_query_len: int
    max_seq_len: int
    def __init__(
        self,
        input_ids: Any,
        positions: Any,
        slot_mapping: Any,
        block_table: Any,
        seq_lens: Any,
        query_start_loc: Any,
        copies: Any,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_last_page_len: Any = None,
        *,
        uploads: bool = False,
    ) -> None: ...
    def _upload(self) -> None: ...
    def _pack(self, image: int, out: int) -> tuple[int, int, int, int]: ...
    def _pack_bytes(self, image_bytes: int) -> int: ...
    def _forget(self) -> None: ...

@final
class BlockManager:
    def __new__(
        cls,
        num_blocks: int,
        block_size: int,
        *,
        groups: Sequence[Window | Chunk | None] = (None,),
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
    ) -> Self: ...
    @classmethod
    def for_config(
        cls,
        config: CacheConfig,
        *,
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
    ) -> Self: ...
    @property
    def num_resets(self) -> int: ...
    @property
    def moves_marked(self) -> int: ...
    @property
    def groups(self) -> tuple[Window | Chunk | None, ...]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def usage(self) -> float: ...
    def admit(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        reserve: SupportsIndex | None = None,
        max_hit: SupportsIndex | None = None,
    ) -> tuple[int, int]: ...
    def match(
        self, tokens: _Ints, *, salt: bytes = b"", extra: _Extra = (), max_hit: SupportsIndex | None = None
    ) -> int: ...
    def blocks_needed(
        self, num_tokens: int, *, reserve: SupportsIndex | None = None, max_new_tokens: int = 1
    ) -> int: ...
    def can_admit(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        reserve: SupportsIndex | None = None,
        max_hit: SupportsIndex | None = None,
        max_new_tokens: int = 1,
    ) -> Admission: ...
    def append(self, seqs: _Ints, tokens: _Ints | None = None, *, extra: Iterable[_Extra] | None = None) -> None: ...
    def extend(
        self, seqs: _Ints, tokens: _Ints | None, counts: _Ints, *, extra: Iterable[_Extra] | None = None
    ) -> None: ...
    def set_tokens(self, seqs: _Ints, tokens: _Ints, counts: _Ints | None = None) -> None: ...
    def prepare(self, seqs: _Ints, query_lens: _Ints, step: StepArrays) -> int: ...
    def mark_moved(self, number: int) -> None: ...
    def commit(self, step_id: int, accepted: _Ints | None = None) -> None: ...
    def abort(self, step_id: int) -> None: ...
    def trim(self, seq: int, num_tokens: int) -> None: ...
    def fork(self, seq: int, n: int = 1) -> list[int]: ...
    def reorder(self, seqs: _Ints, parents: _Ints) -> None: ...
    def free(self, seqs: _Ints) -> None: ...
    def preempt(self, seq: int) -> None: ...
    def resume(
        self, seq: int, *, reserve: SupportsIndex | None = None, max_hit: SupportsIndex | None = None
    ) -> int: ...
    def pin(self, tokens: _Ints, *, salt: bytes = b"", extra: _Extra = ()) -> int: ...
    def unpin(self, handle: int) -> None: ...
    def block_table(self, seq: int) -> npt.NDArray[np.int32]: ...
    def tokens(self, seq: int) -> npt.NDArray[np.int32]: ...
    def lengths(self, seqs: _Ints) -> Lengths: ...
    def stats(self) -> Stats: ...
    def reset_prefix_cache(self) -> None: ...
    def audit(self) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    def _collide(self) -> None: ...
    def _longest_walk(self) -> int: ...
    def _poke(self, field: str, index: int, value: int) -> None: ...
