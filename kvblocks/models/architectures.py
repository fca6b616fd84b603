"""Which model type keeps its cache how, and which fields of its config decide that.

The readers are `kvblocks.models.families`'s. A model type or a deciding field that is not here is an error.
"""

from kvblocks.errors import UnknownModel
from kvblocks.models import families as read
from kvblocks.models.families import Reader
from kvblocks.models.fields import DECIDING, Fields, defaults_note, model_dtype
from kvblocks.models.shapes import ModelCache, State

__all__ = ["MODEL_TYPES", "TRANSLATED", "read_fields"]

_READERS: dict[str, Reader] = {}
_FULL = ("full_attention", "attention")
_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
_KNOWN: dict[str, frozenset[str]] = {}


def _register(names: str, reader: Reader, known: str = "") -> None:
    """`reader` reads these model types; it knows what the `known` fields mean besides those that every reader knows."""
    for name in names.split():
        _READERS[name] = reader
        _KNOWN[name] = frozenset(known.split())


def read_fields(fields: Fields, name: str | None = None) -> ModelCache:
    """What the model of a config keeps.

    Raises:
        UnknownModel: an architecture that is not known, or a field that is missing, wrong or not known.
    """
    reader = _READERS.get(fields.model_type)
    if reader is None:
        raise UnknownModel(
            f"model_type={fields.model_type!r} is not an architecture that the planner knows; "
            f"give the numbers instead: num_layers, num_kv_heads, head_dim"
        )
    _refuse_unknown(fields)
    layers = reader(fields)
    if not layers:
        raise UnknownModel(f"the config of model_type={fields.model_type!r} names no layers")
    heads, longest = fields.first(_QUERY_HEADS), fields.first(_LENGTHS)
    return ModelCache(
        name or fields.model_type,
        tuple(layers),
        num_query_heads=heads,
        max_seq_len=longest,
        dtype=model_dtype(fields.values),
        notes=tuple(defaults_note(fields.model_type, fields.taken)),
        uncached=_UNCACHED.get(fields.model_type),
        model_type=fields.model_type,
    )


def _refuse_unknown(fields: Fields) -> None:
    known = _KNOWN[fields.model_type]
    for name, value in fields.values.items():
        if DECIDING.match(name) and name not in known and value not in (None, False, [], {}):
            if name == "layer_types" and isinstance(value, list | tuple) and all(kind in _FULL for kind in value):
                continue
            if name == "sliding_window_size" and value == fields.values.get("sliding_window"):
                continue  # says the same twice, as Gemma 2's configs do
            raise UnknownModel(
                f"{fields.model_type}.{name}={value!r:.60}: the planner does not know what this field means for this "
                f"model_type; remove it if it means nothing, or give the numbers instead"
            )


# --- the table

_register(
    "bert bert-generation big_bird biogpt camembert data2vec-text electra ernie git gpt_neox gpt_neox_japanese "
    "megatron-bert musicgen_decoder musicgen_melody_decoder opt persimmon rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    read.plain("num_hidden_layers", "num_attention_heads", "hidden_size"),
)
_register("gpt2 codegen gptj ctrl openai-gpt", read.plain("n_layer", "n_head", "n_embd"))
_register("bloom", read.plain("n_layer", "n_head", "hidden_size"))
_register("mpt", read.mpt)
_register("xlm", read.plain("n_layers", "n_heads", "emb_dim"))
_register("xglm", read.plain("num_layers", "attention_heads", "d_model"))
_register(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper",
    read.decoder_half("decoder_layers", "decoder_attention_heads", "d_model"),
)
_register("t5 mt5 umt5", read.t5)
_register("prophetnet", read.decoder_half("num_decoder_layers", "num_decoder_attention_heads", "hidden_size"))

