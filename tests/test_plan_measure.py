"""Models that no table knows, measured: held against the tables where both answer; and what is refused, and why."""

import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvblocks import plan
from kvblocks.errors import UnknownModel
from kvblocks.models.measure import NOTE, measure

KINDS: Any = CONFIG_MAPPING
EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 4

# Types whose model cannot be run without memory, or keeps what a few lengths do not explain. The tables know them.
NOT_MEASURED = frozenset(
    [
        "big_bird",
        "bigbird_pegasus",
        "cpmant",
        "dbrx",
        "deepseek_v4",
        "gemma4",
        "gemma4_unified",
        "gpt-sw3",
        "gpt2",
        "jetmoe",
        "longcat_flash",
        "megatron-bert",
        "minimax",
        "minimax_m3_vl_text",
        "moshi",
        "openai-gpt",
        "qwen4_exp",
        "qwen4_exp_text",
        "recurrent_gemma",
        "reformer",
        "rembert",
        "roformer",
        "rwkv",
        "xlm",
        "xlnet",
        "xlstm",
        "xmod",
    ]
)


@pytest.mark.parametrize("name", tiny_models.architectures()[::EVERY])
def test_what_is_measured_is_what_the_tables_say(name: str) -> None:
    config = tiny_models.tiny_config(name)
    if name in NOT_MEASURED:
        with pytest.raises(UnknownModel, match="give the numbers instead: num_layers, num_kv_heads, head_dim"):
            measure(config.to_dict(), None)
        return
    measured = measure(config.to_dict(), None)
    asked: dict[str, Any] = {"dtype": "bfloat16", "stored": "transformers"}
    for length in (1, 7, 8, 9, 10, 40, 100):
        assert plan(measured, **asked).cache_bytes(length) == plan(config, **asked).cache_bytes(length)


