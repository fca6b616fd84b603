"""Attention over the paged cache for a ragged batch: the call, and plain torch that is right everywhere.

On CPU a compiled kernel attends, on CUDA one that `backends` picks. Plain torch is the reference for both, and takes
what they do not. Nothing is written to the cache here. Imports torch, storage, the compiled kernel and `backends`.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from kvblocks.attention.arguments import Arguments, StepLike
from kvblocks.attention.backends import kernel_for
from kvblocks.checks import dense, has_memory, once
from kvblocks.config import Chunk, Window
from kvblocks.cpu_attention import attend
from kvblocks.errors import MovesPending
from kvblocks.sizes import checked_size
from kvblocks.storage import cache as storage
from kvblocks.storage.cache import PagedKVCache

__all__ = ["paged_attention"]

_GATHERED = 1 << 18  # elements of K and V that rows gathered together may have: it pays for short rows only
_SCORES = 1 << 23  # scores held at once: long prefill chunks go through in slices of queries,
_QUERIES = 512  # and in slices of so many, as a slice's keys end at its last query

_COMPILED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def paged_attention(
    query: Tensor,
    cache: PagedKVCache,
    step: StepLike,
    *,
    group: int | None = None,
    scale: float | None = None,
    window: SupportsIndex | None = None,
    chunk: SupportsIndex | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of this pass's tokens over the cached K and V of their own sequences.

    The K and V of this pass must have been written before. Prefill chunks and decodes may be mixed. Scores and sums are
    float32, float64 where the cache is. What lies in a slot at or past a sequence's length never reaches the output.

    Args:
        query: [tokens, heads, head_dim] of the cache's dtype, on its device. `heads` is a multiple of the cache's:
            query head h reads K/V head `h // (heads / cache.num_heads)`. Rows past `step.num_tokens` are padding.
        cache: one layer. Of a cache that a `CacheEngine` made the layer group and its reach are known, and `group`,
            `window` and `chunk` can be left out.
        step: block tables and lengths of the pass.
        group: layer group that the layer is in, whose block table is read. Needed only for a cache that was made alone,
            with a step of several groups.
        scale: factor of the scores; `1 / sqrt(head_dim)` by default.
        window: a token attends to the last `window` tokens, itself counted. By default as far as the cache's group
            reaches; less far is allowed, further is an error, as the blocks there belong to others.
        chunk: a token attends within its own chunk of `chunk` positions; likewise.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: [heads]: one more score per head that takes part in the softmax and brings no value (gpt-oss).

    Returns:
        [tokens, heads, v_head_dim] of the query's dtype; zeros in the rows that are padding.

    Raises:
        TypeError: the cache's dtype is not one of float16, bfloat16, float32, float64 (8-bit caches would need scales),
            or the query's differs from it.
        ValueError: the cache's layer keeps no key and value; a shape, device, length or option is not as above, or the
            group is not the cache's or the reach further than its group's. Nothing has been computed.
        MovesPending: blocks that the step has to copy first were not copied; see `CacheEngine.move`.

    For inference: no gradient flows through it. On a CUDA device the work is done by torch's `varlen_attn` where a
    backend that takes block tables is active (`torch.nn.attention.activate_flash_attention_impl`), else by a Triton
    kernel, else, for what neither takes, by plain torch; which one is logged once by "kvblocks", with the reason. The
    kernels do not wait for the device and can be captured in a CUDA graph: its replays may hold fewer sequences and
    tokens than the step that was captured, and longer sequences, but no row of more than its `max_query_len` queries.
    There, the contents of lengths and tables are checked only by plain torch, and with KVBLOCKS_CHECKED=1.
    """
    if getattr(step, "waits", False):
        raise MovesPending("the step has blocks to copy before its pass: call engine.move(step) first", 0)
    index = _group(cache, step, group)
    table = once(step, ("table", index), lambda: step.block_table if index is None else step.block_table[index])
    _check(query, cache, step, sinks)
    if softcap is not None and not 0 < _number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap={softcap} must be above 0 and finite, or None")
    scale = 1 / math.sqrt(cache.head_dim) if scale is None else _number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    reach = _Reach.checked(window, chunk, cache.reach)
    if query.is_cuda and step.num_tokens:
        cap = None if softcap is None else float(softcap)
        args = Arguments(query, cache, step, table, scale, reach.window, reach.chunk, cap, sinks)
        run = kernel_for(args)
        if run is not None:
            if storage.CHECKED:
                _rows(step, table, cache.block_size, reach)
            with torch.no_grad():
                return run(args)
    if query.is_cpu and query.dtype in _COMPILED and step.num_tokens:
        lists = once(step, ("lists", index), lambda: _lists(step, table))
        return _on_cpu(query, cache, step, lists, scale, reach, softcap, sinks)
    return _on_torch(query, cache, step, table, scale, reach, softcap, sinks)


