"""The Triton kernels of attention over a paged cache: decodes, split over the sequence, and chunks of prefill.

What they compute is said by `kvblocks.paged_attention`, whose plain torch path is their reference. Lengths
and tables are read on the device only, so a launch can be captured in a CUDA graph and replayed on other batches.
Imports torch, Triton and the layout of blocks.
"""

import functools
import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvblocks.kernels.launch import INTERPRETED, on_device_of, power_of_2
from kvblocks.movement import BlockLayout

__all__ = ["MAX_HEAD_DIM", "MAX_QUERIES_PER_KV", "MAX_QUERY_BYTES", "Form", "attend", "query_bytes"]

MAX_HEAD_DIM = 256  # of K and of V: tiles of more do not fit a multiprocessor's shared memory
MAX_QUERIES_PER_KV = 128  # query heads of one K/V head
MAX_QUERY_BYTES = 32768  # of a tile of queries, which shares that memory with K and V
_SPLITS = (1, 2, 4, 8, 16, 32)
_PROGRAMS = 2  # for each multiprocessor, that a batch of decodes is split into
_LEAST = 256  # tokens of a split
_TILE_BYTES = 16384  # of K or V that are worked on at once
_STAGES = 2  # tiles that are loaded ahead
_LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, slots=True)
class Form:
    """A `BlockLayout` in elements; a constant of the kernels, which read its fields through `value`.

    A head has `dims` dims, of which `run` lie together; runs are `run_stride` apart, tokens of a block `token_stride`,
    heads `head_stride`, blocks `block`.
    """

    block_size: int
    heads: int
    dims: int
    run: int
    block: int
    token_stride: int
    head_stride: int
    run_stride: int

    @classmethod
    def of(cls, layout: BlockLayout, itemsize: int) -> Self:
        """For K or V of one layer whose elements have `itemsize` bytes."""
        return cls(
            block_size=layout.block_size,
            heads=layout.heads,
            dims=layout.runs * layout.run_bytes // itemsize,
            run=layout.run_bytes // itemsize,
            block=layout.block_stride // itemsize,
            token_stride=layout.token_stride // itemsize,
            head_stride=layout.head_stride // itemsize,
            run_stride=layout.run_stride // itemsize,
        )

    @property
    def value(self) -> Self:
        return self

    @property
    def padded(self) -> int:
        return max(16, power_of_2(self.dims))


@triton.jit
def _dims(form: tl.constexpr):
    """Offset of each dim of a head from its first; `padded` of them."""
    dim = tl.arange(0, form.value.padded)
    if form.value.dims == form.value.run:
        return dim
    return dim // form.value.run * form.value.run_stride + dim % form.value.run


