"""The kernel that attends equals plain torch: ragged batches, every option and layout, splits, NaN in unused slots."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICES
from test_attention import Built, Case
from torch import Tensor

from kvblocks import paged_attention
from kvblocks.attention import backends as attention_cuda
from kvblocks.attention import call as attention
from kvblocks.attention.arguments import Arguments
from kvblocks.attention.backends import kernel_for, kernel_refuses, on_triton, on_varlen, varlen_refuses
from kvblocks.kernels import kernels
from kvblocks.kernels.launch import INTERPRETED
from kvblocks.sizes import LAYOUTS
from kvblocks.storage import cache as storage

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def arguments_of(built: Built) -> Arguments:
    options: dict[str, Any] = dict.fromkeys(("window", "chunk", "softcap")) | built.case.options
    scale = options.pop("scale", built.cache.head_dim**-0.5)
    return Arguments(built.query, built.cache, built.step, built.step.block_table, scale, sinks=built.sinks, **options)


def check(case: Case, splits: int | None) -> None:
    built = case.build()
    output = on_triton(arguments_of(built), splits=splits)
    assert output.dtype == case.dtype
    eps = torch.finfo(case.dtype).eps
    # Beside rounding the output, the weights are rounded to the cache's dtype before they meet V.
    tolerance = 5e-5 if case.dtype == torch.float32 else 4 * eps
    torch.testing.assert_close(output.double(), built.dense(), rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn, device: str) -> Case:
    longest = draw(st.sampled_from([5, 40, 150]))

    def lens() -> tuple[int, int]:
        seq_len = draw(st.integers(1, longest))
        return seq_len, draw(st.sampled_from([1, 1, min(seq_len, 3), draw(st.integers(1, seq_len))]))

    options: dict[str, Any] = {}
    for name, values in (
        ("window", st.integers(1, 2 * longest)),
        ("chunk", st.integers(1, 2 * longest)),
        ("softcap", st.sampled_from([0.5, 2.0, 30.0])),
        ("scale", st.sampled_from([0.1, 1.0])),
    ):
        if draw(st.booleans()):
            options[name] = draw(values)
    return Case(
        rows=[lens() for _ in range(draw(st.integers(1, 5)))],
        block_size=draw(st.sampled_from([1, 3, 8, 16, 64])),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        groups=draw(st.sampled_from([1, 3, 4])),
        head_dim=draw(st.sampled_from([8, 16, 40])),
        v_head_dim=draw(st.sampled_from([8, 16, 40])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        options=options,
        with_sinks=draw(st.booleans()),
        padding=draw(st.integers(0, 40)),
        seed=draw(st.integers(0, 2**32 - 1)),
        device=device,
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25)
@given(data=st.data())
def test_equals_dense_attention(device: str, data: st.DataObject) -> None:
    check(data.draw(cases(device)), data.draw(st.sampled_from([None, 1, 2, 4])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_decodes_and_both(dtype: torch.dtype, layout: str, device: str) -> None:
    options: list[dict[str, Any]] = [{"window": 5, "softcap": 3.0}, {}, {"chunk": 70}]
    batches = [[(70, 70), (9, 4)], [(80, 1), (7, 1), (1, 1)], [(150, 1), (80, 40), (20, 2), (3, 3)]]
    for rows, some, splits in zip(batches, options, (1, 2, 2), strict=True):
        case = Case(rows, 8, kv_heads=1, dtype=dtype, layout=layout, options=some, device=device)
        check(replace(case, with_sinks=splits == 2, padding=9), splits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 2**31 - 1])
def test_the_ends_of_a_window(window: int, device: str) -> None:
    check(Case([(40, 1), (40, 40)], options={"window": window}, padding=3, device=device), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [5, 16, 17, 71])
def test_many_query_heads_for_one(groups: int, device: str) -> None:
    check(Case([(20, 1), (9, 9)], kv_heads=1, groups=groups, dtype=torch.float16, device=device), None)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_far_above_the_sinks(device: str) -> None:
    case = Case([(9, 3), (5, 1), (7, 1)], options={"scale": 60.0}, with_sinks=True, device=device)
    check(case, 1)
    check(case, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("options", "low"), [({"window": 6}, 5), ({"window": 6, "chunk": 16}, 5), ({"chunk": 3}, 2)])
def test_blocks_out_of_reach_are_never_read(options: dict[str, int], low: int, splits: int, device: str) -> None:
    built = Case([(37, 3), (29, 1)], options=options, device=device).build()
    expected = on_triton(arguments_of(built), splits=splits)
    for row, (seq_len, query_len) in enumerate(built.case.rows):
        unreached = (seq_len - query_len - low) // 4
        # A value that is read and then given no weight would bring its NaN along.
        gone = built.step.block_table[row, :unreached].long()
        built.cache.key_cache[gone] = math.nan
        built.cache.value_cache[gone] = math.nan
    assert torch.equal(on_triton(arguments_of(built), splits=splits), expected)
    for row, (seq_len, query_len) in enumerate(built.case.rows):
        built.step.block_table[row, : (seq_len - query_len - low) // 4] = -5
    assert torch.equal(on_triton(arguments_of(built), splits=splits), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", [-1, 10**6, 2**31 - 1, -(2**31)])
def test_a_block_that_does_not_exist_is_zeros(entry: int, device: str) -> None:
    """Tables on a device are not checked: a wrong one must not read what belongs to nobody."""
    built = Case([(37, 3), (29, 1)], with_sinks=True, device=device).build()
    for row in range(2):
        built.step.block_table[row, 2] = entry
        built.keys[row][8:12] = 0
        built.values[row][8:12] = 0
    for splits in (1, 4):
        output = on_triton(arguments_of(built), splits=splits)
        torch.testing.assert_close(output.double(), built.dense(), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_length_past_the_table_reads_no_other_table(device: str) -> None:
    built = Case([(12, 1), (9, 1)], device=device).build()
    expected = on_triton(arguments_of(built))
    columns = built.step.block_table.shape[1] - 1
    # What lies behind a row of this table is a block that holds NaN.
    wide = torch.full((4, columns + 3), int(built.step.block_table[1, 0]), dtype=torch.int32, device=device)
    built.cache.key_cache[wide[0, 0].long()] = math.nan
    wide[:, :columns] = built.step.block_table[:, :columns]
    longer = replace(built.step, seq_lens=torch.tensor([13 + 8, 9], dtype=torch.int32, device=device))
    args = replace(arguments_of(built), step=longer, table=wide[:, :columns])
    query = built.query[:1]
    one = on_triton(replace(args, query=query, step=replace(longer, num_seqs=1, num_tokens=1)))
    assert expected.isfinite().all()
    assert one.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_graph_was_captured_for_serves_smaller_batches(device: str) -> None:
    """A replay has the host's numbers of the capture, and the device's arrays of its own step."""
    for rows in ([(40, 1), (7, 1), (1, 1)], [(9, 1)]):
        built = Case(rows, padding=4 - len(rows), device=device).build()
        step = built.step
        starts = torch.full((7,), len(rows), dtype=torch.int32, device=device)
        starts[: len(rows) + 1] = step.query_start_loc[: len(rows) + 1]
        lens = torch.zeros(6, dtype=torch.int32, device=device)
        lens[: len(rows)] = step.seq_lens[: len(rows)]
        table = torch.zeros(6, 12, dtype=torch.int32, device=device)
        table[: len(rows), : step.block_table.shape[1]] = step.block_table[: len(rows)].clamp(
            0, len(built.cache.key_cache) - 1
        )
        captured = replace(
            step, num_seqs=4, num_tokens=4, max_seq_len=48, block_table=table, seq_lens=lens, query_start_loc=starts
        )
        for splits in (1, 4):
            output = on_triton(replace(arguments_of(built), step=captured, table=table), splits=splits)
            torch.testing.assert_close(output.double(), built.dense(), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_with_strides(device: str) -> None:
    built = Case([(9, 4), (6, 1)], device=device).build()
    expected = on_triton(arguments_of(built))
    wide = torch.cat([built.query, built.query, built.query], 1)[:, 4:8]
    assert torch.equal(on_triton(replace(arguments_of(built), query=wide)), expected)
    apart = torch.stack([built.query, built.query], 3).flatten(2)[:, :, ::2]
    assert torch.equal(on_triton(replace(arguments_of(built), query=apart)), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_small_arrays_with_strides(device: str) -> None:
    built = Case([(9, 4), (6, 1)], with_sinks=True, device=device).build()
    expected = on_triton(arguments_of(built))
    assert built.sinks is not None
    sinks, lens, starts = (
        torch.stack([array, torch.zeros_like(array)], 1)[:, 0]
        for array in (built.sinks, built.step.seq_lens, built.step.query_start_loc)
    )
    step = replace(built.step, seq_lens=lens, query_start_loc=starts)
    assert torch.equal(on_triton(replace(arguments_of(built), sinks=sinks, step=step)), expected)


def test_what_is_launched_depends_on_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass compiles and loads what a later capture launches, where neither is allowed."""
    module = kernels("attention")
    assert module is not None
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **options: launched[-1].append((grid, given[18:], options))

    monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(module, "_attend", Kernel())
    monkeypatch.setattr(module, "_reduce", Kernel())
    built = Case([(9, 1)]).build()
    table = torch.zeros(3, 1024, dtype=torch.int32)
    for longest in (9, 2000, 4096):
        launched.append([])
        on_triton(replace(arguments_of(built), table=table, step=replace(built.step, max_seq_len=longest)))
    assert len(launched[0]) == 2  # split, and put together
    assert launched[0] == launched[1] == launched[2]


