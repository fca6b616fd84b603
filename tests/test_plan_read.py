"""Where a plan's numbers come from: objects, dicts, files, the hub; what configs leave out; what is not known."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers

from kvblocks import plan
from kvblocks.cli.main import main
from kvblocks.models.architectures import TRANSLATED, read_fields
from kvblocks.models.fields import Fields
from kvblocks.models.read import read
from kvblocks.planner import MODEL_TYPES, MissingField, UnknownModel

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}
_SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "torch_dtype": "float16"}
PER_TOKEN = 4 * 2 * (16 + 16) * 2


def layers(config: dict[str, Any]) -> Any:
    return read_fields(Fields(config["model_type"], config)).layers


# --- sources


def test_every_way_to_name_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    path = tmp_path / "tiny" / "config.json"
    path.write_text(json.dumps(LLAMA))
    kinds: Any = transformers.LlamaConfig
    shape = {name: value for name, value in LLAMA.items() if name not in ("model_type", "torch_dtype")}
    for model in (LLAMA, path, str(path), tmp_path / "tiny", str(tmp_path / "tiny"), kinds(**shape, dtype="bfloat16")):
        assert plan(model).bytes_per_token == PER_TOKEN
    assert plan(path).model.name == plan(tmp_path / "tiny").model.name == "tiny"
    assert plan(path.rename(tmp_path / "other.json")).model.name == "other"
    numbers = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16}
    assert plan(numbers, dtype="bfloat16").bytes_per_token == PER_TOKEN
    assert plan({**numbers, "v_head_dim": 8}, dtype=torch.float16).bytes_per_token == PER_TOKEN * 3 // 4
    assert plan(plan(LLAMA).model).bytes_per_token == PER_TOKEN


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ValueError, "is not JSON"),
        ("[]", ValueError, "holds a list; a config is an object"),
        ("{}", UnknownModel, "has no model_type"),
        ('{"model_type": 5}', UnknownModel, "has no model_type"),
        (
            '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}',
            UnknownModel,
            "is an adapter's .* give the config of its base model, 'org/base'",
        ),
        (
            '{"model_type": "no_such"}',
            UnknownModel,
            "model_type='no_such' is not an architecture that the planner knows",
        ),
        (b"\xff\xfe", ValueError, "is not JSON"),
        (b'{"model_type": "llama", "num_hidden_layers": ' + b"9" * 5000 + b"}", ValueError, "is not JSON: Exceeds the"),
    ],
)
def test_files_that_are_no_configs(content: str | bytes, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=message):
        plan(path)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("./nowhere", FileNotFoundError, r"\./nowhere is neither a folder"),
        ("nowhere.json", FileNotFoundError, r"nowhere\.json is neither a folder"),
        ("a/b/c", FileNotFoundError, "a/b/c is neither a folder"),
        ("", FileNotFoundError, "has no config"),
        ("a" * 5000, FileNotFoundError, r"^a{60} cannot be looked up: File name too long"),
        (5, TypeError, "model=5 is of type int; give a config"),
        (None, TypeError, "model=None is of type NoneType"),
        ({}, UnknownModel, "a dict of nothing has neither model_type"),
        ({"layers": 3}, UnknownModel, "a dict of layers has neither model_type"),
        ({"model_type": "llama", 5: 3}, UnknownModel, "the config has the key 5; fields have names"),
        ({"num_layers": 3}, UnknownModel, "plain numbers need num_kv_heads, head_dim too"),
        ({"num_layers": 3, "heads": 1}, UnknownModel, "heads: not known among plain numbers"),
        ({"num_layers": 0, "num_kv_heads": 1, "head_dim": 1}, ValueError, r"num_layers=0 is outside 1\.\.4096"),
        ({"num_layers": 10**6, "num_kv_heads": 1, "head_dim": 1}, ValueError, "num_layers=1000000 is outside"),
        (
            {"num_layers": 2, "num_kv_heads": 3, "head_dim": 1, "num_attention_heads": 8},
            ValueError,
            "num_attention_heads=8 does not divide by num_kv_heads=3",
        ),
        ({"num_layers": 2, "num_kv_heads": 1.0, "head_dim": 1}, TypeError, "num_kv_heads=1.0 is of type float"),
        ({"num_layers": 2, "num_kv_heads": 1, "head_dim": True}, TypeError, "head_dim=True is a bool"),
    ],
)
def test_what_names_no_model(model: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        plan(model, dtype="bfloat16")


def test_a_config_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a latent cache a second time, for what it would be with the other choice."""
    calls: list[str] = []

    def counted(fields: Fields, name: str | None = None) -> Any:
        calls.append(fields.mla)
        return read_fields(fields, name)

    monkeypatch.setattr("kvblocks.models.read.read_fields", counted)
    plan(LLAMA)
    assert calls == ["latent"]
    latent = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_attention_heads": 4, "kv_lora_rank": 16}
    latent |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "torch_dtype": "bfloat16"}
    plan(latent, mla="expanded")
    assert calls == ["latent", "latent", "expanded"]


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config"):
        plan(tmp_path)


