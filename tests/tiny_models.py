"""A tiny model of every decoder architecture that the installed transformers maps to causal language modelling.

What is here: how small each is made, and which are left out and why. Every kind of layer that a family has is in its
model, windows and chunks are shorter than 64 tokens, and nothing is built before it is asked for.
"""

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["LEFT_OUT", "VOCABULARY", "WINDOW", "architectures", "build", "known", "sharp", "tiny_config"]

VOCABULARY = 97
WINDOW = 9  # of every sliding window
CHUNK = 8

# Taken by every config that has the field and gives it a value.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": CHUNK,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    # experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    # indexers
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 8,  # with few all keys may score 0 for a query, and which are taken then is chance
    # linear attention and Mamba
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
}

SLIDING, FULL, CHUNKED, LINEAR = "sliding_attention", "full_attention", "chunked_attention", "linear_attention"
BY_TURNS = [SLIDING, FULL, SLIDING, FULL]
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
DECODER = {"is_decoder": True}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
LLAMA = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
LLAMA += ["num_key_value_heads", "max_position_embeddings"]
GEMMA3: dict[str, Any] = {
    **{name: SMALL[name] for name in LLAMA},
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": BY_TURNS,
}
GEMMA4 = {**GEMMA3, "global_head_dim": 24, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
GEMMA4_SHARED: dict[str, Any] = {
    **GEMMA4,
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "num_kv_shared_layers": 2,
}
GEMMA4_UNIFIED = {name: value for name, value in GEMMA4_SHARED.items() if "per_layer_input" not in name}
QWEN35: dict[str, Any] = {
    **{name: value for name, value in SMALL.items() if name.startswith("linear_")},
    **{name: SMALL[name] for name in LLAMA},
    "head_dim": 16,
    "layer_types": [LINEAR, FULL] * 2,
}
EXPERTS = {name: SMALL[name] for name in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")}
QWEN35_MOE = {**QWEN35, **EXPERTS, "shared_expert_intermediate_size": 32}
QWEN35_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
QWEN4: dict[str, Any] = {
    **QWEN35_MOE,
    **INDEXER,
    "layer_types": [LINEAR, "indexed_attention"] * 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "eos_token_id": 2,
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
}
SPARSE_LATENT = {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"] * 2}
LLAMA4: dict[str, Any] = {
    **{name: SMALL[name] for name in LLAMA},
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "attention_chunk_size": CHUNK,
    "layer_types": [CHUNKED, FULL] * 2,
}
INKLING: dict[str, Any] = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "mlp_layer_types": ["dense", "sparse"] * 2,
    "sliding_window_size": WINDOW,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 24,
    "d_rel": 8,
    "rel_extent": 32,
}
INKLING_LOOP = {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3}
DOTS3: dict[str, Any] = {
    **{name: SMALL[name] for name in SMALL if name.endswith(("_rank", "_head_dim")) and "linear" not in name},
    **{name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")},
    **{name: SMALL[name] for name in ("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group")},
    **{name: SMALL[name] for name in ("topk_group", "index_topk", "index_n_heads", "sliding_window")},
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["indexed_attention", SLIDING] * 2,
    "mlp_layer_types": ["dense", "sparse"] * 2,
    "shared_experts_intermediate_size": 32,
    "pad_token_id": 0,
    "head_dim": 24,
    "per_layer_config": {
        layer: {
            "head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 24,
        }
        for layer in (1, 3)
    },
}

# What families need besides, or instead.
ALIKE: list[tuple[str, dict[str, Any]]] = [
    ("afmoe cohere2 exaone4 gemma2 gemma3_text gpt_oss granite_swa granitemoe_swa", {"layer_types": BY_TURNS}),
    ("beam cohere2_moe flint kolibri1 mimo_v2_flash olmo3 vaultgemma", {"layer_types": BY_TURNS}),
    ("bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert", DECODER),
    ("rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl", DECODER),
    ("axk1 deepseek_v3 glm4_moe_lite minicpm3 sarvam_mla youtu", {"num_key_value_heads": 4}),
    ("axk2 deepseek_v32 glm_moe_dsa", SPARSE_LATENT),
    ("mistral ministral3 moshi hunyuan_v1_dense hunyuan_v1_moe nemotron", {"head_dim": 16}),
    ("doge mixtral phi3 phimoe starcoder2 minimax", {"sliding_window": WINDOW}),
    ("qwen2 qwen2_moe qwen3 qwen3_moe", WINDOWED),
    ("qwen3_5_moe_text qwen3_5_text qwen3_next granitemoehybrid", {"layer_types": [LINEAR, FULL] * 2}),
    ("lfm2 lfm2_moe", {"layer_types": ["conv", FULL] * 2}),
    ("codegen gptj", {"rotary_dim": 8}),
    ("inkling_text inkling2_text", INKLING),
    ("inkling2_loop_text", INKLING | INKLING_LOOP),
    ("dots3_note_text", DOTS3),
    ("gemma4_text", GEMMA4_SHARED),
    ("gemma4_unified_text", GEMMA4_UNIFIED),
    ("llama4_text", LLAMA4),
    ("qwen4_exp_text", QWEN4),
]
OWN: dict[str, dict[str, Any]] = {name: fields for names, fields in ALIKE for name in names.split()} | {
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_types": [LINEAR, FULL] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": BY_TURNS, "rope_parameters": {SLIDING: ROPE, FULL: ROPE}},
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "ctrl": {"dff": 96},
    "cwm": {"layer_types": BY_TURNS, "rope_parameters": ROPE},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": [SLIDING, "heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "num_hidden_layers": 6,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_lora_rank": 16,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
    },
    "dory": {"layer_types": BY_TURNS, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {
        "layer_types": BY_TURNS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {**VISION, "moe_intermediate_size": 16, "mlp_layer_types": ["dense"], "adapter_in_dim": 16}
        | {"adapter_out_dim": 64},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"adapter_input_size": 16, "adapter_out_dim": 64, "feature_size": 8, "downsample_hidden_size": 8},
    },
    "emu3": {
        "text_config": {name: SMALL[name] for name in LLAMA} | {"pad_token_id": 0},
        "vocabulary_map": {f"<|visual token {i:06d}|>": 40 + i for i in range(8)}
        | {"<image>": 50, "<|extra_200|>": 51},
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
        | {"hidden_size": 32, "attn_resolutions": []},
    },
    "exaone_moe": {"layer_types": BY_TURNS, "mlp_layer_types": ["dense", "sparse"] * 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fuyu": {"text_config": {"model_type": "persimmon", **{name: SMALL[name] for name in LLAMA if "key" not in name}}},
    "gemma3": {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, FULL] * 3,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4": {"text_config": GEMMA4_SHARED, "vision_config": None, "audio_config": None},
    "gemma4_unified": {"text_config": GEMMA4_UNIFIED},
    "git": {"vision_config": VISION},
    "got_ocr2": {
        "text_config": {"model_type": "qwen2", **{name: SMALL[name] for name in LLAMA}},
        "vision_config": {**VISION, "output_channels": 8, "mlp_dim": 16, "window_size": 2, "global_attn_indexes": [0]},
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": WINDOW},
    "hy_v4": {"num_key_value_heads": 4, "indexer_types": ["full", "shared"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": [LINEAR, FULL] * 2, "num_experts_per_token": 2},
    "laguna": {"layer_types": BY_TURNS, "num_attention_heads_per_layer": [4] * 4},
    "lfm3": {"layer_types": ["conv", FULL, SLIDING] * 2, "num_hidden_layers": 6},
    "llama4": {"text_config": LLAMA4, "vision_config": {**VISION, "vision_output_dim": 16, "projector_output_dim": 16}},
    "longcat_flash": {
        "num_layers": 2,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {"layer_types": BY_TURNS, "mlp_layer_types": ["dense", "sparse"] * 2},
    "ministral": {"layer_types": BY_TURNS, "head_dim": 16},
    "mllama": {
        "text_config": {name: SMALL[name] for name in LLAMA} | {"pad_token_id": 0, "cross_attention_layers": [1]},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1}
        | {"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32}
        | {"intermediate_layers_indices": [0]},
    },
    "modernbert-decoder": {"layer_types": BY_TURNS, "local_attention": 2 * WINDOW},
    "moss_transcribe_diarize": {
        "text_config": {"model_type": "qwen3", **{name: SMALL[name] for name in LLAMA}, "head_dim": 16},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_mel_bins": 8, "max_source_positions": 32},
    },
    "mpt": {"n_heads": 4, "n_layers": 4, "max_seq_len": 256},
    "nemotron_h": {
        "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, FULL],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {"layer_types": [LINEAR, FULL] * 2, "linear_num_key_heads": 4},
    "phi4_multimodal": {
        "sliding_window": WINDOW,
        "vision_config": {**VISION, "crop_size": 16},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 2, "num_attention_heads": 2}
        | {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16, "input_size": 16},
    },
    "prophetnet": {"num_encoder_layers": 3, "num_decoder_layers": 3}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "qwen3_5": {"text_config": QWEN35, "vision_config": QWEN35_VISION},
    "qwen3_5_moe": {"text_config": QWEN35_MOE, "vision_config": QWEN35_VISION},
    "qwen4_exp": {"text_config": QWEN4, "vision_config": QWEN35_VISION},
    "recurrent_gemma": {"attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 16,
        "axial_pos_embds": False,
        "feed_forward_size": 96,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "num_hidden_layers": None,
    },
    "roc_bert": {**DECODER, "pronunciation_vocab_size": 30, "shape_vocab_size": 30}
    | {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "rwkv": {"attention_hidden_size": 64},
    "smollm3": {**WINDOWED, "layer_types": BY_TURNS},
    "xlm": {"emb_dim": 64, "n_layers": 4, "n_heads": 4, "causal": True},
    "xlnet": {"d_inner": 96, "d_head": 16},
    "xlstm": {"hidden_size": 128, "num_heads": 4},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, LINEAR, "hybrid"],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": [LINEAR, "hybrid"] * 3,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window": WINDOW}
    | {"router_hidden_size": 16},
}

# Architectures without a tiny model here, and why.
LEFT_OUT: dict[str, str] = {
    "blt": "transformers cannot make its cache: DynamicCache asks BltConfig for num_hidden_layers, which it lacks",
    "gemma3n": "its vision tower is a model of timm, a package of its own; its text half is here as gemma3n_text",
    "gemma4_assistant": "a drafter without a cache of its own: it reads the K and V of the model that it drafts for",
    "gemma4_unified_assistant": "a drafter without a cache of its own, like gemma4_assistant",
    "musicgen": "the model takes the decoder's config, which the auto-mapping does not name",
    "musicgen_melody": "the model takes the decoder's config, which the auto-mapping does not name",
}


def known() -> list[str]:
    """Every model type that transformers maps to causal language modelling, built here or left out."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def architectures() -> list[str]:
    """The model types that `build` makes."""
    return [name for name in known() if name not in LEFT_OUT]


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of the tiny model of a model type: the fields of `SMALL` that it has, and those of `OWN`."""
    kind: Any = CONFIG_MAPPING[name]
    declared = {field.name: field.default for field in dataclasses.fields(kind)}
    taken = {field: value for field, value in SMALL.items() if declared.get(field) is not None}
    if "num_key_value_heads" in declared:
        taken["num_key_value_heads"] = SMALL["num_key_value_heads"]  # None stands for as many as there are queries
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **taken, **OWN.get(name, {})}
    if "layers_block_type" in fields or "attn_layers" in fields:
        fields["num_hidden_layers"] = len(fields.get("layers_block_type") or fields["attn_layers"])
    config: PreTrainedConfig = kind(**copy.deepcopy({key: value for key, value in fields.items() if value is not None}))
    return config


def build(name: str, seed: int = 0) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The config and the model of a model type, in float32 on CPU, not training; the weights follow from `seed`."""
    config = tiny_config(name)
    models: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = models.from_config(config)
    model.train(False)
    return config, model


def sharp(name: str) -> PreTrainedModel:
    """Such a model with sharp attention and logits far apart, so that a wrong key changes tokens."""
    _, model = build(name)
    sharpen(model)
    return model


def sharpen(model: PreTrainedModel) -> None:
    """Give a model the weights of `sharp`."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5)
