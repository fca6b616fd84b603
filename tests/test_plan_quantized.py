"""Weights of quantized checkpoints by their `quantization_config` alone: published sizes, and each method by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvblocks import Plan, plan
from kvblocks.cli.main import main
from kvblocks.errors import UnknownModel
from kvblocks.planner.quantized import OTHERWISE

CONFIGS = Path(__file__).resolve().parent / "data" / "configs"

# Bytes of all tensors of the published checkpoints, as their indices give them; none holds layers for multi-token
# prediction. Kimi K2's keeps a few vectors in float32 that the model has in bfloat16.
PUBLISHED = {
    "gpt-oss-20b": (13_761_264_768, 0.0),  # mxfp4
    "kimi-k2-instruct": (1_029_173_256_720, 1e-8),  # fp8
    "kimi-k2.5": (595_148_192_736, 1e-4),  # compressed-tensors, int4, of the text half alone
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    planned = plan(CONFIGS / f"{name}.json", weights="auto")
    published, within = PUBLISHED[name]
    assert planned.weights_bytes == pytest.approx(published, rel=within, abs=0)
    assert "note: weights are estimated from quantization_config (" in planned.explain()


HIDDEN, INNER, HEADS, DIM, VOCABULARY, LAYERS = 256, 512, 4, 64, 1000, 3
MATRICES = [(HEADS * DIM, HIDDEN)] * 3 + [(HIDDEN, HEADS * DIM)] + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
REST = 2 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)  # embedding, output and norms in bfloat16


def quantized(**asked: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "quantization_config": asked,
    }


def counted(**asked: Any) -> Plan:
    return plan(quantized(**asked), weights="auto")


def group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
METHODS: list[tuple[str, dict[str, Any], Any]] = [
    (
        "fp8-blocks",
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda rows, columns: rows * columns + rows // 128 * (columns // 128) * 4,
    ),
    ("fp8-matrix", {"quant_method": "fp8"}, lambda rows, columns: rows * columns + 4),
    ("fbgemm", {"quant_method": "fbgemm_fp8"}, lambda rows, columns: rows * columns + rows * 4),
    (
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        lambda rows, columns: rows * columns // 2 + rows * columns // 128 * 2 + rows * columns // 128 // 2,
    ),
    (
        "gptq",
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True},
        lambda rows, columns: rows * columns + rows * columns // 32 * 3 + columns * 4,
    ),
    (
        "gptq-columns",
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        lambda rows, columns: rows * columns // 2 + rows * 2 + rows // 2 + columns * 4,
    ),
    (
        "auto-round",
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_awq"},
        lambda rows, columns: rows * columns // 2 + rows * columns // 128 * 2 + rows * columns // 128 // 2,
    ),
    ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda rows, columns: rows * columns + rows * 4),
    (
        "nf4",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda rows, columns: rows * columns // 2 + rows * columns // 64 * 4 + 160,
    ),
    (
        "nf4-twice",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        lambda rows, columns: rows * columns // 2 + rows * columns // 64 + rows * columns // 64 // 256 * 4 + 160,
    ),
    (
        "packed",
        {
            **COMPRESSED,
            "format": "pack-quantized",
            "config_groups": group(num_bits=4, type="int", strategy="group", group_size=128, symmetric=False),
        },
        lambda rows, columns: rows * columns // 2 + rows * columns // 128 * 2 + rows * columns // 128 // 2 + 16,
    ),
    (
        "channels",
        {**COMPRESSED, "config_groups": group(num_bits=8, type="float", strategy="channel", symmetric=True)},
        lambda rows, columns: rows * columns + rows * 2,
    ),
    (
        "nvfp4",
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "ignore": ["lm_head"],
            "config_groups": group(num_bits=4, type="float", group_size=16),
        },
        lambda rows, columns: rows * columns // 2 + rows * columns // 16 + 8,
    ),
]


@pytest.mark.parametrize(("asked", "stored"), [case[1:] for case in METHODS], ids=[case[0] for case in METHODS])
def test_each_method_by_hand(asked: dict[str, Any], stored: Any) -> None:
    assert counted(**asked).weights_bytes == REST + LAYERS * sum(stored(*matrix) for matrix in MATRICES)


FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("names", "matrices"),
    [
        (["mlp"], LAYERS * 3),
        (["model.layers.1"], 7),
        (["language_model.model.layers.1.mlp.*", "model.layers.2.self_attn.q_proj"], 4),
        (["re:.*self_attn.*"], LAYERS * 4),
        (["*.down_proj", "no_such"], LAYERS),
        (["layers.1", "layers.3.eh_proj", "mtp.fc"], 7),
    ],
)
def test_what_is_not_quantized(names: list[str], matrices: int) -> None:
    """Names, parts of paths, globs and expressions; a layer after the last is one for multi-token prediction."""
    planned = counted(**FP8, modules_to_not_convert=names)
    all_of_them = counted(**FP8).weights_bytes
    assert planned.weights_bytes > all_of_them
    sizes = {rows * columns - rows * columns // 128**2 * 4 for rows, columns in MATRICES}
    kept = planned.weights_bytes - all_of_them  # a byte a number, but for the scales
    assert min(sizes) * matrices <= kept <= max(sizes) * matrices
    assert ("no_such" in planned.explain()) == ("no_such" in names)
    assert "mtp.fc" not in planned.explain()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quant_method": "hqq"}, r"quant_method='hqq': known are auto-round, awq"),
        ({}, r"quant_method=''"),
        ({**FP8, "modules_to_not_convert": ["nothing", "of_the_kind"]}, "'nothing', by names that are none of"),
        ({**FP8, "modules_to_not_convert": "lm_head"}, r"modules_to_not_convert='lm_head': no list of names"),
        ({**FP8, "modules_to_not_convert": ["re:("]}, "no regular expression"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, r"weight_block_size=\[0, 1\]: no two numbers"),
        ({"quant_method": "awq", "bits": "four"}, "bits='four': no number of bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {}}}, "dynamic=.* several ways"),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, "lm_head=True: how the output's matrix"),
        ({"quant_method": "auto-round", "bits": 4}, "packing_format='': not GPTQ's nor AWQ's"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit=None: neither 4 bits nor 8"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "stored in several ways"),
        ({"quant_method": "awq", "bits": -1}, "bits=-1: no number of bits"),
        ({**COMPRESSED, "config_groups": [3]}, r"config_groups=\[3\]: no object"),
        ({**COMPRESSED, "config_groups": []}, r"config_groups=\[\]: no object that names groups"),
        ({**COMPRESSED, "config_groups": {}}, r"config_groups=\{\}: no object that names groups"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "config_groups=None: no object that names groups"),
        ({**COMPRESSED, "config_groups": group(num_bits=8, strategy="block", block_structure="x")}, "no two numbers"),
        ({**COMPRESSED, "config_groups": group(num_bits=4, group_size=0)}, "group_size=0: no number"),
        ({**COMPRESSED, "config_groups": {"group_0": 3}}, "config_groups.group_0=3: no object"),
        ({**COMPRESSED, "config_groups": group(num_bits=8, strategy="other")}, "strategy='other': how its scales lie"),
    ],
)
def test_what_is_left_open_is_refused_by_name(asked: dict[str, Any], message: str) -> None:
    asked = asked or {"bits": 4}
    with pytest.raises(UnknownModel, match=message) as raised:
        counted(**asked)
    assert str(raised.value).endswith(OTHERWISE)


@pytest.mark.parametrize("wrong", [[], ["fp8"], "fp8", "", 5, 0, 1.5, True, False])
@pytest.mark.parametrize("field", ["quantization_config", "compression_config", "text_config", "llm_config"])
def test_what_must_be_an_object_and_is_none(
    field: str, wrong: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**quantized(), field: wrong}))
    assert main(["plan", str(tmp_path), "--weights", "70GB"]) == 2
    said = f"kvblocks: error: {field}={wrong!r} of the config is of type {type(wrong).__name__}; it must be an object"
    assert capsys.readouterr().err.strip() == said


def test_a_scheme_for_k_and_v_that_is_no_object() -> None:
    with pytest.raises(UnknownModel, match="kv_cache_scheme='fp8' of the config is of type str; it must be an object"):
        plan({**quantized(), "quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "fp8"}})
    assert plan({**quantized(), "quantization_config": None, "text_config": None}).dtype == "bfloat16"


@pytest.mark.parametrize("model_type", ["qwen", "chatglm"])
def test_where_no_config_answers_the_folder_or_the_hub_does(model_type: str) -> None:
    config = {
        **quantized(),
        "model_type": model_type,
        "kv_channels": DIM,
        "num_layers": 3,
        "multi_query_attention": False,
    }
    del config["quantization_config"]
    with pytest.raises(
        UnknownModel, match=f"no model_type='{model_type}'; .* give their folder or hub id, or the bytes$"
    ):
        plan(config, weights="auto")


def test_linear_layers_with_the_inputs_first() -> None:
    """GPT-2's, of 96 outputs for 32 inputs and the like: GPTQ keeps an index for each input."""
    small = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    config = small | {"torch_dtype": "float16", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    matrices = sum(rows * columns // 2 + rows * 2 + rows // 2 + columns * 4 for rows, columns in shapes)
    rest = 2 * (50 * 32 + 16 * 32 + 2 * 32 + 2 * (4 * 32 + 96 + 32 + 128 + 32))
    assert plan(config, weights="auto").weights_bytes == 2 * matrices + rest


def test_experts_that_a_type_stores_otherwise() -> None:
    config = json.loads((CONFIGS / "gpt-oss-20b.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UnknownModel, match=r"whether it quantized the experts of gpt_oss .* or the bytes"):
        plan(config, weights="auto")
    for dtype in ("fp4", ["fp4"]):
        with pytest.raises(UnknownModel, match=r"how it goes with expert_dtype=.*fp4'.* is not known here"):
            plan({**config, "expert_dtype": dtype}, weights="auto")
    assert plan(config, weights="auto", weights_dtype="int8").weights_bytes == 20_914_757_184


def test_weights_where_no_dtype_is_named_do_not_depend_on_that_of_k_and_v() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": 1000, **sizes}
    plans = [plan(config, weights="auto", dtype=dtype, memory="80GiB") for dtype in (None, "fp8")]
    assert plans[0].weights_bytes == plans[1].weights_bytes > 0
    assert any("weights are taken to be bfloat16" in note for note in plans[1].to_dict()["notes"])
