"""The command line as a person or a script meets it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import kvblocks
from kvblocks import demo
from kvblocks.cli import generate as cli_generate
from kvblocks.cli import main as cli
from kvblocks.generation.verify import Verdict
from kvblocks.sizes import LAYOUTS

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)


TINY = ["generate", "--model", "tiny"]


def python(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*TINY, "--json", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_whole_command() -> None:
    """As it is typed: answers, a table, and `identical` for every prompt, all within the time a person waits."""
    done = python("-m", "kvblocks", *TINY, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"  1  {demo.PROMPTS[0]}"
    assert [line.split() for line in lines[-len(demo.PROMPTS) :]] == [
        [str(number), "identical"] for number in range(1, len(demo.PROMPTS) + 1)
    ]
    assert "pool          67,108,864 bytes" in done.stdout
    assert "blocks        2,048 of 16 tokens" in done.stdout
    assert "preemptions   0" in done.stdout
    assert "tokens/s" in done.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identical_in_every_layout_with_memory_for_one_sequence_only(
    layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-new-tokens", "16", "--block-size", "5", "--layout", layout]
    assert cli.main([*TINY, "--kv-memory", "1", *arguments]) == 2
    least = capsys.readouterr().err.split()[-1]
    report = generate(capsys, "--kv-memory", least, *arguments)
    assert report["preemptions"] > 0
    assert report["peak_used_blocks"] == report["num_blocks"]
    assert report["layout"] == layout
    assert [entry["verdict"]["identical"] for entry in report["completions"]] == [True] * len(demo.PROMPTS)
    # One block less, and the longest sequence would never fit.
    smaller = (report["num_blocks"] - 1) * report["pool_bytes"] // report["num_blocks"]
    assert cli.main([*TINY, "--kv-memory", str(smaller), *arguments]) == 2


def test_json_says_it_all(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n  \nZwölf\n", encoding="utf-8")
    report = generate(
        capsys, "--prompts", str(prompts), "--max-new-tokens", "5", "--dtype", "float64", "--threads", "1"
    )
    assert [entry["prompt"] for entry in report["completions"]] == ["one", "Zwölf"]
    first = report["completions"][0]
    assert first["prompt_tokens"] == [demo.BOS, *b"one"]
    assert first["completion"] == demo.decode(first["tokens"])
    assert first["finish"] in ("stop", "length")
    assert first["verdict"]["passed"] is True
    new_tokens = sum(len(entry["tokens"]) for entry in report["completions"])
    assert report["new_tokens"] == new_tokens
    assert report["tokens_per_second"] == pytest.approx(new_tokens / report["seconds"])
    assert report["pool_bytes"] == report["num_blocks"] * 16 * 2 * (32 + 32) * 8 * 4
    assert (report["dtype"], report["device"], report["block_size"]) == ("float64", "cpu", 16)


def test_prompts_from_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\r\nb\x0cB\nc")))
    report = generate(capsys, "--prompts", "-", "--max-new-tokens", "2", "--no-verify")
    assert [entry["prompt"] for entry in report["completions"]] == ["a", "b\x0cB", "c"]
    assert {entry["verdict"] for entry in report["completions"]} == {None}


@pytest.mark.parametrize(
    ("verdict", "code", "line"),
    [
        (Verdict(3, 5, 6, 0.25, 0.0), 1, "  1  DIFFERENT at token 3: 6 instead of 5, whose logit is 0.25 higher"),
        (Verdict(3, 5, 6, 0.25, 0.5), 0, "  1  near tie at token 3: 6 instead of 5, whose logit is 0.25 higher"),
        (Verdict(3, None, 6, float("nan")), 1, "  1  NOT A NUMBER at token 3"),
        (Verdict(3, 5, None, float("inf")), 1, "  1  DIFFERENT: ends before token 3"),
    ],
)
def test_exit_code_of_a_difference(
    verdict: Verdict, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_generate, "verify", lambda *_: verdict)
    assert cli.main([*TINY, "--max-new-tokens", "1"]) == code
    assert line in capsys.readouterr().out
    assert cli.main([*TINY, "--max-new-tokens", "1", "--json"]) == code
    entry = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["completions"][0]
    assert entry["verdict"]["position"] == 3
    assert entry["verdict"]["passed"] is (code == 0)
    assert cli.main([*TINY, "--max-new-tokens", "1", "--no-verify"]) == 0


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16 with words for tokens, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    backend: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    kind: Any = transformers.PreTrainedTokenizerFast
    kind(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_model_from_a_directory(
    saved_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b c\nx y\n")))
        return generate(capsys, "--model", str(saved_model), "--prompts", "-", "--max-new-tokens", "6", *arguments)

    report = run()
    assert report["dtype"] == "bfloat16"
    assert report["completions"][0]["prompt_tokens"] == [2, 3, 4]
    assert report["completions"][0]["verdict"] is None
    for entry in report["completions"]:
        assert len(entry["tokens"]) == 6 or entry["tokens"][-1] == 1
        assert "</s>" not in entry["completion"]
    report = run("--dtype", "float32", "--verify")
    assert report["dtype"] == "float32"
    assert all(entry["verdict"]["identical"] for entry in report["completions"])


def error(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one sentence that goes with exit code 2."""
    assert cli.main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvblocks: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kv-memory", "64KiB"],
            "--kv-memory 64KiB holds 2 blocks of 16 tokens; prompt 6 of 157 tokens, with 64 new, ",
        ),
        (["--kv-memory", "64KiB"], "needs 14: give at least 448KiB"),
        (["--kv-memory", "999999TiB"], "is too much: num_gpu_blocks="),
        (["--max-new-tokens", "4000"], "needs 4156 positions and the model has 4096; lower --max-new-tokens"),
        (["--prompts", "no/such/file"], "--prompts no/such/file cannot be read: "),
        (["--prompts", __file__ + "/.."], "cannot be read: "),
        (["--device", "meta"], "--device meta cannot be used: it holds no numbers"),
        (["--device", "warp"], "--device warp cannot be used: "),
        (["--model", "./no/such/model"], "--model ./no/such/model cannot be served: there is no such directory"),
    ],
)
def test_errors_in_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, arguments)