@triton.jit
def _row_of(starts, program, num_seqs, queries: tl.constexpr):
    """The last row whose first program, `starts[row] // queries + row`, is not after `program`; num_seqs is padding."""
    low = 0
    high = num_seqs + 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // queries + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit(
    do_not_specialize=["num_seqs", "num_rows", "num_blocks", "capacity", "table_stride", "query_token", "query_head"]
)
def _attend(
    query,
    k_cache,
    v_cache,
    out,
    partial,
    table,
    seq_lens,
    starts,
    sinks,
    num_seqs,
    num_rows,
    num_blocks,
    capacity,
    table_stride,
    query_token,
    query_head,
    scale,
    softcap,
    k_form: tl.constexpr,
    v_form: tl.constexpr,
    queries_per_kv: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    short: tl.constexpr,
    skipped: tl.constexpr,
    splits: tl.constexpr,
    dot: tl.constexpr,
):
    """One K/V head of up to `rows // queries_per_kv` queries of one sequence, over one part of what they reach.

    That is cut into `splits` parts.
    With `short`, program i is sequence i, if that has no more queries than a tile takes, and the programs after those
    are padding. Else tiles are numbered over all sequences; those of at most `skipped` queries are left out.
    """
    queries: tl.constexpr = rows // queries_per_kv
    v_padded: tl.constexpr = v_form.value.padded
    program = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if short:
        row = tl.minimum(program, num_seqs)
        first = (program - row) * queries
    else:
        row = _row_of(starts, program, num_seqs, queries)
        first = (program - (tl.load(starts + row) // queries + row)) * queries
    start = tl.load(starts + row)
    if row < num_seqs:
        query_len = tl.load(starts + row + 1) - start
        seq_len = tl.load(seq_lens + row)
        taken = (query_len <= queries) if short else (query_len > skipped)
    else:
        query_len = num_rows - start
        seq_len = 0
        taken = split == 0
    if taken and first < query_len:
        item = tl.arange(0, rows)
        nth = first + item // queries_per_kv
        valid = (item < queries * queries_per_kv) & (nth < query_len)
        token = (start + nth).to(tl.int64)
        query_heads = head * queries_per_kv + item % queries_per_kv
        dim = tl.arange(0, k_form.value.padded)
        q = tl.load(
            query + (token * query_token + query_heads.to(tl.int64) * query_head)[:, None] + dim[None, :],
            mask=valid[:, None] & (dim < k_form.value.dims)[None, :],
            other=0.0,
        ).to(dot)
        position = seq_len - query_len + nth
        # What any query of the tile reaches: positions low to high - 1.
        earliest = seq_len - query_len + first
        high = tl.minimum(tl.minimum(earliest + queries, seq_len), capacity)
        low = tl.maximum(earliest, 0)
        if window > 0:
            low = tl.maximum(earliest - (window - 1), 0)
        elif chunk == 0:
            low = 0
        if chunk > 0:
            begin = tl.maximum(earliest, 0) // chunk * chunk
            low = tl.maximum(low, begin) if window > 0 else begin
        from_key = low // keys * keys
        to_key = high
        if splits > 1:
            share = tl.cdiv(tl.cdiv(tl.maximum(high - from_key, 0), keys), splits) * keys
            from_key += split * share
            to_key = tl.minimum(high, from_key + share)

        if has_sinks:
            sink = tl.load(sinks + query_heads, mask=valid, other=0.0).to(tl.float32) * _LOG2_E
            largest = tl.where(split == 0, sink, float("-inf"))
            total = tl.full((rows,), 1.0, tl.float32)
        else:
            largest = tl.full((rows,), float("-inf"), tl.float32)
            total = tl.zeros((rows,), tl.float32)
        result = tl.zeros((rows, v_padded), tl.float32)
        v_dim = tl.arange(0, v_padded)
        k_base = k_cache + head.to(tl.int64) * k_form.value.head_stride
        v_base = v_cache + head.to(tl.int64) * v_form.value.head_stride
        blocks = table + row.to(tl.int64) * table_stride
        for key in range(from_key, to_key, keys):
            key_position = key + tl.arange(0, keys)
            there = (key_position >= low) & (key_position < to_key)
            block = tl.load(blocks + key_position // k_form.value.block_size, mask=there, other=-1).to(tl.int64)
            there = there & (block >= 0) & (block < num_blocks)
            offset = (key_position % k_form.value.block_size).to(tl.int64)
            # Slots that nobody has written may hold NaN: they are not loaded, as 0 * NaN would be NaN.
            k = tl.load(
                k_base
                + (block * k_form.value.block + offset * k_form.value.token_stride)[None, :]
                + _dims(k_form)[:, None],
                mask=there[None, :] & (dim < k_form.value.dims)[:, None],
                other=0.0,
            ).to(dot)
            v = tl.load(
                v_base
                + (block * v_form.value.block + offset * v_form.value.token_stride)[:, None]
                + _dims(v_form)[None, :],
                mask=there[:, None] & (v_dim < v_form.value.dims)[None, :],
                other=0.0,
            ).to(dot)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if has_softcap:
                scores = softcap * (1 - 2 / (tl.exp(2 * (scores / softcap)) + 1))  # softcap * tanh(scores / softcap)
            seen = (key_position[None, :] <= position[:, None]) & (key_position < to_key)[None, :]
            if window > 0:
                seen = seen & (key_position[None, :] > position[:, None] - window)
            if chunk > 0:
                seen = seen & (key_position[None, :] // chunk == position[:, None] // chunk)
            scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(largest - safe)
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + tl.dot(weights.to(dot), v, input_precision="ieee")
            largest = new_largest

        inside = valid[:, None] & (v_dim < v_form.value.dims)[None, :]
        heads = tl.num_programs(1) * queries_per_kv
        whole = True
        if splits > 1:
            whole = row == num_seqs
            line = ((row * queries + nth).to(tl.int64) * heads + query_heads) * splits + split
            line = line * (v_form.value.dims + 2)
            tl.store(partial + line, largest, mask=valid & (row < num_seqs))
            tl.store(partial + line + 1, total, mask=valid & (row < num_seqs))
            tl.store(partial + line[:, None] + 2 + v_dim[None, :], result, mask=inside & (row < num_seqs))
        if whole:
            result = result / tl.where(total > 0, total, 1.0)[:, None]
            line = (token * heads + query_heads) * v_form.value.dims
            tl.store(out + line[:, None] + v_dim[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce(partial, out, starts, v_form: tl.constexpr, queries: tl.constexpr, splits: tl.constexpr):
    """Put the parts of one head of one query together; sequences of more than `queries` queries had none."""
    row = tl.program_id(0) // queries
    nth = tl.program_id(0) % queries
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    start = tl.load(starts + row)
    query_len = tl.load(starts + row + 1) - start
    if query_len <= queries and nth < query_len:
        dim = tl.arange(0, v_form.value.padded)
        split = tl.arange(0, splits)
        line = (tl.program_id(0).to(tl.int64) * heads + head) * splits + split
        line = line * (v_form.value.dims + 2)
        largest = tl.load(partial + line)
        total = tl.load(partial + line + 1)
        inside = (dim < v_form.value.dims)[None, :]
        parts = tl.load(partial + line[:, None] + 2 + dim[None, :], mask=inside, other=0.0)
        most = tl.max(largest, 0)
        weight = tl.exp2(largest - tl.where(most == float("-inf"), 0.0, most))
        total = tl.sum(total * weight, 0)
        result = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
        line = ((start + nth).to(tl.int64) * heads + head) * v_form.value.dims
        tl.store(out + line + dim, result.to(out.dtype.element_ty), mask=dim < v_form.value.dims)


def query_bytes(queries_per_kv: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the least tile of queries: those of one token that read one K/V head, padded."""
    return max(16, power_of_2(queries_per_kv)) * max(16, power_of_2(head_dim)) * itemsize


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def attend(
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    forms: tuple[Form, Form],
    table: Tensor,
    seq_lens: Tensor,
    starts: Tensor,
    *,
    num_seqs: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """Attention of a ragged batch; [tokens, heads, v dims], zeros in rows that belong to no sequence.

    Args:
        query: [tokens, heads, dims], float16, bfloat16 or float32, the dims of a head without gaps.
        caches: K and V, any shape, whose first dimension counts blocks; the query's dtype.
        forms: how they lie in memory.
        table: int32 [rows, blocks], the entries of a row without gaps. seq_lens: int32 [rows].
        starts: int32 [rows + 1]: row i's queries are `query[starts[i]:starts[i + 1]]`.
        num_seqs: rows that count. On the device fewer may hold queries.
        max_query_len: no row has more queries, now or when a graph is replayed.
        max_seq_len: only steers how work is split.
        splits: parts that decodes are split into, a power of two up to 32; by default as many as keep the device busy.
    """
    k, v = forms
    heads, kv_heads = query.shape[1], k.heads
    queries_per_kv = heads // kv_heads
    out = query.new_empty(query.shape[0], heads, v.dims)
    if not out.numel():
        return out
    short_rows = max(16, power_of_2(queries_per_kv))
    short_queries = short_rows // queries_per_kv
    long_rows = max(64 if max(k.padded, v.padded) <= 128 else 32, short_rows)
    keys = max(16, min(64, _TILE_BYTES // (max(k.padded, v.padded) * query.itemsize)))
    if splits is None:
        reach = min(max_seq_len, window or max_seq_len, chunk or max_seq_len)
        wanted = min(_PROGRAMS * _multiprocessors(query.device) // max(1, num_seqs * kv_heads), reach // _LEAST)
        splits = max(n for n in _SPLITS if n <= max(1, wanted))
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[query.dtype]
    if INTERPRETED and dot is tl.bfloat16:
        dot = tl.float32  # the interpreter multiplies the bits of bfloat16 as integers
    partial = out
    if splits > 1:
        size = num_seqs * short_queries * heads * splits * (v.dims + 2)
        partial = torch.empty(size, dtype=torch.float32, device=query.device)

    def launch(grid_rows: int, rows: int, *, short: bool, skipped: int, splits: int) -> None:
        _attend[(grid_rows, kv_heads, splits)](
            query,
            *caches,
            out,
            partial,
            table,
            seq_lens,
            starts,
            query if sinks is None else sinks,
            num_seqs,
            query.shape[0],
            len(caches[0]),
            min(table.shape[1] * k.block_size, 2**31 - 1),
            table.stride(0),
            query.stride(0),
            query.stride(1),
            scale,
            0.0 if softcap is None else softcap,
            k,
            v,
            queries_per_kv,
            rows,
            keys,
            window or 0,
            chunk or 0,
            softcap is not None,
            sinks is not None,
            short,
            skipped,
            splits,
            dot,
            num_stages=_STAGES,
        )

    with on_device_of(query):
        mixed = max_query_len > short_queries
        if mixed:
            # A row's tiles begin at `starts[row] // queries + row`: no more than this many begin.
            tiles = query.shape[0] // (long_rows // queries_per_kv) + num_seqs + 1
            launch(tiles, long_rows, short=False, skipped=short_queries if splits > 1 else 0, splits=1)
        if not mixed or splits > 1:
            padding = 0 if mixed else -(-query.shape[0] // short_queries)
            launch(num_seqs + padding, short_rows, short=True, skipped=0, splits=splits)
        if splits > 1:
            _reduce[(num_seqs * short_queries, heads)](partial, out, starts, v, short_queries, splits)
    return out