class Varlen:
    """In place of torch's function: what it was told, and a result by the same convention."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, out: Tensor, query: Tensor, *given: Any, **options: Any) -> None:
        names = ("key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
        self.calls.append(dict(zip(names, given, strict=True)) | options)
        out[: int(given[2][-1])] = 1


def test_varlen_attn_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = Varlen()
    monkeypatch.setattr(attention_cuda, "_varlen", lambda: (varlen, lambda: "FA3"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    case = Case([(9, 3), (21, 1)], dtype=torch.float16, options={"window": 5, "scale": 0.3}, padding=2)
    built = case.build()
    built.cache.group = 0  # of an engine, in a group that gives no block in front of the window back
    assert kernel_for(arguments_of(built)) is on_varlen
    output = on_varlen(arguments_of(built))
    assert output[:4].eq(1).all()
    assert output[4:].eq(0).all()
    [call] = varlen.calls
    assert call["cu_seq_q"].tolist() == [0, 3, 4]
    assert call["seqused_k"].tolist() == [9, 21]
    assert torch.equal(call["block_table"], built.step.block_table[:2])
    assert call["cu_seq_k"] is None
    assert (call["max_q"], call["max_k"], call["scale"]) == (3, 21, 0.3)
    assert call["window_size"] == (4, 0)
    assert call["enable_gqa"]
    assert call["key"].shape == (built.cache.num_blocks, 4, 2, 16)
    on_varlen(replace(arguments_of(built), window=None))
    assert varlen.calls[1]["window_size"] == (-1, 0)


def test_torch_has_the_function_that_is_called() -> None:
    found = attention_cuda._varlen()
    assert found is not None
    assert found[1]() is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "no torch.float32"),
        ({"layout": "HND"}, "layout HND"),
        ({"v_head_dim": 8}, "16 and 8"),
        ({"head_dim": 12, "v_head_dim": 12}, "12 and 12"),
        ({"block_size": 64}, "64 tokens are loaded whole"),
        ({"options": {"window": 4}}, "in front of a window"),
        ({"options": {"chunk": 4}}, "no chunk"),
        ({"options": {"softcap": 4.0}}, "no softcap"),
        ({"with_sinks": True}, "no sinks"),
    ],
)
def test_what_varlen_attn_cannot_do_goes_on_to_the_kernel(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cuda, "_varlen", lambda: (Varlen(), lambda: "FA3"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    args = arguments_of(Case([(9, 3)], **({"dtype": torch.float16} | changes)).build())
    assert reason in (varlen_refuses(args) or "")
    assert kernel_for(args) is on_triton


def test_which_way_is_taken_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    attention_cuda._say.cache_clear()
    monkeypatch.setattr(attention_cuda, "_varlen", lambda: (Varlen(), lambda: "FA3"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    small, odd = (Case([(9, 3)], dtype=dtype).build() for dtype in (torch.float16, torch.float64))
    with caplog.at_level(logging.INFO, logger="kvblocks"):
        for built in (small, odd, small, odd):
            kernel_for(arguments_of(built))
    assert [record.getMessage() for record in caplog.records] == [
        "paged attention runs on kvblocks' Triton kernel (not varlen_attn: FA3 pages on compute capability 9 only)",
        "paged attention runs on plain torch, which waits for the device (not varlen_attn: FA3 pages on compute "
        "capability 9 only; not Triton: it takes no torch.float64)",
    ]
    attention_cuda._say.cache_clear()


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    assert kernel_for(arguments_of(Case([(3, 1)], head_dim=264, v_head_dim=8, dtype=torch.float16).build())) is None
    assert kernel_for(arguments_of(Case([(3, 1)], kv_heads=1, groups=129, dtype=torch.float16).build())) is None
    large = Case([(3, 1)], kv_heads=1, groups=71, head_dim=256, v_head_dim=8)
    assert "131072 bytes, which pass 32768" in (kernel_refuses(arguments_of(large.build())) or "")
    assert kernel_for(arguments_of(large.build())) is None
    built = Case([(3, 1)], dtype=torch.float16).build()
    elsewhere = replace(built.step, seq_lens=built.step.seq_lens.to("meta"))
    assert kernel_for(replace(arguments_of(built), step=elsewhere)) is None


class OnCuda(Tensor):
    """A tensor that says it is on a CUDA device, for what looks no further."""

    is_cuda = True


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take no CPU tensors")
def test_the_public_call_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Case([(9, 3), (7, 1)], with_sinks=True).build()
    built.step.block_table = torch.stack([torch.full_like(built.step.block_table, -1), built.step.block_table])
    asked: list[Arguments] = []

    def by_kernel(args: Arguments) -> Tensor:
        asked.append(args)
        return on_triton(replace(args, query=args.query.as_subclass(Tensor)))

    monkeypatch.setattr(attention, "kernel_for", lambda args: by_kernel)
    query = built.query.as_subclass(OnCuda)
    options: dict[str, Any] = {"window": 5, "chunk": 8, "softcap": 3, "scale": 1, "sinks": built.sinks}
    output = paged_attention(query, built.cache, built.step, group=1, **options)
    [args] = asked
    assert (args.window, args.chunk, args.softcap, args.scale) == (5, 8, 3.0, 1.0)
    assert isinstance(args.scale, float)
    assert isinstance(args.softcap, float)
    expected = paged_attention(built.query, built.cache, built.step, group=1, **options)
    torch.testing.assert_close(output, expected, rtol=5e-5, atol=5e-5)
    # What the device holds is not looked at, unless checks are asked for.
    built.step.seq_lens = torch.tensor([1, 7], dtype=torch.int32)
    paged_attention(query, built.cache, built.step, group=1, **options)
    monkeypatch.setattr(storage, "CHECKED", True)
    with pytest.raises(ValueError, match="row 0 of the step has 3 queries and seq_lens=1"):
        paged_attention(query, built.cache, built.step, group=1, **options)
    assert len(asked) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_attn_on_a_device(dtype: torch.dtype) -> None:
    built = Case([(40, 1), (70, 30), (9, 9)], 16, head_dim=64, v_head_dim=64, dtype=dtype, device="cuda").build()
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"FlashAttention 3 is not there: {error}")
    try:
        reason = varlen_refuses(arguments_of(built))
        if reason is not None:
            pytest.skip(reason)
        for window in (None, 7):
            built.case.options = {"window": window} if window else {}
            assert kernel_for(arguments_of(built)) is on_varlen
            output = on_varlen(arguments_of(built))
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(output.double(), built.dense(), rtol=tolerance, atol=tolerance)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.cuda
def test_the_public_call_takes_the_kernel_and_does_not_wait() -> None:
    built = Case([(40, 1), (70, 30), (9, 9)], 16, dtype=torch.float16, padding=2, device="cuda").build()
    built.paged()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = paged_attention(built.query, built.cache, built.step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 4 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(output.double(), built.dense(), rtol=tolerance, atol=tolerance)
    assert not math.isnan(float(output.sum()))