def unknown() -> dict[str, Any]:
    """A type that no table knows, small: M2M-100's, with its own K and V and an encoder's."""
    small = {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
    return {"model_type": "m2m_100", **small, "dtype": "float32"}


def test_a_type_that_no_table_knows_is_measured_and_says_so() -> None:
    planned = plan(unknown())
    assert planned.bytes_per_token == 3 * 2 * 32 * 4
    assert plan(unknown(), encoder_tokens=9).state_bytes == 9 * 3 * 2 * 32 * 4
    assert f"note: {NOTE}" in planned.explain()
    assert "measured from transformers" in planned.explain()
    assert "measured" not in plan({"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}).explain()


def test_a_text_half_that_no_table_knows_is_measured() -> None:
    config = KINDS["paddleocr_vl"]().to_dict()
    text = config["text_config"]
    planned = plan(config)
    heads, dim = text["num_key_value_heads"], text["head_dim"]
    assert planned.bytes_per_token == text["num_hidden_layers"] * 2 * heads * dim * 2
    assert "measured from transformers" in planned.explain()


def test_types_that_nobody_knows() -> None:
    with pytest.raises(UnknownModel, match=r"nor the installed transformers; give the numbers instead"):
        plan({"model_type": "no_such", "num_hidden_layers": 2})
    usual = {"model_type": "no_such", "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
    with pytest.raises(UnknownModel, match=r"\(by its config num_layers=2, num_kv_heads=8, head_dim=8, if it attends"):
        plan(usual)
    with pytest.raises(UnknownModel, match=r"num_layers=2, num_kv_heads=4, head_dim=16, if it attends"):
        plan(usual | {"num_key_value_heads": 4, "head_dim": 16})
    with pytest.raises(UnknownModel, match=r"num_layers, num_kv_heads, head_dim$"):
        plan(usual | {"attn_type_list": [0, 1]})
    with pytest.raises(UnknownModel, match="not an architecture that the planner knows, nor the installed"):
        plan({"model_type": "no_such"})


def test_a_measured_type_names_what_it_takes_from_its_defaults() -> None:
    config = unknown()
    for missing in ("decoder_layers", "d_model"):
        with pytest.raises(UnknownModel, match=f"of model_type='m2m_100' gives no {missing}; a number of layers"):
            plan({name: value for name, value in config.items() if name != missing})
    del config["decoder_attention_heads"]
    assert (
        "filled in as transformers does for model_type='m2m_100': decoder_attention_heads=16" in plan(config).explain()
    )
    assert "filled in" not in plan(unknown()).explain()


# What of each type's own default config is refused, and why. Everything else is planned.
NEEDS_MORE = "cannot be measured without memory"
NOT_BUILT = "transformers cannot build"
REFUSED = {
    "blip": NEEDS_MORE,
    "blt": NEEDS_MORE,
    "chameleon": NOT_BUILT,
    "deepseek_ocr2": NOT_BUILT,
    "diffusion_gemma": NOT_BUILT,
    "evolla": "makes no text",
    "gemma4_unified_assistant": "no layer before is 'sliding_attention'",
    "glm4_moe": "hidden_size=4096 does not divide by num_attention_heads=96",
    "glm4v_moe": "hidden_size=4096 does not divide by num_attention_heads=96",
    "glm5_next": NEEDS_MORE,
    "granite4_vision": NOT_BUILT,
    "hunyuan_vl": NOT_BUILT,
    "idefics": NEEDS_MORE,
    "kosmos-2": NEEDS_MORE,
    "led": NEEDS_MORE,
    "lfm2_moe": "has no layer_types",
    "mistral_large4": NEEDS_MORE,
    "musicgen": NOT_BUILT,
    "musicgen_melody": NOT_BUILT,
    "nllb-moe": NEEDS_MORE,
    "pi0": NEEDS_MORE,
    "pix2struct": NEEDS_MORE,
    "pp_formulanet": NEEDS_MORE,
    "qwen3_omni_moe_thinker": "hidden_size=2048 does not divide by num_attention_heads=28",
    "qwen4_exp": "has no indexer_head_dim",
    "qwen4_exp_text": "has no indexer_head_dim",
    "step3p7": "has no num_hidden_layers",
    "switch_transformers": NEEDS_MORE,
    "t5gemma": NEEDS_MORE,
    "udop": NEEDS_MORE,
    "unlimited_ocr": NEEDS_MORE,
    "vision-encoder-decoder": NEEDS_MORE,
    "voxtral_realtime": NEEDS_MORE,
}


CONFIGS = Path(__file__).resolve().parent / "data" / "configs"


@pytest.mark.skipif(EVERY > 1, reason="models of tens of billions take half a minute; HYPOTHESIS_PROFILE=long runs it")
@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b", "gemma-4-26b-a4b-nvfp4", "exaone-3.5-7.8b", "gpt_neox_japanese"])
def test_published_models_measured(name: str) -> None:
    """Types that the tables know, so that their plans do not say "measured"; measured, they come to the same bytes."""
    file = CONFIGS / f"{name}.json"
    config = json.loads(file.read_text()) if file.exists() else KINDS[name]().to_dict()
    measured = measure(config.get("text_config", config), None)
    for length in (1, 100, 1500, 40000):
        asked: dict[str, Any] = {"dtype": "bfloat16", "stored": "transformers"}
        assert plan(measured, **asked).cache_bytes(length) == plan(config, **asked).cache_bytes(length)
    assert "measured" not in plan(config).explain()


@cache
def registered() -> tuple[str, ...]:
    makers: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM]
    return tuple(sorted({kind.model_type for maker in makers for kind in maker._model_mapping}))


@pytest.mark.parametrize("name", registered()[::EVERY])
def test_every_type_that_makes_text_is_planned_or_refused_for_a_reason(name: str) -> None:
    warnings.simplefilter("ignore")
    if name == "gemma4_assistant":
        with pytest.raises(Exception, match="hidden_size_per_layer_"):
            KINDS[name]()  # transformers refuses its own default
        return
    config = KINDS[name]().to_dict()
    if name not in REFUSED:
        planned = plan(config, seq_len=4096)
        assert planned.sequence_bytes(4096) > 0
        return
    with pytest.raises(UnknownModel, match=re.escape(REFUSED[name])):
        plan(config)


def test_the_list_of_what_is_refused_is_about_types_that_are_there() -> None:
    assert set(REFUSED) <= set(registered())
    assert len(registered()) - len(REFUSED) >= 255
    assert transformers.__version__.startswith("5.")
