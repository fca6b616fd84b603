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
    isa: int = -1,
) -> int:
    """Causal attention of a ragged batch over the blocks of its rows.

    Args:
        key_layout, key_cache, value_layout, value_cache: how K and V lie, and their addresses.
        dtype: of K, V, queries and output: "float32", "bfloat16" or "float16".
        query, query_token, query_head, heads: address of [num_tokens, heads, dim], and its strides in bytes; dims
            touch.
        out: address of [num_tokens, heads, v dim], without gaps.
        num_tokens: rows of `query` that count.
        table, table_stride, columns: int32 [num_seqs, columns], rows `table_stride` elements apart.
        seq_lens, query_start_loc: int32 [num_seqs] and [num_seqs + 1].
        scale, window, chunk, softcap: as in `kvblocks.paged_attention`; 0 for no window, chunk or cap.
        sinks: address of float32 [heads], or 0.
        threads: that may work at once.
        isa: the instruction set, by default the best; a lower one is for tests.

    Returns:
        -1; or the number of the first row whose lengths do not fit together or whose table names a block that does not
        exist, and nothing was computed.

    Raises:
        MemoryError: there is no memory for what threads work in; nothing was computed.
    """