_register(
    "apertus arcee aria_text bitnet cohere diffllama emu3_text_model ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 "
    "glm4_moe granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 "
    "iquestcoder jais2 llama minimax_m2 nanochat nemotron olmo olmo2 olmoe phi seed_oss solar_open stablelm",
    read.grouped,
)
# The text halves of models that see or hear.
_register(
    "glm4v_moe_text glm4v_text granite_docling_text molmo2_text qwen3_omni_moe_text qwen3_vl_moe_text qwen3_vl_text",
    read.grouped,
)
_register(
    "doge ministral3 mistral mixtral moshi phi3 phi4_multimodal phimoe qwen3_moe starcoder2",
    read.grouped,
    "sliding_window",
)
_register(
    "afmoe beam cohere2 cohere2_moe cohere_compass_text cwm dots1 exaone4 exaone_moe flint gemma2 gemma3_text gpt_oss "
    "granite_swa granitemoe_swa kolibri1 laguna mellum ministral olmo3 qwen2 qwen2_5_omni_text qwen2_5_vl_text "
    "qwen2_moe qwen2_vl_text qwen3 smollm3 vaultgemma",
    read.mixed,
    "layer_types sliding_window per_layer_config",
)
_register("modernbert-decoder", read.mixed, "layer_types sliding_window local_attention")
_register(
    "mimo_v2_flash",
    read.mixed,
    "layer_types sliding_window sliding_window_size attention_chunk_size swa_num_attention_heads "
    "swa_num_key_value_heads swa_head_dim swa_v_head_dim swa_rope_theta",
)
_register("gemma3n_text", read.mixed, "layer_types sliding_window num_kv_shared_layers")
_register(
    "gemma4_text gemma4_unified_text", read.gemma4, "layer_types sliding_window num_kv_shared_layers per_layer_config"
)
_register("llama4_text", read.mixed, "layer_types attention_chunk_size")
_register("minimax_m3_vl_text", read.mixed, "layer_types index_head_dim")
_register("gpt_neo", read.gpt_neo, "window_size")
_register("gpt_bigcode", read.gpt_bigcode)
_register("falcon", read.falcon, "num_kv_heads")
_register("dbrx", read.dbrx)
_register("jetmoe", read.jetmoe, "kv_channels")
_register("cpmant", read.cpmant)
_register("hrm_text", read.hrm)
_register("mllama_text_model", read.mllama, "cross_attention_layers")

_register("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 mistral4 sarvam_mla youtu", read.latent, "kv_lora_rank")
# Types whose code comes with the weights, so that transformers has no class for them: attention like any other's, under
# other names here and there.
_register("kimi_k2", read.latent, "kv_lora_rank")
_register(
    "Yi aquila arctic baichuan bailing_moe bailing_moe_v2 deepseek grok-1 internlm internlm2 minicpm minicpmv molmo "
    "orion phi3small skywork stablelm_epoch xverse",
    read.grouped,
)
_register("phi4mm", read.grouped, "sliding_window")
_register("mimo step3p5 step3p7", read.mixed, "layer_types sliding_window")
_register("qwen", read.plain("num_hidden_layers", "num_attention_heads", "hidden_size", "kv_channels"), "kv_channels")
_register("exaone", read.renamed(read.grouped, num_hidden_layers="num_layers"))
_register("chatglm", read.chatglm, "kv_channels")
_register("nemotron-nas", read.nas)
# What Meta's and Mistral's own files call these things.
_register(
    "falcon_perception params",
    read.renamed(
        read.grouped,
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        num_key_value_heads="n_kv_heads",
        hidden_size="dim",
    ),
    "sliding_window",
)
_register("longcat_flash", read.longcat, "kv_lora_rank")
_register(
    "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4",
    read.indexed,
    "kv_lora_rank layer_types index_head_dim indexer_types sliding_window per_layer_config",
)

_LINEAR = "layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
_LINEAR += "linear_num_value_heads linear_head_dim linear_num_heads short_conv_kernel_size kv_lora_rank "
_LINEAR += "linear_attn_config "
_LINEAR += "mamba_ssm_dtype "
_LINEAR += "linear_a_log_min linear_a_log_max linear_dt_min linear_dt_max linear_dt_init_floor linear_allow_neg_eigval"
_MAMBA = "layer_types layers_block_type mamba_n_heads mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv "
_MAMBA += "mamba_expand mamba_chunk_size mamba_conv_bias mamba_proj_bias mamba_dt_rank mamba_d_ssm mamba_rms_norm "
_MAMBA += "mamba_norm_before_gate mamba_ngroups mamba_headdim mamba_num_heads mamba_head_dim mamba_hidden_act "
_MAMBA += "mamba_ssm_cache_dtype ssm_state_size conv_kernel state_size n_mamba_heads kv_channels ssm_multipliers "
_MAMBA += "mamba_use_mlp ssm_in_multiplier ssm_out_multiplier conv_bias"

