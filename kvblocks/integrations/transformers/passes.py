"""One row of a batch, one forward pass over the rows, and one prompt: what `rows` works with. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Ids", "Pass", "Prompt", "Row"]

Ids: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True)
class Row:
    """One row of a batch.

    Its tokens are half-open ranges from 0. `[0, real)` have ids that the user gave. `[0, known)` have any ids. The K
    and V of `[0, computed)` are written, or are being written by the running pass. `[0, total)` are in the manager's
    sequence.
    """

    handle: int
    pad: int  # columns before its first token
    computed: int = 0
    total: int = 0
    known: int = 0
    real: int = 0

    def at(self, columns: int) -> int:
        """How many of its tokens lie in the first `columns` columns."""
        return max(0, columns - self.pad)


@dataclass(eq=False)
class Pass:
    """One forward pass over `count` new columns, from the first layer that writes to the last.

    Attributes:
        batch: rows of the tensors; `factor` of them stand for one row here, and hold the same.
        before: columns that were there.
        slots: int64 [groups, n]: where those new tokens go that have no K and V yet.
        chosen: int64 [n]: which of the `rows * count` new tokens these are; None for all, in order.
        tables: int32 [groups, rows, blocks].
        gathered_at: int64 [rows, before + count]: where each column's token lies among all tokens of `tables`; None
            where row i has column c at `i * blocks * block_size + c`.
        padding: bool [rows, before + count], where `gathered_at` means nothing.
        written: layers that have written.
        indexed: layers that have given their index keys.
        index_keys: by layer those that came before their K and V, [rows of the batch, count, dim].
        checkpoints: (row, slot) of each row whose states are to be kept in that slot after the pass.
        saved: the rows as they were, None where the pass made them.
    """

    batch: int
    factor: int
    before: int
    count: int
    slots: Tensor
    tables: Tensor
    chosen: Tensor | None = None
    gathered_at: Tensor | None = None
    padding: Tensor | None = None
    step_id: int | None = None
    checkpoints: Sequence[tuple[int, int]] = ()
    saved: list[Row] | None = None
    written: set[int] = field(default_factory=set)
    indexed: set[int] = field(default_factory=set)
    index_keys: dict[int, Tensor] = field(default_factory=dict)
    dropped: bool = False


@dataclass(frozen=True)
class Prompt:
    """One row of a batch as `begin` is told of it: its ids without padding, and what else decides its K and V.

    Attributes:
        whole: half-open ranges of its tokens, each of an image: computed in one pass or found, never a part of it.
    """

    ids: Ids
    pad: int
    salt: bytes = b""
    extra: Sequence[tuple[int, bytes]] = ()
    whole: Sequence[tuple[int, int]] = ()
