"""Planned bytes against the bytes of the caches that transformers' models really fill, to the byte."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from kvblocks import Plan, plan
from kvblocks.models.measure import tensors_held

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
# Below, at and beyond windows of 9 and chunks of 8.
LENGTHS = (1, 2, 7, 8, 9, 10, 40)
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")

# Models whose caches are not compared, besides those that are not built at all, and why.
NOT_COMPARED = {
    "openai-gpt": "transformers runs it without a cache",
    "xlm": "transformers runs it without a cache",
}


def filled(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_held(cache, set()))


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, tiny_models.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def run(model: PreTrainedModel, tokens: torch.Tensor) -> Any:
    """The caches of a forward pass."""
    with torch.no_grad():
        if model.config.model_type != "recurrent_gemma":
            output = model(input_ids=tokens, use_cache=True)
            return [output[name] for name in CACHES if output.get(name) is not None]
        # It hands no cache back, and keeps its state in its modules.
        inner: Any = model
        inner.model._setup_cache(model.config, 1, torch.device("cpu"), model.dtype)
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        states = [
            getattr(module, name)
            for module in model.modules()
            for name in ("conv1d_state", "recurrent_states")
            if getattr(module, name, None) is not None
        ]
        return [cache, states]


def in_bfloat16(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model as it is loaded in bfloat16, which leaves some weights in float32 where a model asks for it."""
    kind: Any = type(model)
    if not kind._keep_in_fp32_modules and not kind._keep_in_fp32_modules_strict:
        model.bfloat16()
        return model
    model.save_pretrained(folder)
    loaded: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.bfloat16)
    loaded.train(False)
    return loaded


@pytest.mark.parametrize("name", [name for name in tiny_models.architectures() if name not in NOT_COMPARED])
def test_planned_bytes_are_those_of_the_models_own_cache(name: str, tmp_path: Path) -> None:
    _, model = tiny_models.build(name)
    planned = plan(model.config, dtype="float32", stored="transformers")
    assert planned.cache_bytes(0) == 0
    for length in LENGTHS:
        caches = run(model, prompt(length))
        assert caches, "no cache came back"
        assert (length, planned.cache_bytes(length)) == (length, filled(caches))
    model = in_bfloat16(model, tmp_path)
    planned = plan(model.config, dtype=torch.bfloat16, stored="transformers")
    for length in (8, 23):
        assert (length, planned.cache_bytes(length)) == (length, filled(run(model, prompt(length))))


DECODING = [
    name
    for name in tiny_models.architectures()
    if name not in NOT_COMPARED and name not in ("recurrent_gemma", "reformer", "rwkv", "xlnet", "xlstm", "cpmant")
]


@pytest.mark.parametrize("name", DECODING[::3])
def test_decoding_fills_the_same_bytes(name: str) -> None:
    _, model = tiny_models.build(name)
    planned = plan(model.config, dtype="float32", stored="transformers")
    tokens, cache, key = prompt(14), None, ""
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
            output = model(input_ids=tokens[:, start:end], use_cache=True, **({} if cache is None else {key: cache}))
            key, cache = next((name, output[name]) for name in CACHES if output.get(name) is not None)
            assert (end, planned.cache_bytes(end)) == (end, filled(cache))


def test_a_window_of_one_token_is_never_cut_by_transformers() -> None:
    shape: Any = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, sliding_window=1)
    model = transformers.MistralForCausalLM(config)
    assert plan(config, dtype="float32", stored="transformers").cache_bytes(12) == filled(run(model, prompt(12)))
    assert plan(config, dtype="float32").cache_bytes(12) == plan(config, dtype="float32").cache_bytes(1)


TEXT_HALVES: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {},
    "qwen3_vl_moe_text": {},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "molmo2_text": {},
    "granite_docling_text": {},
    "mistral4": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", TEXT_HALVES)