_register(
    "qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid",
    read.by_kind(read.named("layer_types"), read.delta_states, read.grouped_kept),
    _LINEAR,
)
_register(
    "kimi_linear bailing_hybrid",
    read.by_kind(
        read.named("layer_types"),
        read.kimi_states,
        lambda f, kind: read.latent_kept(f, read.reach_of(f, kind)),
    ),
    _LINEAR,
)
_register("qwen4_exp_text", read.qwen4, _LINEAR + " indexer_head_dim ple_conv_kernel_size")
_register("bamba", read.by_kind(read.bamba_kinds, read.bamba_states, read.grouped_kept), _MAMBA)
_register("granitemoehybrid", read.by_kind(read.named("layer_types"), read.bamba_states, read.grouped_kept), _MAMBA)
_register("falcon_h1", read.by_kind(read.every_layer("hybrid"), read.bamba_states, read.grouped_kept), _MAMBA)
_register(
    "jamba",
    read.by_kind(
        read.jamba_kinds,
        lambda f: read.mamba(f, f.count("mamba_expand") * f.count("hidden_size"), "mamba_d_state", "mamba_d_conv"),
        read.grouped_kept,
    ),
    _MAMBA,
)
_register(
    "mamba falcon_mamba",
    read.by_kind(
        read.every_layer("linear_attention"),
        lambda f: read.mamba(f, read.inner_of(f), "state_size", "conv_kernel"),
        read.grouped_kept,
    ),
    _MAMBA,
)
_register(
    "mamba2",
    read.by_kind(
        read.every_layer("linear_attention"),
        lambda f: read.mamba2(
            f,
            f.count("num_heads"),
            f.count("head_dim"),
            f.count("n_groups"),
            f.count("state_size"),
            f.count("conv_kernel"),
        ),
        read.grouped_kept,
    ),
    _MAMBA,
)
_register(
    "nemotron_h",
    read.by_kind(
        read.named("layers_block_type", None),
        lambda f: read.mamba2(
            f,
            f.count("mamba_num_heads"),
            f.count("mamba_head_dim"),
            f.count("n_groups"),
            f.count("ssm_state_size"),
            f.count("conv_kernel"),
        ),
        read.grouped_kept,
    ),
    _MAMBA,
)
_register(
    "zamba",
    read.by_kind(
        read.named("layers_block_type"),
        lambda f: (
            State(
                "convolution", ((f.count("mamba_expand") * f.count("hidden_size"), 1),), kernel=f.count("mamba_d_conv")
            ),
            State(
                "recurrent state",
                ((f.count("mamba_expand") * f.count("hidden_size"), f.count("mamba_d_state")),),
                "float32",
            ),
        ),
        read.zamba_kept,
    ),
    _MAMBA,
)
_register(
    "zamba2",
    read.by_kind(
        read.named("layers_block_type"),
        lambda f: read.mamba2(
            f,
            f.count("n_mamba_heads"),
            f.count("mamba_headdim"),
            f.count("mamba_ngroups"),
            f.count("mamba_d_state"),
            f.count("mamba_d_conv"),
        ),
        read.zamba_kept,
    ),
    _MAMBA,
)
_register(
    "lfm2 lfm2_moe",
    read.by_kind(read.named("layer_types"), read.lfm_states, read.grouped_kept),
    "layer_types conv_L_cache conv_bias conv_dim conv_dim_out conv_use_xavier_init",
)
_register(
    "lfm3",
    read.by_kind(read.named("layer_types"), read.lfm_states, read.grouped_kept),
    "layer_types conv_L_cache conv_bias sliding_window",
)
_register(
    "minimax",
    read.by_kind(read.named("layer_types"), read.minimax_states, read.minimax_kept),
    "layer_types sliding_window linear_attn_alpha_factor linear_attn_beta_factor",
)
_register(
    "zaya",
    read.by_kind(read.named("layer_types"), read.zaya_states, read.grouped_kept),
    "layer_types sliding_window cca_time0 cca_time1",
)
_register(
    "inkling_text inkling2_text",
    read.inkling,
    "layer_types conv_kernel_size sliding_window_size swa_num_attention_heads swa_num_key_value_heads swa_head_dim",
)
_register("recurrent_gemma", read.recurrent_gemma, "attention_window_size lru_width conv1d_width")
_register("rwkv", read.rwkv)
_register("xlstm", read.xlstm)
_register("deepseek_v4", read.deepseek_v4, "layer_types compress_rates sliding_window index_head_dim")
_register("xlnet", read.xlnet)
_register("reformer", read.reformer)

# Model types whose configs of before transformers 5 have other fields for some of this, which transformers translates.
TRANSLATED = frozenset(
    [
        "bailing_hybrid",
        "cwm",
        "deepseek_v4",
        "dots3_note_text",
        "falcon",
        "gemma4_text",
        "gemma4_unified_text",
        "glm_moe_dsa",
        "hrm_text",
        "hy_v4",
        "inkling2_text",
        "inkling_text",
        "kimi_linear",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m3_vl_text",
        "modernbert-decoder",
        "nemotron_h",
        "qwen4_exp_text",
        "recurrent_gemma",
        "reformer",
        "xlnet",
        "xlstm",
        "zamba",
        "zamba2",
    ]
)

MODEL_TYPES = tuple(sorted(_READERS))

# Why transformers runs a model without a cache that could be compared.
_UNCACHED = {
    "openai-gpt": "transformers runs openai-gpt without a cache",
    "xlm": "transformers runs xlm without a cache",
}