def test_errors_about_prompts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(" \n")
    assert "has no prompt; give one a line" in error(capsys, ["--prompts", str(prompts)])
    prompts.write_bytes(b"\xff\xfe")
    assert "cannot be read: 'utf-8' codec" in error(capsys, ["--prompts", str(prompts)])


def test_errors_about_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), errors="surrogateescape"))
    assert "--prompts - cannot be read: 'utf-8' codec" in error(capsys, ["--prompts", "-"])


def test_a_token_that_the_model_does_not_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "encode", lambda _: (1, 258))
    assert "prompt 1 has token 258, the model knows 0 to 257; its tokenizer belongs to another" in error(capsys, [])


def test_buffers_are_no_larger_than_the_prompts_need(capsys: pytest.CaptureFixture[str]) -> None:
    most = str(2**31 - 1)
    report = generate(capsys, "--max-new-tokens", "2", "--max-batch-tokens", most, "--max-seqs", most, "--no-verify")
    assert report["forward_passes"] == 2


def test_standard_output_that_takes_nothing() -> None:
    command = [sys.executable, "-m", "kvblocks", *TINY, "--max-new-tokens", "2", "--no-verify"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr, "error" in done.stderr) == (141, False, False)


def test_a_damaged_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, saved_model: Path) -> None:
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert "cannot be served: " in error(capsys, ["--model", str(tmp_path)])


def test_errors_about_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, saved_model: Path) -> None:
    assert "cannot be served: " in error(capsys, ["--model", str(tmp_path)])
    config = transformers.RwkvConfig(vocab_size=28, hidden_size=8, attention_hidden_size=8, num_hidden_layers=2)
    model: Any = transformers.RwkvForCausalLM(config)
    folder = tmp_path / "rwkv"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((saved_model / name).read_bytes())
    model.save_pretrained(folder)
    assert "keeps a recurrent state" in error(capsys, ["--model", str(folder)])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate", "--kv-memory", "64Mi"],
        ["generate", "--kv-memory", "-1MiB"],
        ["generate", "--kv-memory", "8589934592GiB"],
        ["generate", "--block-size", "0"],
        ["generate", "--max-new-tokens", "many"],
        ["generate", "--layout", "DHN"],
        ["generate", "--dtype", "int8"],
        ["guess"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: kvblocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), ("0.5KiB", 512), ("2tib", 2 << 40), ("7B", 7)],
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_generate, "run", lambda args: int(args.kv_memory))
    assert cli.main([*TINY, "--kv-memory", text]) == size


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kvblocks {kvblocks.__version__}\n"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, kvblocks.cli.main; sys.exit(bool({'torch', 'transformers', 'rich', 'numpy'} & sys.modules.keys()))"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("name", ["rich", "transformers"])
def test_a_missing_extra_is_named(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; from kvblocks.cli.main import main; sys.exit(main(['generate']))"
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stderr == (
        f"kvblocks: error: `kvblocks generate` needs {name}, which is not installed; run: "
        'pip install "kvblocks[generate]"\n'
    )


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "run", interrupt)
    assert cli.main(["generate"]) == 130


