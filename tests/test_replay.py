"""Replaying traces: what a trace may say, what a replay did, and the command line around it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblocks.cli.main import main
from kvblocks.manager import BlockManager
from kvblocks.replay import Replay, StoredBlocks, Tally, TraceRequest, host_step, read_trace, small_trace

GOOD = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}


def replay(
    requests: list[TraceRequest], blocks: int, block_size: int = 16, concurrency: int = 8
) -> tuple[BlockManager, Tally]:
    longest = max(request.input_length + request.output_length for request in requests)
    manager = BlockManager(blocks, block_size)
    step = host_step(concurrency, 1024, -(-longest // block_size))
    tally = Replay(manager, step, concurrency).run(requests)
    manager.audit()
    return manager, tally


def fewest_blocks(requests: list[TraceRequest], block_size: int) -> int:
    return max(-(-(request.input_length + request.output_length) // block_size) for request in requests)


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    ids = st.lists(st.integers(0, 4), min_size=1, max_size=3)
    requests = []
    for hash_ids in draw(st.lists(ids, min_size=1, max_size=12)):
        length = draw(st.integers(1, 512 * len(hash_ids)))
        requests.append(TraceRequest(length, draw(st.integers(0, 40)), tuple(hash_ids)))
    return requests


@settings(max_examples=40)
@given(traces(), st.integers(0, 60), st.sampled_from([7, 16, 64]), st.integers(1, 8))
def test_every_request_runs_to_its_end(
    requests: list[TraceRequest], spare: int, block_size: int, concurrency: int
) -> None:
    manager, tally = replay(requests, fewest_blocks(requests, block_size) + spare, block_size, concurrency)
    stats = manager.stats()
    assert tally.requests == tally.admits == stats.admitted == tally.frees == len(requests)
    assert tally.prompt_tokens == sum(request.input_length for request in requests)
    assert tally.decoded_tokens == sum(request.output_length for request in requests)
    assert (tally.preemptions, tally.resumed) == (stats.preemptions, stats.resumed)
    assert tally.preemptions == tally.resumed
    assert tally.cached_tokens <= stats.hit_tokens  # the manager counts hits of resumed sequences too
    assert manager.num_sequences == 0
    assert manager.num_free_blocks == manager.num_blocks
    assert tally.samples[-1].usage == 0.0
    assert round(max(sample.usage for sample in tally.samples) * manager.num_blocks) <= stats.peak_used_blocks


def test_hits_without_pressure_are_the_shared_prefixes() -> None:
    first = TraceRequest(1024, 1, (1, 2))
    manager, tally = replay(
        [first, TraceRequest(1536, 1, (1, 2, 3)), first, TraceRequest(512, 1, (9,))], blocks=1000, concurrency=1
    )
    assert tally.cached_tokens == 1024 + 1008  # of an equal prompt the last block is left to compute
    assert manager.stats().hit_tokens == tally.cached_tokens
    assert tally.hit_rate == 2032 / 4096


def test_a_small_pool_preempts() -> None:
    requests = [TraceRequest(100, 100, (number,)) for number in range(8)]
    manager, tally = replay(requests, blocks=fewest_blocks(requests, 16) + 8)
    assert tally.preemptions > 0
    assert tally.decoded_tokens == 800
    assert manager.stats().peak_used_blocks <= manager.num_blocks


def test_a_sequence_preempted_at_its_last_token_ends() -> None:
    """Sweeps the moment of preemption over every position of the second sequence, its last token included."""
    preempted = 0
    for output in range(1, 40):
        _, tally = replay([TraceRequest(16, 64, (1,)), TraceRequest(16, output, (2,))], blocks=5, concurrency=2)
        assert tally.decoded_tokens == 64 + output
        preempted += tally.preemptions
    assert preempted > 0


def test_a_request_too_long_for_the_pool() -> None:
    with pytest.raises(ValueError, match=r"700 tokens \(600 in, 100 out\) needs 44 blocks of 16, and the pool has 43"):
        replay([TraceRequest(600, 100, (1, 2))], blocks=43)


def test_the_small_trace_is_the_same_every_time() -> None:
    requests = small_trace()
    assert requests == small_trace()
    assert requests != small_trace(seed=1)
    assert len(requests) == 200
    totals = [replay(requests[:60], blocks=2000)[0].stats() for _ in range(2)]
    assert totals[0] == totals[1]
    assert totals[0].hit_tokens > 0
    assert totals[0].evictions > 0


def test_equal_ids_give_equal_tokens_and_others_do_not() -> None:
    one, two = TraceRequest(1024, 0, (7, 8)).prompt(), TraceRequest(1000, 0, (7, 9)).prompt()
    assert one.dtype == np.int32
    assert len(two) == 1000
    assert (one[:512] == two[:512]).all()
    assert (one[512:1000] != two[512:]).mean() > 0.99
    assert one.min() >= 0


@given(st.integers(0, 2**54 - 1), st.sampled_from([1, 18_875, 2**41]), st.integers(0, 511))
def test_other_ids_never_give_the_same_run_of_tokens(first: int, distance: int, shift: int) -> None:
    """18,875 * 512 is a multiple of the vocabulary's 151,000: a plain modulus would repeat there."""
    other = (first + distance) % 2**54
    one, two = TraceRequest(512, 0, (first,)).prompt(), TraceRequest(512, 0, (other,)).prompt()
    assert (one[shift:] == two[: 512 - shift]).sum() <= 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:2: not JSON"),
        ("[]", "trace.jsonl:2: a request is a JSON object, not list"),
        ("[" * 100_000, "trace.jsonl:2: not JSON"),
        ("\xff", "trace.jsonl:2: not JSON"),
        ({"hash_ids": None}, "trace.jsonl:2: field hash_ids is null; it must be a list"),
        ({"hash_ids": []}, "trace.jsonl:2: field hash_ids is"),
        ({"hash_ids": "12"}, "trace.jsonl:2: field hash_ids is"),
        ({"hash_ids": [1, -2]}, r"trace.jsonl:2: field hash_ids\[1\] is -2; it must be 0 to"),
        ({"hash_ids": [1, 2**60]}, r"trace.jsonl:2: field hash_ids\[1\] is"),
        ({"hash_ids": [1, True]}, r"trace.jsonl:2: field hash_ids\[1\] is true; it must be a whole number"),
        ({"input_length": 1025}, r"trace.jsonl:2: field input_length is 1025; it must be 1 to 1024 \(2 hash_ids\)"),
        ({"input_length": 0}, "trace.jsonl:2: field input_length is 0"),
        ({"input_length": 1.5}, "trace.jsonl:2: field input_length is 1.5; it must be a whole number"),
        ({"input_length": float("inf")}, "trace.jsonl:2: field input_length is Infinity"),
        ({"output_length": -1}, "trace.jsonl:2: field output_length is -1; it must be 0 to"),
        ({"output_length": "3"}, 'trace.jsonl:2: field output_length is "3"'),
        ({"output_length": ...}, "trace.jsonl:2: field output_length is missing"),
    ],
)
def test_a_bad_line_names_the_line_and_the_field(tmp_path: Path, line: Any, message: str) -> None:
    if isinstance(line, dict):
        line = json.dumps({name: value for name, value in (GOOD | line).items() if value is not ...})
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(json.dumps(GOOD).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=message):
        read_trace(trace)
    assert read_trace(trace, 1) == [TraceRequest(600, 3, (1, 2))]


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"\n{json.dumps(GOOD)}\n\n  \n{json.dumps(GOOD | {'output_length': 4})}")
    assert [request.output_length for request in read_trace(trace)] == [3, 4]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--limit", "80", "--blocks", "1100", "--concurrency", "16", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    assert {name: type(value) for name, value in result.items()} == {
        "trace": str,
        "requests": int,
        "blocks": int,
        "host_blocks": int,
        "store_blocks": int,
        "block_size": int,
        "concurrency": int,
        "prompt_tokens": int,
        "cached_tokens": int,
        "cached_tokens_device": int,
        "cached_tokens_host": int,
        "cached_tokens_store": int,
        "hit_rate": float,
        "decoded_tokens": int,
        "decode_steps": int,
        "evictions": int,
        "offloads": int,
        "loads": int,
        "host_evictions": int,
        "stored": int,
        "preemptions": int,
        "peak_used_blocks": int,
        "peak_usage": float,
        "seconds": dict,
        "microseconds": dict,
    }
    requests = small_trace()[:80]
    assert result["requests"] == 80
    assert result["blocks"] == 1100
    assert result["prompt_tokens"] == sum(request.input_length for request in requests)
    assert result["decoded_tokens"] == sum(request.output_length for request in requests)
    assert result["hit_rate"] == pytest.approx(result["cached_tokens"] / result["prompt_tokens"], abs=1e-6)
    assert result["preemptions"] > 0
    assert result["evictions"] > 0
    assert 0 < result["peak_used_blocks"] <= 1100
    assert set(result["seconds"]) == {"admit", "prefill", "decode", "free"}
    assert set(result["microseconds"]) == {"admit", "prefill", "decode_step", "decoded_token", "free"}
    assert all(value > 0 for value in (*result["seconds"].values(), *result["microseconds"].values()))
    assert main(["replay", "--limit", "80", "--blocks", "1100", "--concurrency", "16", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    timed = ("seconds", "microseconds")
    assert {n: v for n, v in again.items() if n not in timed} == {n: v for n, v in result.items() if n not in timed}


def test_a_trace_that_decodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "prompts.jsonl"
    trace.write_text(json.dumps(GOOD | {"output_length": 0}))
    assert main(["replay", str(trace), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["microseconds"]["decode_step"] is None
    assert result["decode_steps"] == 0


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["replay", "--limit", "20"]) == 0
    out = capsys.readouterr().out
    for what in ("made-up trace: 20 requests", "hit rate", "evictions", "preemptions", "peak use", "decode step", "µs"):
        assert what in out


def test_a_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "use.png"
    assert main(["replay", "--limit", "20", "--json", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
        (["{folder}"], "cannot read"),
        (["{folder}/empty.jsonl"], "has no requests"),
        (["{folder}/bad.jsonl"], "bad.jsonl:1: field input_length is missing"),
        (["--blocks", "100"], "request 1 of made-up trace: a request of 2892 tokens"),
        (["--blocks", "2147483647"], "num_blocks=2147483647"),
        (["--concurrency", "1000000000"], "--concurrency 1000000000 must be at most"),
        (["--store-blocks", "100"], "--store-blocks needs --host-blocks"),
        (["--plot", "{folder}/no/use.png"], "there is no folder"),
        (["--plot", "{folder}/use.xyz"], "the name must end in .png"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"output_length": 1, "hash_ids": [1]}')
    assert main(["replay", "--json", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(("package", "arguments"), [("rich", []), ("matplotlib", ["--json", "--plot", "use.png"])])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, arguments: list[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    assert main(["replay", *arguments]) == 2
    captured = capsys.readouterr()
    assert f"needs {package}" in captured.err
    assert 'pip install "kvblocks[replay]"' in captured.err


def test_a_host_pool_finds_again_what_was_evicted() -> None:
    requests = small_trace()
    rates = []
    for host_blocks in (0, 8000):
        manager = BlockManager(2000, 16, host_blocks=host_blocks)
        tally = Replay(manager, host_step(4, 1024, 2000), 4).run(requests)
        manager.audit()
        rates.append((tally.hit_rate, tally.host_rate))
        assert tally.host_tokens <= manager.stats().host_hit_tokens  # which counts resumed sequences too
        assert tally.samples[-1].host_rate == tally.host_rate
    assert rates[0][1] == 0
    assert rates[1][0] > rates[0][0] + 0.05
    assert rates[1][1] > 0.05


def test_the_command_tells_tiers_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--blocks", "1500", "--host-blocks", "4000", "--limit", "60", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["host_blocks"] == 4000
    assert result["cached_tokens_host"] > 0
    assert result["cached_tokens_device"] + result["cached_tokens_host"] == result["cached_tokens"]
    assert result["offloads"] > 0
    assert result["loads"] * result["block_size"] >= result["cached_tokens_host"]


def test_a_store_finds_again_what_pools_have_forgotten() -> None:
    """One without end gives nearly what a pool without end gives; one of 8,000 blocks forgets in its turn."""
    requests = small_trace()
    rates = []
    for num_blocks, host_blocks, store_blocks in (
        (100_000, 0, 0),
        (2000, 4000, 0),
        (2000, 4000, 8000),
        (2000, 4000, 99_999),
    ):
        manager = BlockManager(num_blocks, 16, host_blocks=host_blocks)
        store = StoredBlocks(manager, store_blocks) if store_blocks else None
        tally = Replay(manager, host_step(4, 1024, 2000), 4, store).run(requests)
        manager.audit()
        assert manager.num_background_slots == 0
        assert tally.samples[-1].store_rate == tally.store_rate
        assert (tally.store_tokens > 0) == (store is not None)
        assert min(tally.host_tokens, tally.cached_tokens - tally.host_tokens - tally.store_tokens) >= 0
        rates.append(tally.hit_rate)
    endless, without, small, large = rates
    assert without < small < large <= endless
    assert large > 0.95 * endless


def test_the_command_tells_the_store_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "use.png"
    sizes = ["--blocks", "1500", "--host-blocks", "2000", "--store-blocks", "50000", "--limit", "60"]
    assert main(["replay", *sizes, "--json", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    parts = [result[f"cached_tokens_{tier}"] for tier in ("device", "host", "store")]
    assert sum(parts) == result["cached_tokens"]
    assert min(parts) > 0
    assert 0 < result["stored"] <= result["store_blocks"] == 50_000
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["replay", *sizes]) == 0
    assert "from the store" in capsys.readouterr().out
