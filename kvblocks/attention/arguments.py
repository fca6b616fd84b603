"""What a call of attention is asked for: the step that it reads, and its checked arguments.

Below the call and the kernels, which both import it. Imports torch and storage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvblocks.storage.cache import PagedKVCache

__all__ = ["Arguments", "Kernel", "StepLike"]


class StepLike(Protocol):
    """What attention reads of a forward pass; `StepBuffers` is one.

    `block_table` int32 [max_seqs, max_blocks_per_seq], or one for each layer group, [groups, ...]; `seq_lens` int32
    [max_seqs] (tokens of each row, those of this pass included), `query_start_loc` int32 [max_seqs + 1]: only the first
    `num_seqs` rows count. Row i's queries are `query[query_start_loc[i]:query_start_loc[i + 1]]`, the last tokens of
    its sequence.
    """

    @property
    def block_table(self) -> Tensor: ...
    @property
    def seq_lens(self) -> Tensor: ...
    @property
    def query_start_loc(self) -> Tensor: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def max_query_len(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a call, checked; `step` has at least one token."""

    query: Tensor
    cache: PagedKVCache
    step: StepLike
    table: Tensor  # of the layer's group
    scale: float
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def longest(self) -> int:
        """Tokens that a row may have: now, or when a graph that is being captured is replayed."""
        if self.query.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.table.shape[1] * self.cache.block_size
        return self.step.max_seq_len


Kernel = Callable[[Arguments], Tensor]