def test_prompts_with_settings_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "one", "max_new_tokens": 5},
        {"tokens": [demo.BOS, 65], "temperature": 1.0, "seed": 3, "n": 2},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    report = generate(capsys, "--prompts", str(prompts), "--max-new-tokens", "7")
    first, second, third = report["completions"]
    assert (first["prompt"], len(first["tokens"]), first["verdict"]["identical"]) == ("one", 5, True)
    assert second["prompt_tokens"] == third["prompt_tokens"] == [demo.BOS, 65]
    assert (second["prompt"], second["verdict"]) == ("A", None)
    assert second["tokens"] != third["tokens"]
    assert report["prompt_tokens"] == 4 + 2
    assert generate(capsys, "--prompts", str(prompts), "--max-new-tokens", "7")["completions"] == report["completions"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON: "),
        ("[1]", 'line 1 is no object; give {"prompt": "..."}, or {"tokens": [...]} for ids'),
        ('{"prompt": "a", "heat": 1}', "line 1 has 'heat'; there are logprobs, max_new_tokens, messages, min_p, n, "),
        ('{"max_new_tokens": 4}', "line 1 must have one of prompt, messages, tokens"),
        ('{"prompt": 4}', "line 1 has a prompt of type int; give a text, or messages or tokens"),
        ('{"tokens": "abc"}', "line 1 has tokens that are no list of ints"),
        ('{"prompt": "a", "top_p": 2}', "line 1: top_p=2 must be 0 to 1"),
        (
            '{"prompt": "a", "top_p": 0.5}',
            "top_p=0.5 changes nothing where the best token is taken; give a temperature",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "the built-in model knows no chats; give --model with a tok",
        ),
    ],
)
def test_errors_in_jsonl(line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    assert message in error(capsys, ["--prompts", str(prompts)])


def test_chats(saved_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kind: Any = transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(saved_model)
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prompts = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    prompts.write_text(json.dumps({"messages": messages, "max_new_tokens": 2}) + '\n{"prompt": "a b"}')
    arguments = ["--model", str(tmp_path), "--prompts", str(prompts), "--max-new-tokens", "3"]
    assert "cannot be put into the chat template: " in error(capsys, arguments)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}z{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    report = generate(capsys, *arguments, "--chat", "--system", "q")
    shown = [tokenizer.decode(entry["prompt_tokens"]) for entry in report["completions"]]
    assert shown == ["s q u c a d u e z", "s q u a b z"]
    assert [entry["prompt"] for entry in report["completions"]] == ["e", "a b"]
    assert [len(entry["tokens"]) for entry in report["completions"]] == [2, 3]


def test_what_is_shown_of_prompts_and_of_answers_without_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab" * 150)))
    monkeypatch.setattr(demo, "decode", lambda tokens: "")
    assert cli.main([*TINY, "--prompts", "-", "--max-new-tokens", "1", "--no-verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"  1  {'ab' * 100}… (300 characters)"
    assert lines[1] == "  →  (no text: length after 1 token)"


def test_what_is_found_after_a_preemption_is_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    report = generate(capsys, "--kv-memory", "640KiB", "--max-new-tokens", "48", "--no-verify")
    assert report["preemptions"] > 0
    assert report["hit_tokens"] < report["prompt_tokens"]
    assert report["readmitted_hit_tokens"] > 0
    assert cli.main([*TINY, "--kv-memory", "640KiB", "--max-new-tokens", "48", "--no-verify"]) == 0
    assert f"re-admitted   {report['readmitted_hit_tokens']:,} cached tokens reused" in capsys.readouterr().out