# --- what is not known is an error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_hidden_layers": "4"}, r"llama\.num_hidden_layers='4' is of type str"),
        ({"num_hidden_layers": 0}, r"llama\.num_hidden_layers=0 is outside"),
        ({"num_hidden_layers": 5000}, r"llama\.num_hidden_layers=5000 is outside 1\.\.4096"),
        ({"hidden_size": 65}, r"llama\.hidden_size=65 does not divide by num_attention_heads=4"),
        ({"num_key_value_heads": 3}, r"llama\.num_attention_heads=4 does not divide by the 3 heads of K and V"),
        ({"num_key_value_heads": 8}, r"llama\.num_attention_heads=4 does not divide by the 8 heads of K and V"),
        (
            {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 2, "attn_config": {"kv_n_heads": 2}},
            r"attn_type='multihead_attention' and kv_n_heads=2 say otherwise",
        ),
        (
            {"model_type": "dbrx", "d_model": 64, "n_heads": 8, "n_layers": 2, "attn_config": {"kv_n_heads": 3}},
            r"dbrx\.n_heads=8 does not divide by the 3 heads",
        ),
        ({"sliding_window": 9}, r"llama\.sliding_window=9: the planner does not know what this field means"),
        ({"attention_chunk_size": 9}, r"llama\.attention_chunk_size=9"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, r"llama\.layer_types="),
        ({"layer_types": 5}, r"llama\.layer_types=5"),
        ({"layer_types": [{}]}, r"llama\.layer_types="),
        ({"kv_lora_rank": 8}, r"llama\.kv_lora_rank=8"),
        ({"num_kv_shared_layers": 2}, r"llama\.num_kv_shared_layers=2"),
        ({"mamba_d_state": 16}, r"llama\.mamba_d_state=16"),
        ({"model_type": "gemma2", "sliding_window": 9, "layer_types": ["full"] * 4, "head_dim": 16}, "the kind 'full'"),
        (
            {"model_type": "gemma2", "sliding_window": 9, "layer_types": ["full_attention"]},
            "names 1 layers, the model has 4",
        ),
        ({"model_type": "gemma2", "sliding_window": 9, "layer_types": 5}, r"gemma2\.layer_types=5 is no list of names"),
        (
            {"model_type": "gemma3_text", "sliding_window": 9, "use_bidirectional_attention": True, "head_dim": 16},
            "a model that attends both ways keeps no cache",
        ),
    ],
)
def test_fields_that_the_planner_does_not_know(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        plan({**LLAMA, **changes, "transformers_version": "5.0.0"})


def test_fields_that_mean_nothing_are_no_error() -> None:
    harmless = {"sliding_window": None, "layer_types": ["full_attention"] * 4, "kv_lora_rank": None, "colour": "blue"}
    assert plan({**LLAMA, **harmless}).bytes_per_token == PER_TOKEN


@pytest.mark.parametrize("name", tiny_models.architectures()[::9])
def test_a_wrong_value_is_an_unknown_model_and_nothing_else(name: str) -> None:
    base = text_half(tiny_models.tiny_config(name).to_dict())
    wrong: list[Any] = [None, "abc", -1, 0, 1.5, [], {}, True, 2**40, ["x"], [1, 2], {"1": 2}, {"a": {}}, float("nan")]
    refused = 0
    for field in base:
        for value in wrong if field != "model_type" else ():
            try:
                found = layers({**base, field: value})
            except UnknownModel:
                refused += 1
            else:
                assert found
    assert refused > 5


# --- what configs leave out


def text_half(config: dict[str, Any]) -> dict[str, Any]:
    while config["model_type"] not in MODEL_TYPES:
        config = config["text_config"]
    return dict(config)


EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 4


@pytest.mark.parametrize(
    "change", [lambda config, name: config.pop(name), lambda config, name: config.update({name: None})]
)
@pytest.mark.parametrize("name", [name for name in tiny_models.architectures() if name in MODEL_TYPES][::EVERY])
def test_a_field_left_out_means_what_transformers_takes_it_to_mean(
    name: str, change: Callable[[dict[str, Any], str], Any]
) -> None:
    """Without transformers the planner reads the same or says that the field is missing, field by field."""
    base = tiny_models.tiny_config(name).to_dict()
    kind = type(tiny_models.tiny_config(name))
    compared = 0
    for field in base:
        if field == "model_type":
            continue
        config = dict(base)
        change(config, field)
        try:
            alone = layers(config)
        except MissingField:
            continue
        except UnknownModel:
            alone = "refused"
        try:
            completed = layers(kind.from_dict(dict(config)).to_dict())
        except UnknownModel:
            completed = "refused"
        except Exception:  # what transformers refuses has no meaning to compare with
            continue
        # A layer kind whose window transformers switches off contradicts itself: its own caches refuse it.
        assert (field, alone) == (field, completed) or completed == "refused"
        compared += 1
    assert compared > 5


def test_fields_of_before_are_translated_by_transformers() -> None:
    """A hub config of before names its full layers' heads in fields of their own."""
    gemma = tiny_models.OWN["gemma4_text"]
    config = {"model_type": "gemma4_text", **gemma, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    config["dtype"] = "bfloat16"
    planned = plan(config)
    shapes = {layer.kept[0].heads * layer.kept[0].dim for layer in planned.model.layers if layer.kept}
    assert shapes == {2 * 16, 1 * 24}
    assert "gemma4_text" in TRANSLATED


def test_a_config_of_before_with_its_text_half_flat() -> None:
    flat = {"model_type": "qwen2_5_vl", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    flat |= {"num_key_value_heads": 2, "use_sliding_window": False, "torch_dtype": "bfloat16", "vision_config": {}}
    assert plan(flat).bytes_per_token == PER_TOKEN


def test_configs_saved_by_transformers_are_read_as_they_were(tmp_path: Path) -> None:
    for name in tiny_models.architectures()[::EVERY]:
        config = tiny_models.tiny_config(name)
        config.save_pretrained(tmp_path / name)
        source = read(tmp_path / name)
        assert source.read("latent").layers == read(config).read("latent").layers, name


def run(code: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_bare_config_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "qwen2", "use_sliding_window": False}))
    code = """
import sys
from kvblocks.cli.main import main
code = main(["plan", sys.argv[1], "--memory", "1GiB", "--json"])
heavy = {"torch", "transformers", "numpy", "rich", "matplotlib", "huggingface_hub"} & set(sys.modules)
print(code, sorted(heavy), file=sys.stderr)
assert not heavy and code == 0
"""
    found = json.loads(run(code, str(tmp_path), cwd=tmp_path))
    assert found["bytes_per_token"] == PER_TOKEN
    assert found["num_blocks"] == 2**30 // (16 * PER_TOKEN)


def test_without_transformers_the_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "gemma"}))
    code = """
import sys
sys.modules["transformers"] = None
from kvblocks import plan
try:
    plan(sys.argv[1])
except ValueError as error:
    print(error)
"""
    message = run(code, str(tmp_path / "config.json"), cwd=tmp_path)
    assert "has no head_dim" in message
    assert 'pip install "kvblocks[plan]"' in message
    assert plan(tmp_path / "config.json").bytes_per_token == 4 * 2 * (256 + 256) * 2  # gemma's own default


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"model_type": "llama"}, "num_hidden_layers;"),
        ({"model_type": "llama", "intermediate_size": 64, "hidden_size": 64}, "num_hidden_layers;"),
        ({"model_type": "mamba", "dim": 64, "n_layers": 4, "vocab_size": 99}, "num_hidden_layers;"),
        ({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}, "hidden_size;"),
        ({"model_type": "gpt2", "n_layer": 2, "n_head": 4}, "n_embd;"),
        ({"model_type": "qwen3_next", "torch_dtype": "bfloat16"}, "num_hidden_layers;"),
        ({"model_type": "nemotron_h", "num_hidden_layers": 52, "hidden_size": 64}, "layers_block_type;"),
        ({"model_type": "qwen3_5_moe", "hidden_size": 64}, "num_hidden_layers, nor a text_config that would;"),
        ({"model_type": "qwen3_5_moe", "num_hidden_layers": 2, "text_config": None}, "num_hidden_layers, nor a text"),
        ({"model_type": "qwen3_5_moe", "num_hidden_layers": 2, "dtype": "bfloat16"}, "num_hidden_layers, nor a text"),
        ({"model_type": "llava", "hidden_size": 4096}, "num_hidden_layers, nor a text_config that would;"),
        ({"model_type": "kosmos-2", "vocab_size": 99}, "layers, nor a text_config that would;"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "num_hidden_layers, nor"),
    ],
)
def test_the_number_of_layers_and_the_width_are_never_a_types_defaults(config: dict[str, Any], missing: str) -> None:
    for version in ("4.57.0", "5.2.0"):
        with pytest.raises(UnknownModel, match=f"of model_type='{config['model_type']}' gives no {missing}"):
            plan(config | {"transformers_version": version})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
            "llama': num_key_value_heads=4",
        ),
        ({"model_type": "mistral", **_SMALL}, "mistral': .*num_key_value_heads=8, sliding_window=4096"),
        (
            {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, **_SMALL},
            "gemma2': layer_types$",
        ),
        (
            {"model_type": "granitemoehybrid", "num_key_value_heads": 2, **_SMALL},
            "granitemoehybrid': layer_types, mamba_d_conv=4",
        ),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}},
            "llama': .*num_hidden_layers=32, num_key_value_heads=32",
        ),
    ],
)
def test_whatever_else_is_a_types_default_is_named(config: dict[str, Any], named: str) -> None:
    """LLaVA 1.5 is published so: transformers writes a text half without what equals the defaults."""
    [note] = [note for note in plan(config, dtype="float16").model.notes if "filled in" in note]
    assert re.search(named, note)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("wrong", ["foo", "", ["bfloat16"], 16, True, {"a": 1}, float("nan")])