def test_text_halves_of_models_that_see(name: str) -> None:
    kind: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    declared = {field.name: field.default for field in dataclasses.fields(kind)}
    fields = {field: value for field, value in tiny_models.SMALL.items() if declared.get(field) is not None}
    config = kind(**{**fields, "pad_token_id": 0, **TEXT_HALVES[name]})
    makers: Any = transformers.AutoModel
    model = makers.from_config(config)
    model.train(False)
    planned = plan(config, dtype="float32", stored="transformers")
    for length in (1, 12):
        assert planned.cache_bytes(length) == filled(run(model, prompt(length)))
    outer = plan({"model_type": "some_model_that_sees", "text_config": config.to_dict(), "dtype": "float32"})
    assert outer.model.layers == plan(config, dtype="float32").model.layers


def encoder_decoders() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    small = {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
    small |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_hidden_layers": 3}
    source = {"input_ids": prompt(13)}
    small_bart: Any = {name: value for name, value in small.items() if name != "num_hidden_layers"} | {
        "encoder_layers": 3
    }
    yield "bart", transformers.BartForConditionalGeneration(transformers.BartConfig(**small_bart)), source, 13
    t5: Any = {"vocab_size": 97, "d_model": 32, "d_kv": 12, "num_layers": 2, "num_heads": 3, "d_ff": 32}
    yield "t5", transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, num_decoder_layers=2)), source, 13
    whisper: Any = small_bart | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 60}
    audio = {"input_features": torch.randn(1, 8, 40)}
    yield "whisper", transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**whisper)), audio, 20


@pytest.mark.parametrize(
    ("name", "model", "source", "encoder_tokens"), [*encoder_decoders()], ids=["bart", "t5", "whisper"]
)
def test_cross_attention(name: str, model: Any, source: dict[str, Any], encoder_tokens: int) -> None:
    model.train(False)
    planned = plan(model.config, dtype="float32", stored="transformers", encoder_tokens=encoder_tokens)
    for length in (1, 9):
        with torch.no_grad():
            output = model(**source, decoder_input_ids=prompt(length), use_cache=True)
        real = sum(t.numel() * t.element_size() for t in tensors_held(output.past_key_values, set()))
        assert planned.cache_bytes(length) == real
    alone = plan(model.config, dtype="float32", encoder_tokens=0)
    assert planned.state_bytes == planned.cache_bytes(1) - alone.cache_bytes(1) > 0
    assert "without what cross-attention keeps" in alone.explain()


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "gpt2", "gemma3", "dots3_note", "bart"]
)
def test_weights_are_counted_without_memory(name: str) -> None:
    _, model = tiny_models.build(name)
    counted = plan(model.config, dtype="float32", weights="auto", weights_dtype="float32").weights_bytes
    weights = {id(weight): weight for weight in model.parameters()}
    held = sum(weight.numel() * weight.element_size() for weight in weights.values())
    kept = [buffer for buffer_name, buffer in model.named_buffers() if buffer_name in model.state_dict()]
    assert counted == held + sum(buffer.numel() * buffer.element_size() for buffer in kept)


def table() -> str:
    """Which architectures are compared, and which are not and why."""
    left_out = {**tiny_models.LEFT_OUT, **NOT_COMPARED}
    compared = [name for name in tiny_models.known() if name not in left_out]
    rows = [f"| {name} | {reason} |" for name, reason in sorted(left_out.items())]
    head = (
        f"{len(compared)} architectures of transformers {transformers.__version__} are compared to the byte; left out:"
    )
    return "\n".join([head, "", "| architecture | why it is left out |", "| --- | --- |", *rows, ""])


def test_left_out_architectures_are_listed_with_their_reasons() -> None:
    folder = Path(os.environ.get("KVBLOCKS_REPORTS") or ROOT / "build")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planned_architectures.md").write_text(table())
    left_out = {**tiny_models.LEFT_OUT, **NOT_COMPARED}
    assert set(left_out) <= set(tiny_models.known())
    assert len(tiny_models.known()) - len(left_out) >= 115
    for name in NOT_COMPARED:
        config, model = tiny_models.build(name)
        assert not run(model, prompt(5))
        with pytest.raises(ValueError, match="without a cache"):
            plan(config, dtype="float32", stored="transformers")
        assert isinstance(plan(config, dtype="float32"), Plan)
