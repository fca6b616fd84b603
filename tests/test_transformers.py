"""Families of transformers models through the paged cache, and those that it must refuse."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvblocks.config import CacheConfig, Group, Window
from kvblocks.generation.scheduler import Request, Scheduler
from kvblocks.generation.verify import verify
from kvblocks.integrations.transformers import (
    CachedModel,
    KVShape,
    PagedModel,
    UnsupportedModel,
    cache_config,
    check_model,
    kv_shape,
    longest_sequence,
    served,
)
from kvblocks.integrations.transformers.layers import check_version

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

VOCABULARY = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BY_TURNS = ["sliding_attention", "full_attention"] * 2
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# Every window and chunk is shorter than the sequences.
FAMILIES: dict[str, tuple[str, dict[str, Any], KVShape]] = {
    "llama": ("llama", {}, KVShape(4, 2, 16, 16)),
    "gpt2, learned positions": ("gpt2", {"num_key_value_heads": None}, KVShape(4, 4, 16, 16)),
    "gpt_bigcode, one K/V head": ("gpt_bigcode", {"num_key_value_heads": None}, KVShape(4, 1, 16, 16)),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        KVShape(4, 2, 16, 16),
    ),
    "qwen3, head_dim of its own": ("qwen3", {"head_dim": 32}, KVShape(4, 2, 32, 32)),
    "mistral, windows": ("mistral", {"sliding_window": 9, "head_dim": None}, KVShape(4, 2, 16, 16)),
    "phi3, windows": ("phi3", {"sliding_window": 9}, KVShape(4, 2, 16, 16)),
    "gemma2, soft-capping and windows": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 9, "layer_types": BY_TURNS, "attn_logit_softcapping": 3.0},
        KVShape(4, 2, 16, 16),
    ),
    "gemma3, windows and two kinds of positions": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 9, "layer_types": BY_TURNS},
        KVShape(4, 2, 16, 16),
    ),
    "gpt-oss, sinks and windows": (
        "gpt_oss",
        {"head_dim": 16, "sliding_window": 9, "layer_types": BY_TURNS, "num_local_experts": 4},
        KVShape(4, 2, 16, 16),
    ),
    "llama4, chunks": (
        "llama4_text",
        {
            "head_dim": 16,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
        },
        KVShape(4, 2, 16, 16),
    ),
    "deepseek_v3, V narrower than K": ("deepseek_v3", LATENT, KVShape(4, 4, 24, 20)),
    "biogpt, a mask of ones": ("biogpt", {"num_key_value_heads": None}, KVShape(4, 4, 16, 16)),
}


def build(name: str, **fields: Any) -> PreTrainedModel:
    kinds: Any = transformers.AutoConfig
    config = kinds.for_model(name, **{key: value for key, value in {**TINY, **fields}.items() if value is not None})
    torch.manual_seed(0)
    models: Any = AutoModelForCausalLM
    model: PreTrainedModel = models.from_config(config)
    model.train(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Sharp attention and logits far apart, so that a wrong window or cap changes tokens.
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * 64**-0.5)
            else:
                weight.normal_(0 if name.endswith("bias") else 1, 0.3)
    return model


def generate(model: PreTrainedModel, requests: list[Request], num_blocks: int = 12) -> tuple[list[list[int]], int]:
    """The new tokens, and how often a sequence was preempted."""
    shape = kv_shape(model.config)
    config = CacheConfig(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_gpu_blocks=num_blocks,
        block_size=5,
        v_head_dim=shape.v_head_dim,
    )
    tokens: list[list[int]] = [[] for _ in requests]
    with Scheduler(model, config, max_batch_tokens=24, max_seqs=4) as scheduler:
        for request in requests:
            scheduler.add(request)
        for new in scheduler.stream():
            tokens[new.request_id].append(new.token)
        return tokens, scheduler.manager.stats().preemptions


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    name, fields, shape = FAMILIES[family]
    model = build(name, **fields)
    assert kv_shape(model.config) == shape
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()), 12)
        for length in (3, 30, 17, 40, 1)
    ]
    tokens, preemptions = generate(model, requests)
    verdicts = [verify(model, request, new) for request, new in zip(requests, tokens, strict=True)]
    assert all(verdict.identical for verdict in verdicts), [str(verdict) for verdict in verdicts]
    assert preemptions > 0
    assert len({token for new in tokens for token in new}) > 5


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": ("rwkv", {"attention_hidden_size": 64}, "keeps a recurrent state"),
    "fewer layers than it says": (
        "bart",
        {"d_model": 64, "decoder_layers": 2},
        "says what 2 layers cache, and transformers' own cache has 4 layers with K and V",
    ),
    "runs layers twice": (
        "dory",
        {"head_dim": 16, "n_input_layers": 1, "n_output_layers": 1, "recurrent_kv_cache_mode": "last_loop"},
        "runs some layers several times in a pass, and reads K and V of the last time past",
    ),
    "bidirectional": ("bert", {"num_key_value_heads": 4}, "BertLMHeadModel attends to later tokens too"),
    "window in the cache only": ("moshi", {"sliding_window": 9}, "attends past its window within a pass"),
    "K and V repeated": (
        "jetmoe",
        {"head_dim": None, "kv_channels": 16},
        r"makes 4 heads of K \[16\].*the cache holds 2 heads",
    ),
}

GATHERED: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions of its own": ("roberta", {"is_decoder": True}, "numbers its positions in its own way"),
    "no registry": ("falcon", {"num_key_value_heads": None}, "does not use transformers' attention regis"),
    "no positions": ("bart", {"d_model": 64, "decoder_layers": 4}, "takes no position_ids; rows of unequal length"),
    "mask of its own": ("doge", {}, r"layer 0 \(DogeAttention\) makes a mask of its own"),
    "attends twice": ("diffllama", {}, r"attended through kvblocks are \[0, 0, 1, 1, 2, 2, 3, 3\]; each of .* once"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_rather_than_wrong(kind: str) -> None:
    name, fields, message = REFUSED[kind]
    model = build(name, **fields)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=message):
        generate(model, [Request((3, 4, 5), 2)])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", GATHERED)
def test_layers_that_cannot_read_blocks_get_them_gathered(kind: str) -> None:
    name, fields, message = GATHERED[kind]
    model = build(name, **fields)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=message):
        PagedModel(model).measure()
    assert isinstance(served(model), CachedModel)
    assert model.config._attn_implementation == before


def test_transformers_that_are_too_old_are_named() -> None:
    message = r"kvblocks needs transformers 5\.24 or newer, and 5\.9\.1 is installed; run: pip install \"kvblocks\[gen"
    with pytest.raises(ImportError, match=message):
        check_version("5.9.1")
    for version in ("5.24.0", "5.25.0.dev0", "6.0"):
        check_version(version)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        check_model(transformers.T5ForConditionalGeneration(config))


def test_dropout_is_refused() -> None:
    model = build("llama", attention_dropout=0.1)
    model.train(True)
    with pytest.raises(UnsupportedModel, match=r"asks for dropout=0\.1; call model\.eval"):
        generate(model, [Request((3, 4, 5), 2)])


def test_a_layer_and_its_mask_must_agree() -> None:
    model = build("qwen3", sliding_window=9, use_sliding_window=True, layer_types=BY_TURNS)
    layer: Any = model.get_submodule("model.layers.2.self_attn")
    layer.sliding_window = 5
    with pytest.raises(UnsupportedModel, match="has window=5 and chunk=None, but its mask would show 9"):
        PagedModel(model).measure()


def test_a_batch_with_padding_is_an_error_not_a_wrong_answer() -> None:
    model = build("llama")
    tokens = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    before = model.config._attn_implementation
    model.set_attn_implementation("kvblocks")
    with pytest.raises(ValueError, match="takes no padding mask: its batches are ragged"):
        model(input_ids=tokens, attention_mask=(tokens > 0).long())
    with pytest.raises(UnsupportedModel, match="called without a step"):
        model(input_ids=tokens[1:], attention_mask=torch.ones(1, 4))
    model.set_attn_implementation(before)
    assert bool(torch.isfinite(model(input_ids=tokens[1:]).logits).all())


def test_what_layers_make_is_measured() -> None:
    """Where the config says another shape than attention gets: latents are expanded, K and V repeated."""
    jetmoe = build("jetmoe", head_dim=None, kv_channels=16)
    assert kv_shape(jetmoe.config) == KVShape(4, 2, 16, 16)
    assert PagedModel(jetmoe).measure() == KVShape(4, 4, 16, 16)
    assert PagedModel(build("deepseek_v3", **LATENT)).measure() == KVShape(4, 4, 24, 20)
    assert jetmoe.config._attn_implementation != "kvblocks"


def test_kv_shape_needs_numbers() -> None:
    kind: Any = PreTrainedConfig
    config = kind(num_hidden_layers=2, num_attention_heads=[4, 2], hidden_size=64)
    with pytest.raises(UnsupportedModel, match=r"PreTrainedConfig .*num_attention_heads=\[4, 2\] is of type list"):
        kv_shape(config)
    with pytest.raises(UnsupportedModel, match=r"has no attribute 'num_hidden_layers'"):
        kv_shape(PreTrainedConfig())


def test_kv_shape_of_a_type_that_nobody_knows() -> None:
    """Of what came with its weights the fields mean what they usually do."""
    kind: Any = PreTrainedConfig
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    assert kv_shape(kind(**sizes)) == KVShape(2, 4, 16, 16)
    assert kv_shape(kind(**sizes, num_key_value_heads=1, head_dim=24)) == KVShape(2, 1, 24, 24)
    assert kv_shape(kind(**sizes, **LATENT)) == KVShape(2, 4, 24, 20)


def test_cache_config_takes_what_fits() -> None:
    config = transformers.LlamaConfig(**TINY)
    sized = cache_config(config, 1 << 20, torch.float16, block_size=8)
    assert (sized.num_layers, sized.num_kv_heads, sized.head_dim, sized.block_size) == (4, 2, 16, 8)
    assert sized.num_gpu_blocks == (1 << 20) // (8 * 4 * 2 * (16 + 16) * 2)


def test_longest_sequence() -> None:
    assert longest_sequence(transformers.LlamaConfig(max_position_embeddings=77)) == 77
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi3 = transformers.Phi3Config(
        **{**TINY, "max_position_embeddings": 256},
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )
    assert longest_sequence(phi3) == 64
    by_layer = transformers.Gemma3TextConfig(max_position_embeddings=512)
    assert longest_sequence(by_layer) == 512
    assert longest_sequence(PreTrainedConfig()) is None


def test_a_layer_must_not_reach_past_what_its_group_keeps() -> None:
    """A cache for another model's windows would give back blocks that this one still reads."""
    model = build("gemma2", head_dim=16, sliding_window=9, layer_types=BY_TURNS)
    groups = (Group(Window(8), (0, 2)), Group(None, (1, 3)))
    config = CacheConfig(num_layers=4, num_kv_heads=2, head_dim=16, num_gpu_blocks=24, block_size=4, groups=groups)
    with Scheduler(model, config) as scheduler:
        scheduler.add(Request((3, 4, 5), 2))
        with pytest.raises(
            UnsupportedModel, match=r"attends to Window\(size=9\), and its group keeps Window\(size=8\)"
        ):
            scheduler.step()