def test_a_dtype_that_is_none_is_named_as_the_configs(
    field: str, wrong: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    halves = ({**base, field: wrong}, {"model_type": "llava", "text_config": base, field: wrong})
    for config in (*halves, {**base, "model_type": "glm_moe_dsa", field: wrong}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for asked in ([], ["--dtype", "fp8"], ["--weights", "auto"]):
            assert main(["plan", str(tmp_path), *asked]) == 2
            said = capsys.readouterr().err
            assert re.search(rf"error: \w+\.{field}=.* is not the name of a dtype, like 'bfloat16'; correct it", said)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters", "linear_attn_config"])
def test_what_transformers_stumbles_over_is_named(field: str) -> None:
    """In a config of before, which transformers is asked to complete."""
    config = {"model_type": "kimi_linear", "num_hidden_layers": 4, "hidden_size": 64, field: 7}
    with pytest.raises(UnknownModel, match=rf"{field}=7 of the config is of type int; it must be an object"):
        plan(config)


def test_what_transformers_refuses_says_what_to_do() -> None:
    config = {"model_type": "zamba2", "num_hidden_layers": 3, "hidden_size": 64}
    with pytest.raises(UnknownModel, match=r"^transformers refuses the config of .*; correct it, or give the numbers"):
        plan(config)


def test_older_fields_are_no_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    """A field that the config gives under an older name is not said to be missing."""
    kimi = _SMALL | {"model_type": "kimi_linear", "kv_lora_rank": 32, "qk_rope_head_dim": 8, "num_key_value_heads": 8}
    kimi |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64}
    given = {"kda_layers": [1, 2], "full_attn_layers": [3], "short_conv_kernel_size": 4, "head_dim": 128}
    assert plan(kimi | {"linear_attn_config": given | {"num_heads": 32}}).model.notes == ()
    gemma = _SMALL | {"model_type": "gemma4_text", "num_key_value_heads": 8, "head_dim": 8, "global_head_dim": 16}
    plan(gemma | {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8, "num_kv_shared_layers": 0})
    assert "transformers" not in capfd.readouterr().err  # whose warnings are for those who run a model


def test_a_config_that_gives_everything_has_no_note_of_defaults() -> None:
    assert plan(LLAMA).model.notes == ()
    kinds: Any = transformers.LlamaConfig
    assert plan(kinds(dtype="float16")).model.notes == ()


def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2}
    for _ in range(3000):
        config = {"model_type": "llava", "text_config": config}
    with pytest.raises(UnknownModel, match="more than 8 text_configs"):
        plan(config)
    (tmp_path / "config.json").write_text('{"text_config": ' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ValueError, match="nests deeper than any config does"):
        plan(tmp_path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    text = json.dumps(config | {"num_key_value_heads": 2, "head_dim": 16, "dtype": "float16"})
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert plan(tmp_path).bytes_per_token == 2 * 2 * 2 * 16 * 2


def test_state_is_kept_in_the_dtype_that_a_config_asks_for() -> None:
    """The numbers of Qwen 3.5's smaller mixture: heads of 128, 16 of keys and 32 of values, a kernel of 4."""
    config: dict[str, Any] = {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, "hidden_size": 2048}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "dtype": "bfloat16"}
    config |= {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    config |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    config |= {"layer_types": [*["linear_attention"] * 3, "full_attention"]}
    columns, matrices = 3 * (2 * 16 + 32) * 128, 32 * 128 * 128
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        planned = plan(config | {"mamba_ssm_dtype": dtype})
        assert planned.bytes_per_token == 2 * 2 * 256 * 2
        assert planned.state_bytes == 3 * (columns * 2 + matrices * itemsize)
    with pytest.raises(UnknownModel, match="mamba_ssm_dtype=4 is no dtype"):
        plan(config | {"mamba_ssm_dtype": 4})


def test_gemma_4_as_transformers_wrote_it_at_first() -> None:
    """Full layers had fields of their own for heads and dims; later versions write both for each layer."""
    pytest.importorskip("transformers")
    kinds = [*["sliding_attention"] * 5, "full_attention"]
    text: dict[str, Any] = {"model_type": "gemma4_text", "num_hidden_layers": 6, "layer_types": kinds}
    text |= {"hidden_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    text |= {"global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "sliding_window": 1024}
    text |= {"num_kv_shared_layers": 0}
    config = {"model_type": "gemma4", "text_config": text, "dtype": "bfloat16", "transformers_version": "5.6.2"}
    assert plan(config).bytes_per_token == 5 * 2 * 8 * 256 * 2 + 2 * 2 * 512 * 2


_LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        ({"model_type": "qwen", "kv_channels": 8, **_SMALL}, 3 * 2 * 8 * 8 * 2),
        ({"model_type": "baichuan", **_SMALL}, 3 * 2 * 8 * 8 * 2),
        ({"model_type": "internlm2", "num_key_value_heads": 2, **_SMALL}, 3 * 2 * 2 * 8 * 2),
        ({"model_type": "Yi", "num_key_value_heads": 2, **_SMALL}, 3 * 2 * 2 * 8 * 2),
        ({"model_type": "phi4mm", "sliding_window": 99, "num_key_value_heads": 2, **_SMALL}, 3 * 2 * 2 * 8 * 2),
        (
            {"model_type": "git", "architectures": ["Grok1ForCausalLM"], "num_key_value_heads": 2, **_SMALL},
            3 * 2 * 2 * 8 * 2,
        ),
        ({"model_type": "exaone", "num_layers": 5, "num_key_value_heads": 2, **_SMALL}, 5 * 2 * 2 * 8 * 2),
        ({"model_type": "mimo", "use_sliding_window": False, "sliding_window": 4, **_SMALL}, 3 * 2 * 8 * 8 * 2),
        (
            {"model_type": "chatglm", "num_layers": 5, "kv_channels": 8, "multi_query_attention": True}
            | {"multi_query_group_num": 2, **_SMALL},
            5 * 2 * 2 * 8 * 2,
        ),
        ({"model_type": "chatglm", "num_layers": 5, "kv_channels": 8, **_SMALL, "multi_query_attention": None}, 1280),
        ({"model_type": "kimi_k2", **_LATENT, **_SMALL}, 3 * (32 + 8) * 2),
        ({"model_type": "own", "architectures": ["DeepseekV3ForCausalLM"], **_LATENT, **_SMALL}, 3 * (32 + 8) * 2),
        ({"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "head_dim": 8, **_SMALL}, 3 * 2 * 2 * 8 * 2),
        ({"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "torch_dtype": "float16"}, 3 * 2 * 2 * 8 * 2),
        ({"dim": 64, "n_layers": 3, "n_heads": 8, "torch_dtype": "float16"}, 3 * 2 * 8 * 8 * 2),
        (
            {
                "model_type": "my_own_chat",
                "llm_config": {"model_type": "internlm2", "num_key_value_heads": 2, **_SMALL},
            },
            3 * 2 * 2 * 8 * 2,
        ),
    ],
)
def test_types_whose_code_comes_with_the_weights(config: dict[str, Any], per_token: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path).bytes_per_token == per_token


@pytest.mark.parametrize(("field", "number"), [("num_key_value_heads", 2), ("head_dim", 16)])
def test_a_field_that_says_otherwise_than_the_type(field: str, number: int) -> None:
    config = {"model_type": "git", **_SMALL}
    assert plan(config | {"num_key_value_heads": 8, "head_dim": 8}).bytes_per_token == 3 * 2 * 8 * 8 * 2
    with pytest.raises(UnknownModel, match=rf"git.{field}={number}: the planner knows git with 8 only"):
        plan(config | {field: number})


def test_layers_that_a_search_has_thinned_out() -> None:
    attention: list[dict[str, Any]] = [{"n_heads_in_group": 4}, {"no_op": True, "n_heads_in_group": None}]
    attention.append({"n_heads_in_group": 8, "window_length": 32})
    config = {"model_type": "nemotron-nas", "block_configs": [{"attention": one} for one in attention], **_SMALL}
    planned = plan(config)
    assert planned.bytes_per_token == (2 + 1) * 2 * 8 * 2
    assert [len(layer.kept) for layer in planned.model.layers] == [2, 0, 2]
    assert planned.cache_bytes(1000) == 1000 * 2 * 2 * 8 * 2 + 32 * 1 * 2 * 8 * 2
    with pytest.raises(UnknownModel, match="must be a list of num_hidden_layers=3 blocks"):
        plan(config | {"block_configs": [1]})
    with pytest.raises(UnknownModel, match=r"block_configs\[1\] says nothing of its attention"):
        plan(config | {"block_configs": [{"attention": attention[0]}, 1, 2]})


def test_a_config_without_a_dtype_is_taken_to_be_bfloat16_and_says_so() -> None:
    config = {"model_type": "baichuan", **_SMALL, "torch_dtype": None}
    planned = plan(config)
    assert planned.dtype == "bfloat16"
    assert "no dtype is named: K and V are taken to be bfloat16" in planned.explain()
    assert "no dtype is named" not in plan(config, dtype="float32").explain()


def test_what_means_something_else_in_these_files_is_refused() -> None:
    with pytest.raises(UnknownModel, match="kv_lora_rank"):
        plan({"dim": 64, "n_layers": 3, "n_heads": 8, "kv_lora_rank": 8})