def _lists(step: StepLike, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block table, lengths and query starts in the form that the compiled kernel reads, with enough rows.

    The kernel checks their contents in each call: these decide where memory is read, and may have changed meanwhile.
    """
    table = _ints("step.block_table", table)
    lens, starts = _ints("step.seq_lens", step.seq_lens), _ints("step.query_start_loc", step.query_start_loc)
    if not 0 <= step.num_seqs <= min(table.shape[0], lens.shape[0], starts.shape[0] - 1):
        raise ValueError(f"the step's arrays hold fewer rows than num_seqs={step.num_seqs}")
    return table, lens, starts


def _on_cpu(
    query: Tensor,
    cache: PagedKVCache,
    step: StepLike,
    lists: tuple[Tensor, Tensor, Tensor],
    scale: float,
    reach: "_Reach",
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """By the compiled kernel, which reads K and V where they lie."""
    query = has_memory("query", query)
    if query.is_neg():
        query = query.resolve_neg()
    if query.stride(2) != 1 and query.shape[2] > 1:
        query = query.contiguous()
    table, lens, starts = lists
    num_tokens = step.num_tokens
    if sinks is not None:
        sinks = has_memory("sinks", sinks).to(torch.float32).contiguous()
    if cache.v_head_dim == query.shape[2]:  # the usual case, in a third of the time
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        output = query.new_empty(*query.shape[:2], cache.v_head_dim)
    if num_tokens < output.shape[0]:
        output[num_tokens:] = 0
    keys, values = cache.block_layouts
    size = query.itemsize
    bad = attend(
        keys,
        cache.key_cache.data_ptr(),
        values,
        cache.value_cache.data_ptr(),
        _COMPILED[query.dtype],
        query.data_ptr(),
        query.stride(0) * size,
        query.stride(1) * size,
        query.shape[1],
        output.data_ptr(),
        num_tokens,
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        lens.data_ptr(),
        starts.data_ptr(),
        step.num_seqs,
        scale,
        reach.window or 0,
        reach.chunk or 0,
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        _listed(step, table.shape[1], cache.block_size, reach)  # says which lengths do not fit
        raise ValueError(f"row {bad} of the block table names a block outside of 0..{cache.num_blocks - 1}")
    return output


def _ints(name: str, ints: Tensor) -> Tensor:
    """As int32 in CPU memory, whose last dim has no gaps."""
    ints = has_memory(name, ints if ints.is_cpu else ints.cpu())
    if ints.dtype != torch.int32:
        ints = ints.to(torch.int32)
    return ints if ints.stride(-1) == 1 else ints.contiguous()


@torch.no_grad()
def _on_torch(
    query: Tensor,
    cache: PagedKVCache,
    step: StepLike,
    table: Tensor,
    scale: float,
    reach: "_Reach",
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    rows = _rows(step, table, cache.block_size, reach)
    output = query.new_zeros(*query.shape[:2], cache.v_head_dim)
    for batch in _batches(rows, cache):
        keys, values = _gather(batch, cache, table)
        start, position, origin = _column(
            [(row.start, row.seq_len - row.query_len, row.first * cache.block_size) for row in batch], query.device
        )
        row, length = batch[0], keys.shape[2]
        per_slice = max(1, min(_QUERIES, _SCORES // (len(batch) * query.shape[1] * length)))
        for low in range(0, row.query_len, per_slice):
            high = min(row.query_len, low + per_slice)
            queries = torch.arange(low, high, device=query.device)
            first, last, hidden = 0, length, None
            if len(batch) == 1:
                before = row.seq_len - row.query_len
                first = reach.start(before + low) - row.first * cache.block_size
                last = before + high - row.first * cache.block_size
            if len(batch) > 1 or high - low > 1:
                positions = origin + torch.arange(first, last, device=query.device)
                hidden = reach.hidden(positions[:, None, :], (position + queries)[:, :, None])
            output[start + queries] = _attend(
                query[start + queries], keys[:, :, first:last], values[:, :, first:last], hidden, scale, softcap, sinks
            )
    return output


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far back a token attends."""

    window: int | None
    chunk: int | None

    @staticmethod
    def checked(window: SupportsIndex | None, chunk: SupportsIndex | None, kept: Window | Chunk | None) -> "_Reach":
        """The reach that was asked for, by default `kept`, which is what the cache's group keeps blocks for."""
        if window is None and chunk is None:
            return _whole(kept)
        asked = _Reach(
            None if window is None else checked_size("window", window),
            None if chunk is None else checked_size("chunk", chunk),
        )
        if kept is not None and not asked.within(kept):
            raise ValueError(
                f"window={asked.window} and chunk={asked.chunk} reach further than {kept}, for which the cache's layer "
                "group keeps blocks; leave both out, or attend less far"
            )
        return asked

    def within(self, kept: Window | Chunk) -> bool:
        """Whether no token attends further than `kept` does."""
        if isinstance(kept, Window):
            return min(size for size in (self.window, self.chunk) if size is not None) <= kept.size
        return self.window == 1 or (self.chunk is not None and kept.size % self.chunk == 0)

    def start(self, position: int) -> int:
        """The first position that a token at `position` attends to."""
        start = 0 if self.window is None else max(0, position - self.window + 1)
        return start if self.chunk is None else max(start, position // self.chunk * self.chunk)

    def hidden(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Whether a key's position is out of a query's reach; the two broadcast."""
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        if self.chunk is not None:
            hidden |= keys // self.chunk != queries // self.chunk
        return hidden


@functools.cache
def _whole(kept: Window | Chunk | None) -> _Reach:
    """The reach of all that a group keeps blocks for."""
    if kept is None:
        return _Reach(None, None)
    return _Reach(kept.size, None) if isinstance(kept, Window) else _Reach(None, kept.size)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence of the batch; its queries reach columns `first` to `last` of its block table, both included."""

    index: int
    start: int
    query_len: int
    seq_len: int
    first: int
    last: int

    @property
    def num_blocks(self) -> int:
        return self.last - self.first + 1


def _number(name: str, value: float) -> float:
    if type(value) is float:  # to ask for `SupportsFloat` takes longer than all the rest
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} is a {type(value).__name__}; give a number")
    return float(value)


def _group(cache: PagedKVCache, step: StepLike, group: int | None) -> int | None:
    """The cache's layer group as an index into the step's block tables; None where the step has one table."""
    tables = step.block_table
    groups = tables.shape[0] if tables.ndim == 3 else 1
    if cache.group is not None:
        if groups != cache.num_groups:
            raise ValueError(
                f"the step has {groups} layer groups, and the engine of this cache {cache.num_groups}; make both from "
                "one CacheConfig"
            )
        if group is not None and (isinstance(group, bool) or group != cache.group):
            raise ValueError(f"group={group!r} is not this cache's, {cache.group}; leave it out")
        group = cache.group
    elif group is None:
        if groups > 1:
            raise ValueError(
                f"the step has {groups} layer groups, and a cache that was made alone is of none; give group=, "
                "or take the cache of a CacheEngine"
            )
        group = 0
    if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < groups:
        raise ValueError(f"group={group!r} must be 0 to {groups - 1}: the step has {groups} layer groups")
    return group if tables.ndim == 3 else None


def _check(query: Tensor, cache: PagedKVCache, step: StepLike, sinks: Tensor | None) -> None:
    if not cache.has_key_value:
        raise ValueError(f"the cache's layer keeps {', '.join(cache.tensors)}; attention reads key and value")
    if cache.dtype not in _FLOATS:
        raise TypeError(f"the cache holds {cache.dtype}; attention takes {', '.join(map(str, _FLOATS))}")
    dense("query", query)
    if query.dtype != cache.dtype:
        raise TypeError(f"query is {query.dtype} and the cache {cache.dtype}; they must be the same")
    if query.ndim != 3 or query.shape[2] != cache.head_dim or not query.shape[1] or query.shape[1] % cache.num_heads:
        raise ValueError(
            f"query has shape {list(query.shape)}; give [tokens, heads, {cache.head_dim}] with heads a multiple of "
            f"the cache's {cache.num_heads}"
        )
    if query.shape[0] < step.num_tokens:
        raise ValueError(f"query has {query.shape[0]} rows, fewer than the step's num_tokens={step.num_tokens}")
    if sinks is not None:
        if not isinstance(sinks, Tensor):
            raise TypeError(f"sinks is a {type(sinks).__name__}; give a tensor")
        dense("sinks", sinks)
    for name, tensor in (("query", query), ("step.block_table", step.block_table), ("sinks", sinks)):
        if tensor is not None and tensor.device != cache.device:
            raise ValueError(f"{name} is on {tensor.device} and the cache on {cache.device}; move one of them")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks has shape {list(sinks.shape)}; give one for each of the {query.shape[1]} query heads")


def _rows(step: StepLike, table: Tensor, block_size: int, reach: _Reach) -> list[_Sequence]:
    """The rows of a pass, checked: listed once for all layers of equal reach, as on a device that waits for it."""
    columns = table.shape[1]
    return once(step, ("rows", columns, block_size, reach), lambda: _listed(step, columns, block_size, reach))


def _listed(step: StepLike, columns: int, block_size: int, reach: _Reach) -> list[_Sequence]:
    starts = step.query_start_loc[: step.num_seqs + 1].tolist()
    lens = step.seq_lens[: step.num_seqs].tolist()
    if starts[0] != 0 or starts[-1] != step.num_tokens:
        raise ValueError(
            f"step.query_start_loc runs from {starts[0]} to {starts[-1]}; it must run from 0 to num_tokens="
            f"{step.num_tokens}"
        )
    capacity = columns * block_size
    rows = []
    for index, (seq_len, start, stop) in enumerate(zip(lens, starts, starts[1:], strict=False)):
        query_len = stop - start
        if not 1 <= query_len <= seq_len or seq_len > capacity:
            raise ValueError(
                f"row {index} of the step has {query_len} queries and seq_lens={seq_len}; there must be 1 to seq_lens "
                f"queries, and {columns} blocks of {block_size} hold {capacity} tokens"
            )
        first = reach.start(seq_len - query_len) // block_size
        rows.append(_Sequence(index, start, query_len, seq_len, first, (seq_len - 1) // block_size))
    return rows


def _size(row: _Sequence, cache: PagedKVCache) -> int:
    """Elements of K and V in the blocks that a row reaches."""
    return row.num_blocks * cache.block_size * cache.num_heads * (cache.head_dim + cache.v_head_dim)


def _batches(rows: list[_Sequence], cache: PagedKVCache) -> Iterator[list[_Sequence]]:
    """Rows with equally many queries, together as long as their padded K and V stay small."""
    batch: list[_Sequence] = []
    for row in sorted(rows, key=lambda row: (row.query_len, row.num_blocks)):
        if batch and (row.query_len != batch[0].query_len or (len(batch) + 1) * _size(row, cache) > _GATHERED):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _column(rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """The columns of a table of ints, each [rows, 1]."""
    return torch.unbind(torch.tensor(rows, device=device)[:, :, None], 1)


def _key_value(cache: PagedKVCache, blocks: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    gathered = dict(zip(cache.tensors, cache.gather(blocks, num_tokens), strict=True))
    return gathered["key"], gathered["value"]


def _gather(batch: list[_Sequence], cache: PagedKVCache, table: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of the blocks that the rows reach: [rows, kv heads, length, dim], from the start of their block `first`.

    Of one row exactly its tokens are read. Several rows are padded with their own last block, and their values at and
    past their length are zeroed: a weight of 0 would not do, as 0 * NaN is NaN.
    """
    size, device = cache.block_size, table.device
    if len(batch) == 1:
        row = batch[0]
        blocks = table[row.index, row.first : row.last + 1]
        keys, values = _key_value(cache, blocks, row.seq_len - row.first * size)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    index, first, last, lens = _column(
        [(row.index, row.first, row.last, row.seq_len - row.first * size) for row in batch], device
    )
    num_blocks = batch[-1].num_blocks
    blocks = table[index, torch.minimum(first + torch.arange(num_blocks, device=device), last)]
    length = num_blocks * size
    keys, values = _key_value(cache, blocks.flatten(), len(batch) * length)
    unused = torch.arange(length, device=device) >= lens
    values.index_fill_(0, unused.flatten().nonzero()[:, 0], 0)
    # Head by head without gaps: matmul would copy to that form too, and slower.
    keys = keys.view(len(batch), length, *keys.shape[1:]).transpose(1, 2).contiguous()
    return keys, values.view(len(batch), length, *values.shape[1:]).transpose(1, 2).contiguous()


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention of [rows, queries, heads, dim] over [rows, kv heads, keys, dim] without what is hidden.

    `hidden` is [rows, queries, keys]; returns [rows, queries, heads, v_head_dim] of the query's dtype.
    """
    rows, queries, heads, dim = query.shape
    kv_heads = keys.shape[1]
    plain = softcap is None and sinks is None
    if plain and query.is_cpu and rows == 1 and queries > 1 and hidden is not None and values.shape[3] == dim:
        # Torch's fused kernel, which would let NaN in unused slots pass; a single row brings no such slot.
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=~hidden[:, None], scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2)
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries_per_kv = heads // kv_heads
    # The query heads of one K/V head and the queries make one axis, so that K and V are read once and not repeated.
    grouped = query.view(rows, queries, kv_heads, queries_per_kv, dim).permute(0, 2, 3, 1, 4).to(compute).mul(scale)
    scores = grouped.flatten(2, 3) @ keys.to(compute).transpose(2, 3)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(rows, kv_heads, queries_per_kv, queries, -1)
    if hidden is not None:
        scores.masked_fill_(hidden[:, None, None], -math.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks.to(compute).view(kv_heads, queries_per_kv, 1, 1)
        largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        weights = scores.sub_(largest).exp_()
        weights.div_(weights.sum(-1, keepdim=True) + (sinks - largest).exp_())
    output = (weights.flatten(2, 3) @ values.to(compute)).view(rows, kv_heads, queries_per_kv, queries, -1)
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)
