"""The command `kvblocks plan`: what it prints, how it ends, and what it says to a wrong question."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvblocks.cli import plan_tables
from kvblocks.cli.main import main

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 64,
    "vocab_size": 97,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_a_table_with_every_figure_and_its_arithmetic(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--memory", "24GiB", "--weights", "16GB", "--seq-len", "8192"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("llama: 32 layers, K and V in bfloat16, blocks of 16")
    assert "32 layers × 8 heads × (128 + 128) × 2 B × 16 tokens" in shown
    assert "2.00 MiB per block" in shown
    assert "sequences of 8,192 at once" in shown


def test_lines_are_folded_where_the_terminal_is_narrow(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # the table needs no package
    shown = {}
    for columns in (200, 120, 60):
        monkeypatch.setattr(plan_tables, "_width", lambda columns=columns: columns)
        assert main(["plan", config, "--memory", "1GiB", "--seq-len", "8192", "--concurrency", "4"]) == 1
        shown[columns] = capsys.readouterr().out
        assert max(map(len, shown[columns].splitlines())) <= columns
    words = {columns: sorted(text.split()) for columns, text in shown.items()}
    assert words[200] == words[120]
    assert "  per block: 32 layers × 8 heads × (128 + 128) × 2 B × 16\n      tokens = 2.00 MiB per block\n" in shown[60]


def test_what_does_not_fit_ends_with_1(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--memory", "10GiB", "--seq-len", "8192", "--concurrency", "16"]) == 1
    shown = capsys.readouterr().out
    assert "6,442,450,944 B (6.00 GiB) are missing" in shown
    assert "  2. 10 sequences at once instead of 16" in shown


def test_sizes_lengths_and_shares_as_people_write_them(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--memory", "80G", "--utilization", "90%", "--seq-len", "32k", "--dtype", "fp8_e5m2"]
    assert main(["plan", config, *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["memory"], found["seq_len"], found["dtype"]) == (72 * 2**30, 32768, "float8_e5m2")
    assert main(["plan", config, *asked]) == 0
    shown = capsys.readouterr().out
    assert "2.00 GiB (the model was made for 8,192 tokens)" in shown
    assert main(["plan", config, "--memory", "1G", "--utilization", "50%", "--seq-len", "8k"]) == 1
    assert "536,870,912 B with --utilization 0.5, which leaves 512.00 MiB unused;" in capsys.readouterr().out


def test_several_lengths_and_models_side_by_side(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--memory", "24GiB", "--seq-len", "8k,64k,1M"]
    assert main(["plan", config, *asked]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert " ".join(shown[0].split()) == "model K and V in per token tokens a sequence blocks at once longest fits"
    rows = [line.split() for line in shown if line.strip().startswith("llama ")]
    assert [row[4:7] for row in rows] == [
        ["8,192", "1.00", "GiB"],
        ["65,536", "8.00", "GiB"],
        ["1,048,576", "128.00", "GiB"],
    ]
    assert [row[8] for row in rows] == ["24", "3", "0"]
    assert [row[10:] for row in rows] == [["yes"], ["yes"], ["104.00", "GiB", "missing"]]
    assert main(["plan", config, config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in found] == ["llama", "llama"]
    assert main(["plan", config, *asked, "--plot", "x.png"]) == 2
    assert "--plot draws one model at one --seq-len" in capsys.readouterr().err


def test_markdown(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--markdown", "--memory", "1GiB", "--seq-len", "64k"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == r"**llama: 32 layers, K and V in bfloat16, blocks of 16**"
    assert shown[2:5] == [
        "| figure |  | arithmetic |",
        "| --- | ---: | ---: |",
        "| per token | 131,072 B | 32 layers × 8 heads × (128 + 128) × 2 B |",
    ]
    assert any(line.startswith("- does not fit: 1 sequence of 65,536 tokens need") for line in shown)
    assert main(["plan", config, "--markdown", "--seq-len", "1k,2k"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | K and V in | per token | tokens | a sequence |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| llama | bfloat16 | 131,072 B | 1,024 | 128.00 MiB |",
        "| llama | bfloat16 | 131,072 B | 2,048 | 256.00 MiB |",
    ]


@pytest.mark.parametrize("lengths", ["64k", "8k,64k"])
def test_what_the_table_remarks_is_said_in_markdown_and_json_too(
    lengths: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_for = {**json.loads(Path(config).read_text()), "max_position_embeddings": 8192, "torch_dtype": None}
    del made_for["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(made_for))
    asked = ["plan", str(tmp_path), "--seq-len", lengths, "--memory", "64GiB", "--dtype", "fp8", "--tp", "2"]
    said = []
    for how in ([], ["--markdown"]):
        assert main([*asked, "--weights", "1GB", *how]) == 0
        shown = capsys.readouterr().out.splitlines()
        said.append([line.removeprefix("- ") for line in shown if "note: " in line])
    assert said[0] == said[1]
    assert main([*asked, "--weights", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for one in found if isinstance(found, list) else [found]:
        assert {f"note: {note}" for note in one["notes"]} <= {*said[0]}
    assert f"note: {tmp_path.name}: 65,536 tokens (the model was made for 8,192 tokens)" in said[0]
    assert any("num_key_value_heads=32" in note for note in said[0])
    assert main([*asked, "--weights", "1TB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found[-1] if isinstance(found, list) else found)["verdict"][0].startswith("does not fit: 1 sequence")


def test_the_help_says_what_a_g_is(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    assert "80G and 80GiB are 80 * 2**30, 80GB 80 * 10**9" in " ".join(capsys.readouterr().out.split())
    for size, found in (("80G", 80 * 2**30), ("80GiB", 80 * 2**30), ("80GB", 80 * 10**9)):
        assert main(["plan", config, "--memory", size, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory"] == found


def test_json_says_it_all(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--memory", "1GiB", "--tp", "4", "--pp", "20,12", "--dtype", "int4", "--group-size", "32", "--json"]
    assert main(["plan", config, *arguments, "--zero-point", "--scale-dtype", "float32", "--sequences", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_token"] == 20 * 2 * 2 * (64 + 4 * 8)
    assert (found["tp"], found["pp"], found["dtype"], found["fits"]) == (4, [20, 12], "int4", True)
    assert found["num_blocks"] == 2**30 // found["block_bytes"]
    assert found["lines"][0]["name"] == "per token"


def test_an_engine_and_two_dtypes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--engine", "llama.cpp", "--dtype", "q8_0,q4_0", "--seq-len", "1000", "--step-tokens", "64"]
    assert main(["plan", config, *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["dtype"], found["block_size"]) == ("llama.cpp", "q8_0,q4_0", 256)
    assert found["sequence_bytes"] == 1024 * 32 * 8 * (136 + 72)
    assert any("src/llama-context.cpp" in note for note in found["notes"])


def test_numbers_that_are_asked_for_are_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "no_such"}))
    assert main(["plan", str(tmp_path), "--json"]) == 2
    said = capsys.readouterr().err
    assert (
        "give the numbers instead: --layers, --kv-heads, --head-dim (by its config --layers 32, --kv-heads 8, " in said
    )
    assert "--head-dim 128, if it attends as most do)" in said


def test_numbers_instead_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--layers", "4", "--kv-heads", "2", "--head-dim", "16", "--v-head-dim", "8", "--dtype", "fp8"]
    assert main(["plan", *numbers, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] == 4 * 2 * 24


def test_weights_from_the_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--memory", "24GiB", "--weights", "auto", "--json"]) == 0
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    layer = attention + 3 * 4096 * 64 + 2 * 4096
    assert json.loads(capsys.readouterr().out)["weights_bytes"] == 2 * (32 * layer + 2 * 97 * 4096 + 4096)


def test_a_chart(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.png"
    assert main(["plan", config, "--memory", "24GiB", "--plot", str(chart), "--json"]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    vector = tmp_path / "chart.svg"
    assert main(["plan", config, "--memory", "24GiB", "--plot", str(vector), "--json"]) == 0
    assert {"bfloat16", "float8_e4m3fn", "int4"} <= set(_words(vector.read_text()))


def test_where_nothing_fits_there_is_a_verdict_and_no_chart(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chart = tmp_path / "chart.png"
    asked = ["--seq-len", "8192", "--concurrency", "4", "--plot", str(chart)]
    assert main(["plan", config, "--memory", "1KiB", *asked]) == 1
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    assert captured.err == f"kvblocks: {chart} is not written: not one sequence fits at any length\n"
    assert not chart.exists()


def _words(text: str) -> list[str]:
    return text.replace("<!--", " ").replace("-->", " ").split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give MODEL, or all of --layers, --kv-heads and --head-dim"),
        (["--layers", "3"], "give MODEL, or all of"),
        (["CONFIG", "--layers", "3"], "not both"),
        (["no-such.json"], "no-such.json is neither a folder"),
        (["CONFIG", "--memory", "much"], "--memory much is not a size"),
        (["CONFIG", "--dtype", "int3"], "--dtype int3 cannot hold a cache"),
        (["CONFIG", "--tp", "5"], "num_attention_heads=32 does not divide by --tp 5; use 1, 2, 4, 8, 16 or 32"),
        (["CONFIG", "--pp", "x"], "--pp x is neither a number of stages"),
        (["CONFIG", "--pp", "33"], "--pp 33 is outside 1..32"),
        (["CONFIG", "--plot", "x.png"], "--plot draws what fits: give --memory or --gpu"),
        (["CONFIG", "--memory", "1GiB", "--plot", "x.txt"], "--plot x.txt: the name must end in .png"),
        (["CONFIG", "--memory", "1GiB", "--plot", "/no/such/x.png"], "there is no folder"),
        (["CONFIG", "--utilization", "2"], "--utilization 2.0 is outside"),
        (["CONFIG", "--utilization", "900%"], "--utilization 900% is outside 0% (not included) to 100%"),
        (["CONFIG", "--memory", "80"], "--memory 80 has no unit; give 80GiB where these are GiB"),
        (["CONFIG", "--seq-len", "long"], "--seq-len long is not a number of tokens; give one like 8192, 32k or 1M"),
        (["CONFIG", "--seq-len", "0"], "--seq-len 0 is outside 1..2147483647"),
        (["CONFIG", "--dtype", "q8_0", "--group-size", "16"], "--group-size 16: q8_0 has a scale for each 32 numbers"),
        (["CONFIG", "--swa-full"], "--engine kvblocks: only llama.cpp has --swa-full"),
        (["CONFIG", "--engine", "vllm", "--stored", "transformers"], "counts transformers' caches, and --engine vllm"),
        (["CONFIG", "--dtype", "q8_0,q4_0,f16"], "names 3 dtypes; give one, or one for K and one for V"),
        (["CONFIG", "--encoder-tokens", "-1"], "--encoder-tokens -1 is outside"),
        (["CONFIG", "--json", "--markdown"], "--json and --markdown are two forms of one answer; give one of them"),
        (["CONFIG", "--weights-dtype", "fp8"], "--weights-dtype fp8 is for --weights auto"),
    ],
)
def test_errors_in_one_sentence(
    arguments: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [config if argument == "CONFIG" else argument for argument in arguments]
    assert main(["plan", *given, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvblocks: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_missing_extra_is_named(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main(["plan", config, "--memory", "1GiB", "--plot", "x.png", "--json"]) == 2
    assert "needs matplotlib for" in capsys.readouterr().err
