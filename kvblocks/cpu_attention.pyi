from collections.abc import Callable

from kvblocks.movement import BlockLayout

__all__ = ["attend", "best_isa"]

def best_isa() -> int:
    """The best instruction set that there is code for on this processor: 0 plain C, 1 AVX2, 2 AVX-512."""

def attend(
    key_layout: BlockLayout,
    key_cache: int,
    value_layout: BlockLayout,
    value_cache: int,
    dtype: str,
    query: int,
    query_token: int,
    query_head: int,
    heads: int,
    out: int,
    num_tokens: int,
    table: int,
    table_stride: int,
    columns: int,
    seq_lens: int,
    query_start_loc: int,
    num_seqs: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: int,
    threads: int,
    workspace: Callable[[int], int],
    isa: int = -1,
) -> int:
    """Causal attention of a ragged batch over the blocks of its rows; returns the first row that cannot be, else -1.

    Addresses and strides are in bytes; each argument is explained in the source.
    """
