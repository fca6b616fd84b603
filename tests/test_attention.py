"""`paged_attention` against a dense softmax in float64, over pools whose every unused slot is NaN."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from without_memory import WITHOUT_MEMORY

from kvblocks.attention import call
from kvblocks.attention.call import paged_attention
from kvblocks.cpu_attention import attend, best_isa
from kvblocks.sizes import LAYOUTS
from kvblocks.storage.cache import PagedKVCache

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ISAS = ["plain C", "AVX2", "AVX-512"]


@dataclass
class Step:
    """The arrays of a pass, written down by hand; rows past `num_seqs` say nonsense."""

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int


@dataclass
class Case:
    """A ragged batch: (seq_len, query_len) of each row, sizes, and what attention is told."""

    rows: list[tuple[int, int]]
    block_size: int = 4
    kv_heads: int = 2
    groups: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "NHD"
    options: dict[str, Any] = field(default_factory=dict)
    with_sinks: bool = False
    padding: int = 0
    seed: int = 0
    device: str = "cpu"

    def build(self) -> "Built":
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

        blocks = [-(-seq_len // self.block_size) for seq_len, _ in self.rows]
        num_blocks = sum(blocks) + 2
        order = torch.randperm(num_blocks, generator=generator).tolist()
        cache = PagedKVCache(
            num_blocks,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.dtype,
            self.device,
            layout=self.layout,
            v_head_dim=self.v_head_dim,
        )
        cache.key_cache.fill_(math.nan)
        cache.value_cache.fill_(math.nan)
        # Entries that no row needs name no block at all.
        table = torch.full((len(self.rows) + 2, max(blocks) + 1), 2**31 - 1, dtype=torch.int32)
        keys, values, queries = [], [], []
        for row, (seq_len, query_len) in enumerate(self.rows):
            mine = [order.pop() for _ in range(blocks[row])]
            table[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            slots = [mine[i // self.block_size] * self.block_size + i % self.block_size for i in range(seq_len)]
            keys.append(normal(seq_len, self.kv_heads, self.head_dim))
            values.append(normal(seq_len, self.kv_heads, self.v_head_dim))
            queries.append(normal(query_len, self.kv_heads * self.groups, self.head_dim))
            cache.write(keys[-1], values[-1], slots)
        lens = [query_len for _, query_len in self.rows]
        starts = torch.tensor([0, *lens, 0, 0]).cumsum(0).to(torch.int32)
        lens_and_nonsense = torch.tensor([seq_len for seq_len, _ in self.rows] + [2**31 - 1, -7], dtype=torch.int32)
        step = Step(
            block_table=table.to(self.device),
            seq_lens=lens_and_nonsense.to(self.device),
            query_start_loc=starts.to(self.device),
            num_seqs=len(self.rows),
            num_tokens=sum(lens),
            max_query_len=max(lens),
            max_seq_len=max(seq_len for seq_len, _ in self.rows),
        )
        query = torch.cat([*queries, queries[0].new_full((self.padding, *queries[0].shape[1:]), math.nan)])
        sinks = normal(self.kv_heads * self.groups) * 2 if self.with_sinks else None
        return Built(self, cache, step, query, keys, values, sinks)


@dataclass
class Built:
    case: Case
    cache: PagedKVCache
    step: Step
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    sinks: Tensor | None

    def paged(self, **options: Any) -> Tensor:
        return paged_attention(
            self.query, self.cache, self.step, **{"sinks": self.sinks, **self.case.options, **options}
        )

    def dense(self) -> Tensor:
        """What comes out when every row has its K and V in one piece, in float64."""
        parts, start = [], 0
        for keys, values, (_, query_len) in zip(self.keys, self.values, self.case.rows, strict=True):
            query = self.query[start : start + query_len].double()
            parts.append(dense_attention(query, keys.double(), values.double(), sinks=self.sinks, **self.case.options))
            start += query_len
        return torch.cat([*parts, parts[0].new_zeros(self.case.padding, *parts[0].shape[1:])])

    def check(self) -> None:
        output = self.paged()
        assert output.dtype == self.case.dtype
        # The inputs are the same numbers on both sides: what is left is float32 arithmetic and rounding the output.
        tolerance = 1e-12 if self.case.dtype == torch.float64 else 2e-5 + 2 * torch.finfo(self.case.dtype).eps
        torch.testing.assert_close(output.double(), self.dense(), rtol=tolerance, atol=tolerance)


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [q, heads, dim] of the last q tokens, keys and values [n, kv heads, dim]; one query at a time."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    rows = []
    for position, vector in enumerate(query, len(keys) - len(query)):
        low = 0
        if window is not None:
            low = max(low, position - window + 1)
        if chunk is not None:
            low = max(low, position - position % chunk)
        scores = torch.einsum("nhd,hd->hn", keys[low : position + 1], vector) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        weights = scores.softmax(1)[:, : position + 1 - low]
        rows.append(torch.einsum("hn,nhd->hd", weights, values[low : position + 1]))
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def lens() -> tuple[int, int]:
        seq_len = draw(st.integers(1, 40))
        return seq_len, draw(st.sampled_from([1, seq_len, draw(st.integers(1, seq_len))]))

    dtype = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {}
    for name, values in (
        ("window", st.integers(1, 45)),
        ("chunk", st.integers(1, 45)),
        ("softcap", st.sampled_from([0.5, 2.0, 30.0])),
        ("scale", st.sampled_from([0.1, 1.0])),
    ):
        if draw(st.booleans()):
            options[name] = draw(values)
    layout = draw(st.sampled_from(LAYOUTS))
    return Case(
        rows=[lens() for _ in range(draw(st.integers(1, 6)))],
        block_size=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64])),
        kv_heads=draw(st.sampled_from([1, 2, 3, 9])),
        groups=draw(st.sampled_from([1, 2, 3, 7, 33])),
        head_dim=draw(st.sampled_from([8, 16, 24] if layout == "X" else [1, 8, 16, 20, 24, 33])),
        v_head_dim=draw(st.sampled_from([1, 8, 16, 20, 24, 33])),
        dtype=dtype,
        layout=layout,
        options=options,
        with_sinks=draw(st.booleans()),
        padding=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


WAYS = ["plain torch", *(f"compiled, {name}" for name in ISAS[: best_isa() + 1])]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """How attention is computed on CPU: every way that there is, whatever would be chosen."""
    name: str = request.param
    if name.startswith("compiled"):
        isa = ISAS.index(name.removeprefix("compiled, "))
        with mock.patch.object(call, "attend", functools.partial(attend, isa=isa)):
            yield
    else:
        with mock.patch.object(call, "_COMPILED", {}):
            yield


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_equals_dense_attention(case: Case) -> None:
    case.build().check()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[(9, 3), (7, 3), (3, 3)], [(21, 8)], [(9, 1), (2, 1)], [(5, 5), (1, 1), (12, 7)]])
def test_kinds_of_batches(rows: list[tuple[int, int]], layout: str, dtype: torch.dtype) -> None:
    for options in ({"scale": 1.0}, {"window": 3}, {"chunk": 4}, {"softcap": 1.5}):
        Case(rows, dtype=dtype, layout=layout, options=dict(options)).build().check()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_cuda_device(layout: str, dtype: torch.dtype) -> None:
    rows = [(9, 3), (7, 3), (21, 8), (9, 1), (2, 1), (5, 5)]
    for options in ({"scale": 1.0}, {"window": 3}, {"chunk": 4}, {"softcap": 1.5}):
        case = Case(rows, dtype=dtype, layout=layout, options=dict(options), padding=2, device="cuda")
        case.build().check()
        replace(case, with_sinks=True).build().check()


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_blocks_out_of_reach_are_never_read(case: Case) -> None:
    """In a windowed layer, table entries that no later token can reach may be padding."""
    built = case.build()
    expected = built.paged()
    for row, (seq_len, query_len) in enumerate(case.rows):
        position = seq_len - query_len
        low = max(0, position - case.options.get("window", position + 1) + 1)
        chunk = case.options.get("chunk", position + 1)
        low = max(low, position // chunk * chunk)
        built.step.block_table[row, : low // case.block_size] = -5
    assert torch.equal(built.paged(), expected)


@given(cases())
def test_rows_do_not_see_each_other(case: Case) -> None:
    """A batch is what its rows are one by one, whatever rows they are padded together with."""
    built = case.build()
    together = built.paged()
    for row, (seq_len, query_len) in enumerate(case.rows):
        start = int(built.step.query_start_loc[row])
        alone = replace(
            built.step,
            block_table=built.step.block_table[row : row + 1],
            seq_lens=built.step.seq_lens[row : row + 1],
            query_start_loc=torch.tensor([0, query_len], dtype=torch.int32),
            num_seqs=1,
            num_tokens=query_len,
            max_query_len=query_len,
            max_seq_len=seq_len,
        )
        query = built.query[start : start + query_len]
        output = paged_attention(query, built.cache, alone, sinks=built.sinks, **case.options)
        tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5 + 2 * torch.finfo(case.dtype).eps
        torch.testing.assert_close(together[start : start + query_len], output, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"chunk": 300}])
def test_long_rows(options: dict[str, int]) -> None:
    """Long enough for queries to go through in slices, and for decodes not to be gathered all at once."""
    rows = [(1500, 1100), (2000, 1), (1700, 1), (9, 1), (1990, 1)]
    case = Case(rows, block_size=16, kv_heads=4, groups=2, head_dim=64, v_head_dim=64, options=options)
    built = case.build()
    output = built.paged()
    whole = torch.nn.functional.scaled_dot_product_attention
    start = 0
    for (seq_len, query_len), keys, values in zip(rows, built.keys, built.values, strict=True):
        positions = torch.arange(seq_len - query_len, seq_len)[:, None]
        places = torch.arange(seq_len)
        seen = places <= positions
        seen &= places > positions - options.get("window", seq_len)
        seen &= places // options.get("chunk", seq_len) == positions // options.get("chunk", seq_len)
        query = built.query[start : start + query_len].double().transpose(0, 1)[None]
        k, v = (rows.double().transpose(0, 1)[None] for rows in (keys, values))
        expected = whole(query, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(output[start : start + query_len].double(), expected, rtol=1e-4, atol=1e-5)
        start += query_len


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_share_long_and_short_rows(threads: int, dtype: torch.dtype) -> None:
    """Keys of a long row are split between threads, and joined; also where a window hides whole parts from a query."""
    rows = [(3000, 1), (1, 1), (900, 40), (700, 1), (2100, 70)]
    options: dict[str, Any]
    for options in ({}, {"window": 300}, {"softcap": 5.0}):
        case = Case(rows, block_size=16, groups=3, head_dim=32, v_head_dim=24, dtype=dtype, options=options)
        case = replace(case, with_sinks=bool(options))
        torch.set_num_threads(threads)
        try:
            case.build().check()
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["seq_lens", "query_start_loc", "block_table"])
def test_lengths_and_tables_without_memory(name: str) -> None:
    built = Case([(9, 3)]).build()
    getattr(built.step, name).untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=f"step.{name} is a Tensor without memory"):
        built.paged()


@pytest.mark.parametrize("kind", ["fake", "wrapper", "storage of nothing", "storage cut short"])
def test_queries_and_sinks_without_memory(kind: str) -> None:
    built = Case([(9, 3)], with_sinks=True).build()
    assert built.sinks is not None
    whole = {"query": built.query, "sinks": built.sinks}
    for name, tensor in whole.items():
        given = whole | {name: WITHOUT_MEMORY[kind](tuple(tensor.shape), tensor.dtype)}
        with pytest.raises(TypeError, match=f"{name} is a .* without memory"):
            paged_attention(given["query"], built.cache, built.step, sinks=given["sinks"])


def test_a_block_that_does_not_exist() -> None:
    built = Case([(9, 3)]).build()
    for block in (-1, built.cache.num_blocks, 2**31 - 1):
        built.step.block_table[0, 1] = block
        with pytest.raises(ValueError, match=r"row 0 of the block table names a block outside of 0\.\."):
            built.paged()


def test_scores_far_above_the_sinks() -> None:
    """exp(score - sink) would be infinite."""
    case = Case([(9, 3), (5, 1), (7, 1)], dtype=torch.float64, options={"scale": 200.0}, with_sinks=True)
    built = case.build()
    torch.testing.assert_close(built.paged(), built.dense())


def test_a_layer_reads_the_table_of_its_group() -> None:
    built = Case([(9, 3), (7, 1)]).build()
    expected = built.paged()
    tables = torch.stack([torch.full_like(built.step.block_table, -1), built.step.block_table])
    built.step = replace(built.step, block_table=tables)
    assert torch.equal(built.paged(group=1), expected)
    with pytest.raises(ValueError, match="group=2 must be 0 to 1: the step has 2 layer groups"):
        built.paged(group=2)
    with pytest.raises(ValueError, match="group=True must be 0 to 1"):
        built.paged(group=True)


def test_a_step_of_nothing_gives_zeros() -> None:
    built = Case([(5, 2)], padding=3).build()
    step = replace(built.step, num_seqs=0, num_tokens=0)
    output = paged_attention(built.query, built.cache, step)
    assert output.shape == (5, 4, 16)
    assert not output.any()


def test_the_query_is_left_alone() -> None:
    built = Case([(5, 2), (7, 1), (9, 1)], options={"softcap": 3.0, "window": 4}, with_sinks=True).build()
    assert built.sinks is not None
    before = built.query.clone(), built.sinks.clone(), built.cache.key_cache.clone(), built.cache.value_cache.clone()
    built.paged()
    after = built.query, built.sinks, built.cache.key_cache, built.cache.value_cache
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: {"window": 0}, ValueError, r"window=0 is outside 1\.\.2147483647"),
        (lambda b: {"window": True}, TypeError, "window=True"),
        (lambda b: {"chunk": 2.5}, TypeError, r"chunk=2\.5"),
        (lambda b: {"scale": "x"}, TypeError, "scale is a str"),
        (lambda b: {"softcap": True}, TypeError, "softcap is a bool"),
        (lambda b: {"sinks": [0.0] * 4}, TypeError, "sinks is a list"),
        (lambda b: {"softcap": 0.0}, ValueError, r"softcap=0\.0 must be above 0"),
        (lambda b: {"softcap": math.nan}, ValueError, "softcap=nan"),
        (lambda b: {"scale": math.inf}, ValueError, "scale=inf must be finite"),
        (lambda b: {"group": 1}, ValueError, "group=1 must be 0 to 0: the step has 1"),
        (lambda b: {"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \[3\]; give one for each of the 4"),
        (lambda b: {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks is on meta and the cache on cpu"),
        (lambda b: {"query": b.query.double()}, TypeError, "query is torch.float64 and the cache torch.float32"),
        (lambda b: {"query": b.query[:, :3]}, ValueError, r"shape \[6, 3, 16\].*multiple of the cache's 2"),
        (lambda b: {"query": b.query[:, :0]}, ValueError, r"shape \[6, 0, 16\]"),
        (lambda b: {"query": b.query[..., :8]}, ValueError, r"give \[tokens, heads, 16\]"),
        (lambda b: {"query": b.query[0]}, ValueError, "query has shape"),
        (lambda b: {"query": b.query[:5]}, ValueError, "5 rows, fewer than the step's num_tokens=6"),
        (lambda b: {"query": b.query.to("meta")}, ValueError, "query is on meta"),
        (lambda b: {"step": replace(b.step, seq_lens=torch.tensor([3, 3]))}, ValueError, "row 0 of the step has 5"),
        (lambda b: {"step": replace(b.step, seq_lens=torch.tensor([6, 99]))}, ValueError, "row 1.*hold 12 tokens"),
        (lambda b: {"step": replace(b.step, num_tokens=4)}, ValueError, "from 0 to 6.*num_tokens=4"),
        (lambda b: {"step": replace(b.step, query_start_loc=torch.tensor([0, 6, 6]))}, ValueError, "row 1.*0 queries"),
    ],
)
def test_errors(change: Callable[[Built], dict[str, Any]], error: type[Exception], message: str) -> None:
    built = Case([(6, 5), (3, 1)]).build()
    given = {"query": built.query, "cache": built.cache, "step": built.step, **change(built)}
    with pytest.raises(error, match=message):
        paged_attention(**given)


def test_an_8_bit_cache_is_refused() -> None:
    cache = PagedKVCache(4, 2, 16, 4, torch.float8_e4m3fn, "cpu", layout="NHD")
    built = Case([(3, 1)]).build()
    with pytest.raises(TypeError, match="float8_e4m3fn; attention takes"):
        paged_attention(built.query.to(torch.float8_e4m3fn), cache, built.step)
