"""How architectures keep their caches: one reader for each way, which asks `Fields` for every number by name.

Which model type is read how is in `kvblocks.models.architectures`. Imports no transformers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from kvblocks.config import Chunk, Window
from kvblocks.errors import MissingField, UnknownModel
from kvblocks.formats import dtype_name
from kvblocks.models.fields import Fields
from kvblocks.models.shapes import Kept, Layer, Reach, State, attention

Reader = Callable[[Fields], list[Layer]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Types whose config class has a default of its own for a field that a file leaves out. For all others it means: as many
# K and V heads as queries, a head as wide as its share of the hidden size, no window.
_OWN_KV_HEADS = _names(
    "axk1 axk2 bailing_hybrid bamba beam bitnet cwm deepseek_v3 deepseek_v32 dots1 dots3_note_text emu3_text_model "
    "ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 flint gemma gemma2 gemma3_text gemma3n_text gemma4_text "
    "gemma4_unified_text glm glm4 glm4_moe glm4v_moe_text glm4v_text gpt_oss granite_docling_text granite_swa helium "
    "hy_v3 internlm3 iquestcoder jamba kolibri1 laguna lfm2 lfm2_moe lfm3 llama4_text mellum mimo_v2_flash minimax "
    "minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama_text_model molmo2_text nemotron_h "
    "phi4_multimodal phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text "
    "qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text qwen4_exp_text seed_oss smollm3 solar_open stablelm "
    "starcoder2 vaultgemma zaya"
)
_OWN_HEAD_DIM = _names(
    "afmoe beam cohere2_moe cwm ernie4_5 flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text "
    "glm glm4 gpt_oss helium hrm_text hy_v3 internlm3 iquestcoder kolibri1 laguna lfm3 llama4_text mellum "
    "mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral3 molmo2_text nemotron_h qwen3 qwen3_5_moe_text "
    "qwen3_5_text qwen3_next qwen3_vl_text qwen4_exp_text seed_oss solar_open vaultgemma zaya"
)
_OWN_WINDOW = _names("mistral moshi qwen3_moe")
_SHARING = _names("gemma3n_text gemma4_text gemma4_unified_text")


# --- attention with heads of K and V


def head_dim_of(f: Fields, heads: str = "num_attention_heads", hidden: str = "hidden_size") -> int:
    """Numbers in one head: as the config says, or the hidden size over the query heads."""
    if f.has("head_dim"):
        return f.count("head_dim")
    if f.model_type in _OWN_HEAD_DIM and "head_dim" not in f.values:
        raise MissingField(f.model_type, "head_dim")
    if f.count(hidden) % f.count(heads):
        raise UnknownModel(
            f"{f.model_type}.{hidden}={f.count(hidden)} does not divide by {heads}={f.count(heads)}, and the config "
            f"has no head_dim; add it"
        )
    return f.divided(hidden, heads)


def kv_heads_of(f: Fields) -> int:
    """K and V heads; where a config says None, as many as there are queries."""
    if f.has("num_key_value_heads"):
        return f.count("num_key_value_heads")
    heads = f.count("num_attention_heads")
    if "num_key_value_heads" not in f.values:
        if f.model_type in _OWN_KV_HEADS:
            raise MissingField(f.model_type, "num_key_value_heads")
        f.taken["num_key_value_heads"] = heads
    return heads


def grouped_heads(
    f: Fields,
    heads: int,
    k_dim: int,
    v_dim: int,
    reach: Reach = None,
    stored_heads: int | None = None,
    queries: str = "num_attention_heads",
) -> tuple[Kept, ...]:
    """K and V of heads each of which serves equally many queries, whose number is in the field `queries`."""
    number = f.count(queries)
    if number % heads:
        raise UnknownModel(
            f"{f.model_type}.{queries}={number} does not divide by the {heads} heads of K and V; "
            f"each of them serves equally many queries"
        )
    return attention(heads, k_dim, v_dim, reach, stored_heads, number)


def plain(layers: str, heads: str, hidden: str, head_dim: str | None = None) -> Reader:
    """Every layer keeps K and V of as many heads as there are queries."""

    def read(f: Fields) -> list[Layer]:
        dim = f.count(head_dim) if head_dim is not None else f.divided(hidden, heads)
        for name, known in (("num_key_value_heads", f.count(heads)), ("head_dim", dim)):
            if f.has(name) and f.count(name) != known:
                raise UnknownModel(
                    f"{f.model_type}.{name}={f.count(name)}: the planner knows {f.model_type} with {known} only, by "
                    f"{heads} and {hidden}; if the model is of another type, give the numbers instead"
                )
        return [Layer(i, "full_attention", attention(f.count(heads), dim, dim)) for i in range(f.layers(layers))]

    return read


def window_of(f: Fields, name: str = "sliding_window") -> Window:
    """The window that a field names."""
    return Window(f.count(name))


def reach_of(f: Fields, kind: str, window: str = "sliding_window") -> Reach:
    """How far a layer of this kind attends; None for all tokens."""
    if kind in ("full_attention", "indexed_attention", "hybrid", "minimax_m3_sparse"):
        return None
    if kind in ("sliding_attention", "hybrid_sliding"):
        return window_of(f, window)
    if kind == "chunked_attention":
        return Chunk(f.count("attention_chunk_size"))
    raise UnknownModel(f"{f.model_type}.layer_types: the planner does not know the kind {kind!r}")


def layer_kinds(f: Fields) -> list[str]:
    """The kind of every layer: as the config names it, or by the rule of transformers for older configs."""
    number = f.layers("num_hidden_layers")
    if f.has("layer_types"):
        return f.kinds("layer_types", number)
    rule = _RULES.get(f.model_type)
    if rule is not None:
        if rule is not qwen and not f.has("sliding_window_pattern"):
            f.taken["layer_types"] = None
        return [rule(f, i) for i in range(number)]
    raise MissingField(f.model_type, "layer_types")


def every(period: str, default: int, offset: int = 0) -> Callable[[Fields, int], str]:
    """One full layer in so many, the others sliding."""

    def kind(f: Fields, i: int) -> str:
        each = f.count(period) if f.has(period) else default
        return "full_attention" if (i + 1 + offset) % each == 0 else "sliding_attention"

    return kind


def qwen(f: Fields, i: int) -> str:
    """Qwen's rule: layers from `max_window_layers` on have the window, where it is used at all."""
    if not f.flag("use_sliding_window") or not f.has("sliding_window"):
        return "full_attention"
    return "sliding_attention" if i >= f.count("max_window_layers") else "full_attention"


# How transformers fills in layer_types where a config has none.
_RULES: dict[str, Callable[[Fields, int], str]] = {
    "gemma2": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "vaultgemma": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "gpt_oss": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "gemma3_text": every("sliding_window_pattern", 6),
    "cohere2": every("sliding_window_pattern", 4),
    "olmo3": every("", 4),
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen2_vl_text": qwen,
    "qwen2_5_vl_text": qwen,
    "gemma3n_text": every("", 5),
    "mimo": qwen,
    "qwen2_5_omni_text": qwen,
}


def grouped(f: Fields) -> list[Layer]:
    """K and V heads shared by queries, every layer alike, in a window where the config has one."""
    reach = window_of(f) if f.has("sliding_window") else None
    if reach is None and f.model_type in _OWN_WINDOW and "sliding_window" not in f.values:
        raise MissingField(f.model_type, "sliding_window")
    if f.model_type == "qwen3_moe" and not f.flag("use_sliding_window"):
        reach = None
    kind = "full_attention" if reach is None else "sliding_attention"
    dim = head_dim_of(f)
    kept = grouped_heads(f, kv_heads_of(f), dim, dim, reach)
    return [Layer(i, kind, kept) for i in range(f.layers("num_hidden_layers"))]


def renamed(reader: Reader, **names: str) -> Reader:
    """A reader of configs that call its fields by other names: `names[ours]` is theirs."""

    def read(f: Fields) -> list[Layer]:
        values = {ours: f.values[theirs] for ours, theirs in names.items() if theirs in f.values}
        return reader(f.with_values({**f.values, **values}))

    return read


def chatglm(f: Fields) -> list[Layer]:
    """One K and V head for each of a few groups of queries where the config says so, else one for each query."""
    heads = f.count("multi_query_group_num" if f.flag("multi_query_attention") else "num_attention_heads")
    kept = grouped_heads(f, heads, f.count("kv_channels"), f.count("kv_channels"))
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_layers"))]


def nas(f: Fields) -> list[Layer]:
    """Layers that a search has thinned out: each has its own number of queries to a K and V head, or no attention."""
    blocks = f.get("block_configs")
    number, queries, dim = f.layers("num_hidden_layers"), f.count("num_attention_heads"), head_dim_of(f)
    if not isinstance(blocks, list | tuple) or len(blocks) != number:
        raise UnknownModel(f"{f.model_type}.block_configs must be a list of num_hidden_layers={number} blocks")
    layers = []
    for i, block in enumerate(blocks):
        given = block.get("attention") if isinstance(block, Mapping) else None
        if not isinstance(given, Mapping):
            raise UnknownModel(f"{f.model_type}.block_configs[{i}] says nothing of its attention")
        own = Fields(f"{f.model_type}.block_configs[{i}].attention", {"num_attention_heads": queries, **given})
        if any(own.has(name) and own.flag(name) for name in ("no_op", "replace_with_linear")):
            layers.append(Layer(i, "no attention"))
            continue
        reach = Window(own.count("window_length")) if own.has("window_length") else None
        kept = grouped_heads(own, own.divided("num_attention_heads", "n_heads_in_group"), dim, dim, reach)
        layers.append(Layer(i, "sliding_attention" if reach else "full_attention", kept))
    return layers


def mixed(f: Fields) -> list[Layer]:
    """K and V heads shared by queries, layers of several reaches; the last may read what others keep."""
    if f.values.get("use_bidirectional_attention") in (True, "all"):
        raise UnknownModel(
            f"{f.model_type}.use_bidirectional_attention={f.get('use_bidirectional_attention')!r}: "
            f"a model that attends both ways keeps no cache"
        )
    kinds = layer_kinds(f)
    shared = f.count("num_kv_shared_layers", 0) if f.model_type in _SHARING else 0
    own = len(kinds) - shared
    layers = []
    for i, kind in enumerate(kinds):
        at = f.layer(i)
        if i >= own:
            source = max((j for j in range(own) if kinds[j] == kind), default=None)
            if source is None:
                raise UnknownModel(f"{f.model_type}.num_kv_shared_layers={shared}: no layer before is {kind!r}")
            layers.append(Layer(i, kind, reads=source))
            continue
        k_dim = head_dim_of(at)
        v_dim = at.count("v_head_dim") if f.model_type == "mimo_v2_flash" else k_dim
        heads = kv_heads_of(at)
        if f.model_type == "mimo_v2_flash" and kind == "sliding_attention":
            heads *= 2
            own_dims = {"swa_num_key_value_heads": heads, "swa_head_dim": k_dim, "swa_v_head_dim": v_dim}
            for name, value in own_dims.items():
                if f.has(name) and f.count(name) != value:
                    raise UnknownModel(f"mimo_v2_flash.{name}={f.count(name)}: transformers keeps {value}")
        kept = grouped_heads(at, heads, k_dim, v_dim, reach_of(at, kind))
        if kind == "minimax_m3_sparse":
            kept = (*kept, Kept("indexer key", 1, at.count("index_head_dim")))
        layers.append(Layer(i, kind, kept))
    return layers


def gemma4(f: Fields) -> list[Layer]:
    """`mixed` layers, of which the full ones have heads of their own."""
    if "per_layer_config" not in f.values:
        # Before, the heads of full layers had fields of their own; the rule for them is transformers'.
        raise MissingField(f.model_type, "per_layer_config")
    return mixed(f)


def gpt_neo(f: Fields) -> list[Layer]:
    """Every other layer sees a window; transformers' cache keeps all of it."""
    heads = f.count("num_heads")
    dim = f.divided("hidden_size", "num_heads")
    layers = []
    for i, kind in enumerate(f.kinds("attention_layers", f.layers("num_layers"))):
        if kind not in ("global", "local"):
            raise UnknownModel(f"gpt_neo.attention_layers: the planner does not know the kind {kind!r}")
        reach = window_of(f, "window_size") if kind == "local" else None
        kept = tuple(Kept(name, heads, dim, reach, stored_reach=False) for name in ("K", "V"))
        layers.append(Layer(i, "sliding_attention" if reach else "full_attention", kept))
    return layers


def gpt_bigcode(f: Fields) -> list[Layer]:
    """One K and V head for all queries where the config says so, else one for each query."""
    heads = 1 if f.flag("multi_query") else f.count("n_head")
    dim = f.divided("n_embd", "n_head")
    return [Layer(i, "full_attention", attention(heads, dim, dim)) for i in range(f.layers("n_layer"))]


def falcon(f: Fields) -> list[Layer]:
    """One K and V head, a few, or one to a query; transformers repeats the few."""
    queries = f.count("num_attention_heads")
    new = f.flag("new_decoder_architecture")
    heads = f.count("num_kv_heads") if f.has("num_kv_heads") else queries
    if f.flag("multi_query") and not new:
        heads = 1
    dim = f.divided("hidden_size", "num_attention_heads")
    kept = grouped_heads(f, heads, dim, dim, stored_heads=queries if new else heads)
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def dbrx(f: Fields) -> list[Layer]:
    """K and V heads shared by queries, their number in `attn_config`."""
    given = f.get("attn_config")
    if not isinstance(given, Mapping):
        raise (
            MissingField(f.model_type, "attn_config")
            if given is None
            else UnknownModel("dbrx.attn_config is no object")
        )
    inner = Fields("dbrx.attn_config", given)
    dim = f.divided("d_model", "n_heads")
    kept = grouped_heads(f, inner.count("kv_n_heads"), dim, dim, queries="n_heads")
    return [Layer(i, "full_attention", kept) for i in range(f.layers("n_layers"))]


def jetmoe(f: Fields) -> list[Layer]:
    """K and V heads that the query heads of several experts share."""
    kept = attention(f.count("num_key_value_heads"), f.count("kv_channels"), f.count("kv_channels"))
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def cpmant(f: Fields) -> list[Layer]:
    """Learned prompt tokens stand before the first token of every sequence."""
    heads, dim = f.count("num_attention_heads"), f.count("dim_head")
    kept = tuple(Kept(name, heads, dim, extra_tokens=f.count("prompt_length")) for name in ("K", "V"))
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def hrm(f: Fields) -> list[Layer]:
    """The layers of a stack run several times, and each run keeps K and V of its own."""
    runs = f.layers("num_hidden_layers")
    if not f.has("num_layers_per_stack"):
        runs *= f.count("H_cycles") * (f.count("L_cycles") + 1)
    heads, dim = f.count("num_attention_heads"), head_dim_of(f)
    return [Layer(i, "full_attention", attention(heads, dim, dim)) for i in range(runs)]


def mllama(f: Fields) -> list[Layer]:
    """Some layers attend to the image instead of the text; what they keep is counted by `encoder_tokens`."""
    if not f.has("cross_attention_layers"):
        raise MissingField(f.model_type, "cross_attention_layers")
    cross = f.indices("cross_attention_layers")
    dim = head_dim_of(f)
    kept = grouped_heads(f, kv_heads_of(f), dim, dim)
    return [
        Layer(i, "cross_attention", cross=kept) if i in cross else Layer(i, "full_attention", kept)
        for i in range(f.layers("num_hidden_layers"))
    ]


def decoder_half(layers: str, heads: str, hidden: str) -> Reader:
    """The decoder of an encoder-decoder: K and V of its own tokens, and of the encoder's where there is one."""

    def read(f: Fields) -> list[Layer]:
        dim = f.divided(hidden, heads)
        kept = attention(f.count(heads), dim, dim)
        cross = kept if f.flag("is_encoder_decoder") else ()
        return [Layer(i, "full_attention", kept, cross=cross) for i in range(f.layers(layers))]

    return read


def t5(f: Fields) -> list[Layer]:
    """`decoder_half` with heads of a size of their own, and always an encoder."""
    number = f.layers("num_decoder_layers") if f.has("num_decoder_layers") else f.layers("num_layers")
    kept = attention(f.count("num_heads"), f.count("d_kv"), f.count("d_kv"))
    return [Layer(i, "full_attention", kept, cross=kept) for i in range(number)]


# --- latent attention


def latent_kept(f: Fields, reach: Reach = None) -> tuple[Kept, ...]:
    """The latent and the rotated key, or with `mla="expanded"` K and V of every head."""
    rope = f.count("qk_rope_head_dim")
    if f.mla == "latent":
        return Kept("latent", 1, f.count("kv_lora_rank"), reach), Kept("rope key", 1, rope, reach)
    heads = f.count("num_attention_heads")
    return attention(heads, f.count("qk_nope_head_dim") + rope, f.count("v_head_dim"), reach)


def latent(f: Fields) -> list[Layer]:
    """Multi-head latent attention: one latent and one rotated key for all heads."""
    number = f.layers("num_hidden_layers")
    kinds = f.kinds("layer_types", number) if f.has("layer_types") else ["full_attention"] * number
    return [Layer(i, kind, latent_kept(f.layer(i), reach_of(f.layer(i), kind))) for i, kind in enumerate(kinds)]


def longcat(f: Fields) -> list[Layer]:
    """Latent attention twice in every layer, each with a cache of its own."""
    return [Layer(i, "full_attention", latent_kept(f)) for i in range(2 * f.layers("num_layers"))]


def indexed(f: Fields) -> list[Layer]:
    """Latent attention whose layers pick their tokens by an indexer; it keeps a key of its own."""
    number = f.layers("num_hidden_layers")
    kinds = f.kinds("layer_types", number)
    shares = f.model_type in ("glm_moe_dsa", "hy_v4")
    indexers = f.kinds("indexer_types", number) if shares else ["full"] * number
    if f.model_type == "dots3_note_text" and "per_layer_config" not in f.values:
        raise MissingField(f.model_type, "per_layer_config")
    dtype = "float32" if f.model_type == "dots3_note_text" else None
    layers = []
    for i, (kind, indexer) in enumerate(zip(kinds, indexers, strict=True)):
        at = f.layer(i)
        kept = latent_kept(at, reach_of(at, kind))
        if indexer not in ("full", "shared"):
            raise UnknownModel(f"{f.model_type}.indexer_types: the planner does not know the kind {indexer!r}")
        if kind == "indexed_attention" and indexer == "full":
            kept = (*kept, Kept("indexer key", 1, at.count("index_head_dim"), dtype=dtype))
        layers.append(Layer(i, kind, kept))
    return layers


# --- state: Mamba, linear attention, convolutions


def inner_of(f: Fields) -> int:
    """Channels of Mamba 1: what a config names outweighs `expand`, as it does in transformers."""
    return f.count("intermediate_size") if f.has("intermediate_size") else f.count("expand") * f.count("hidden_size")


def mpt(f: Fields) -> list[Layer]:
    """`plain`; an `attn_config` that asks for other heads of K and V is an error."""
    given = f.values.get("attn_config") or {}
    if not isinstance(given, Mapping):
        raise UnknownModel("mpt.attn_config is no object")
    kind = given.get("attn_type", "multihead_attention")
    if kind != "multihead_attention" or given.get("kv_n_heads") not in (None, f.count("n_heads")):
        raise UnknownModel(
            f"mpt.attn_config: transformers keeps as many heads of K and V as there are queries; "
            f"attn_type={kind!r:.60} and kv_n_heads={given.get('kv_n_heads')!r:.60} say otherwise"
        )
    return plain("n_layers", "n_heads", "d_model")(f)


def mamba(f: Fields, inner: int, state: str, conv: str) -> tuple[State, ...]:
    """Mamba 1: a convolution's window and a state for each channel."""
    return (
        State("convolution", ((inner, 1),), kernel=f.count(conv)),
        State("recurrent state", ((inner, f.count(state)),), "float32"),
    )


def mamba2(f: Fields, heads: int, head_dim: int, groups: int, state: int, conv: int) -> tuple[State, ...]:
    """Mamba 2: the convolution runs over x, B and C."""
    return (
        State("convolution", ((heads, head_dim), (groups, 2 * state)), kernel=conv),
        State("recurrent state", ((heads, head_dim * state),), "float32"),
    )


def bamba_states(f: Fields) -> tuple[State, ...]:
    """Convolution and recurrent state of a Mamba 2 layer, as Bamba and its kin name their sizes."""
    heads, head_dim = f.count("mamba_n_heads"), f.get("mamba_d_head")
    if head_dim == "auto":
        inner = f.count("mamba_expand") * f.count("hidden_size")
        head_dim = inner // heads
    else:
        head_dim = f.count("mamba_d_head")
    return mamba2(f, heads, head_dim, f.count("mamba_n_groups"), f.count("mamba_d_state"), f.count("mamba_d_conv"))


def state_dtype(f: Fields, name: str) -> str:
    """The dtype that a config asks for its recurrent state in; single precision where it names none."""
    given = f.values.get(name)
    if given is None:
        return "float32"
    if not isinstance(given, str):
        raise UnknownModel(f"{f.model_type}.{name}={given!r:.60} is no dtype's name")
    return dtype_name(given)


def delta_states(f: Fields) -> tuple[State, ...]:
    """Gated delta rule: the convolution runs over q, k and v; a state of keys by values for each head."""
    keys, key_dim = f.count("linear_num_key_heads"), f.count("linear_key_head_dim")
    values, value_dim = f.count("linear_num_value_heads"), f.count("linear_value_head_dim")
    conv = f.count("linear_conv_kernel_dim")
    return (
        State("convolution", ((keys, 2 * key_dim), (values, value_dim)), kernel=conv),
        State("recurrent state", ((values, key_dim * value_dim),), state_dtype(f, "mamba_ssm_dtype")),
    )


def kimi_states(f: Fields) -> tuple[State, ...]:
    """Convolutions and recurrent state of Kimi's delta attention."""
    heads, dim, conv = f.count("linear_num_heads"), f.count("linear_head_dim"), f.count("linear_conv_kernel_dim")
    return (
        State("convolution", ((heads, 3 * dim),), kernel=conv),
        State("recurrent state", ((heads, dim * dim),), "float32"),
    )


def grouped_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    """K and V of grouped attention, of as many tokens as the kind reaches."""
    dim = head_dim_of(f)
    return grouped_heads(f, kv_heads_of(f), dim, dim, reach_of(f, kind))


def indexed_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    """K and V, and the keys by which an indexer picks tokens."""
    kept = grouped_kept(f, kind)
    if kind != "indexed_attention":
        return kept
    if not f.has("indexer_head_dim"):
        raise MissingField(f.model_type, "indexer_head_dim")
    return (*kept, Kept("indexer key", 1, f.count("indexer_head_dim")))


Kinds = Callable[[Fields], list[str]]
KeptOf = Callable[[Fields, str], tuple[Kept, ...]]


def by_kind(kinds: Kinds, states: Callable[[Fields], tuple[State, ...]], kept: KeptOf) -> Reader:
    """Layers that keep K and V, layers that keep state, layers that keep both, and layers that keep nothing."""

    def read(f: Fields) -> list[Layer]:
        layers = []
        for i, kind in enumerate(kinds(f)):
            if kind in ("linear_attention", "conv"):
                layers.append(Layer(i, kind, states=states(f)))
            elif kind in ("hybrid", "hybrid_sliding"):
                layers.append(Layer(i, kind, kept(f, kind), states(f)))
            elif kind in ("moe", "mlp"):
                layers.append(Layer(i, kind))
            else:
                layers.append(Layer(i, kind, kept(f, kind)))
        return layers

    return read


def named(field: str, number: str | None = "num_hidden_layers") -> Kinds:
    """The kinds that a field names, one for each layer; `number` is the field that says how many there are."""

    def kinds(f: Fields) -> list[str]:
        value = f.get(field)
        return f.kinds(field, f.layers(number) if number else len(value) if isinstance(value, list | tuple) else 0)

    return kinds


def every_layer(kind: str) -> Kinds:
    """The same kind for all layers."""
    return lambda f: [kind] * f.layers("num_hidden_layers")


def bamba_kinds(f: Fields) -> list[str]:
    """Attention in the layers that `attn_layer_indices` names, Mamba in the others."""
    indices = f.indices("attn_layer_indices")
    return ["full_attention" if i in indices else "linear_attention" for i in range(f.layers("num_hidden_layers"))]


def jamba_kinds(f: Fields) -> list[str]:
    """Attention in one layer of each period, Mamba in the others."""
    period, offset = f.count("attn_layer_period"), f.count("attn_layer_offset", 0)
    return [
        "full_attention" if i % period == offset else "linear_attention" for i in range(f.layers("num_hidden_layers"))
    ]


def zamba_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    """K and V of the attention block that hybrid layers run."""
    dim = f.count("attention_head_dim")
    return grouped_heads(f, f.count("num_key_value_heads"), dim, dim)


def lfm_states(f: Fields) -> tuple[State, ...]:
    """The short convolution of an LFM layer."""
    for name in ("conv_dim", "conv_dim_out"):
        if f.has(name) and f.count(name) != f.count("hidden_size"):
            raise UnknownModel(
                f"{f.model_type}.{name}={f.count(name)} differs from hidden_size={f.count('hidden_size')}"
            )
    return (State("convolution", ((f.count("hidden_size"), 1),), kernel=f.count("conv_L_cache")),)


def minimax_states(f: Fields) -> tuple[State, ...]:
    """The recurrent state of lightning attention."""
    dim = head_dim_of(f)
    return (State("recurrent state", ((f.count("num_attention_heads"), dim * dim),)),)


def minimax_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    """K and V of MiniMax's full layers."""
    if kind != "full_attention":
        raise UnknownModel(f"minimax.layer_types: the planner does not know the kind {kind!r}")
    heads, dim = kv_heads_of(f), head_dim_of(f)
    reach = window_of(f) if f.has("sliding_window") else None
    kept = grouped_heads(f, heads, dim, dim, reach)
    return tuple(replace(one, stored_reach=False) for one in kept)


def zaya_states(f: Fields) -> tuple[State, ...]:
    """What convolutional attention keeps: its columns, and a delayed value."""
    heads, kv_heads, dim = f.count("num_attention_heads"), kv_heads_of(f), head_dim_of(f)
    window = f.count("cca_time0") + f.count("cca_time1") - 2
    states = (State("delayed value", ((kv_heads, dim // 2),)),)
    return (State("convolution", ((heads, dim * window), (kv_heads, dim * window))), *states) if window else states


def inkling(f: Fields) -> list[Layer]:
    """Four short convolutions in every layer: over K, V and the two inputs, all in float32."""
    kernel, hidden = f.count("conv_kernel_size"), f.count("hidden_size")
    dtype = "float32"
    layers = []
    for i, kind in enumerate(f.kinds("layer_types", f.layers("num_hidden_layers"))):
        swa = "swa_" if kind == "hybrid_sliding" else ""
        heads, dim = f.count(f"{swa}num_key_value_heads"), f.count(f"{swa}head_dim")
        reach = reach_of(f, kind, "sliding_window_size")
        kept = grouped_heads(f, heads, dim, dim, reach, queries=f"{swa}num_attention_heads")
        states = (
            State("convolutions of K and V", ((heads, 2 * dim),), dtype, kernel=kernel),
            State("convolutions of the inputs", ((2 * hidden, 1),), dtype, kernel=kernel),
        )
        layers.append(Layer(i, kind, kept, states))
    return layers


def recurrent_gemma(f: Fields) -> list[Layer]:
    """Recurrent layers, and layers that attend to a window, in a pattern that repeats."""
    width, conv = f.count("lru_width"), f.count("conv1d_width")
    pattern = f.get("block_types")
    if not isinstance(pattern, list | tuple) or not pattern:
        raise MissingField(f.model_type, "block_types")
    layers = []
    for i in range(f.layers("num_hidden_layers")):
        kind = pattern[i % len(pattern)]
        if kind == "recurrent":
            states = [State("convolution", ((width, conv - 1),))] if conv > 1 else []
            layers.append(
                Layer(i, "linear_attention", states=(*states, State("recurrent state", ((width, 1),), "float32")))
            )
        elif kind == "attention":
            dim = head_dim_of(f)
            kept = grouped_heads(f, kv_heads_of(f), dim, dim, window_of(f, "attention_window_size"))
            layers.append(Layer(i, "sliding_attention", kept))
        else:
            raise UnknownModel(f"recurrent_gemma.block_types: the planner does not know the kind {kind!r}")
    return layers


def rwkv(f: Fields) -> list[Layer]:
    """The last inputs of both halves of a layer, and its recurrent state."""
    hidden = f.count("hidden_size")
    states = (
        State("shifted inputs", ((1, 2 * hidden),)),
        State("recurrent state", ((3 * hidden, 1),), "float32"),
    )
    return [Layer(i, "linear_attention", states=states) for i in range(f.layers("num_hidden_layers"))]


def xlstm(f: Fields) -> list[Layer]:
    """A matrix memory for each head, with its normalizer and its stabilizer."""
    heads, hidden = f.count("num_heads"), f.count("hidden_size")
    dims = []
    for name in ("qk_dim_factor", "v_dim_factor"):
        dims.append(64 * math.ceil(hidden * f.factor(name) / 64) // heads)
    states = (State("matrix memory", ((heads, dims[0] * dims[1] + dims[0] + 1),)),)
    layers = [Layer(i, "linear_attention", states=states) for i in range(f.layers("num_hidden_layers"))]
    # transformers counts the tokens of a sequence in a tensor.
    layers[0] = Layer(0, "linear_attention", states=(*states, State("token count", ((1, 1),), "int64")))
    return layers


def deepseek_v4(f: Fields) -> list[Layer]:
    """A window of one head that is both K and V, and for most layers compressed entries of everything before."""
    number = f.layers("num_hidden_layers")
    if not f.has("compress_rates"):
        raise MissingField(f.model_type, "compress_rates")
    rates = f.get("compress_rates")
    if not isinstance(rates, Mapping):
        raise UnknownModel(f"deepseek_v4.compress_rates={rates!r:.60} is no mapping of kinds to rates")
    dim, index_dim = f.count("head_dim"), f.count("index_head_dim")
    window = window_of(f)
    shared = Kept("K = V", 1, dim, window)
    layers = []
    for i, kind in enumerate(f.kinds("layer_types", number)):
        if kind == "sliding_attention":
            layers.append(Layer(i, kind, attention(1, dim, dim, window)))
            continue
        rate = rates.get(kind)
        if type(rate) is not int or rate < 1:
            raise UnknownModel(f"deepseek_v4.compress_rates={rates!r} has no rate for {kind!r}")
        if kind == "heavily_compressed_attention":
            kept: tuple[Kept, ...] = (shared, Kept("compressed K = V", 1, dim, every=rate))
            states: tuple[State, ...] = (
                State("tokens not compressed yet", ((1, 2 * rate * dim),), varies=("rest", rate)),
            )
        elif kind == "compressed_sparse_attention":
            both = dim + index_dim
            kept = (
                shared,
                Kept("compressed K = V", 1, dim, every=rate),
                Kept("compressed indexer key", 1, index_dim, every=rate),
            )
            states = (
                State("tokens not compressed yet", ((1, 4 * rate * both),), varies=("rest", rate)),
                State("overlap of the last entry", ((1, rate * both),), varies=("last", rate)),
                # The gates have a float32 bias added, which transformers keeps so in a model of any dtype.
                State("gates of the last entry", ((1, rate * both),), "float32", varies=("last", rate)),
            )
        else:
            raise UnknownModel(f"deepseek_v4.layer_types: the planner does not know the kind {kind!r}")
        layers.append(Layer(i, kind, kept, states))
    return layers


def qwen4(f: Fields) -> list[Layer]:
    """Gated delta rule and attention with indexers; some layers look n-grams up, in a window of their own."""
    number = f.layers("num_hidden_layers")
    kinds = f.kinds("layer_types", number)
    kinds = ["indexed_attention" if kind == "full_attention" else kind for kind in kinds]
    lookups = f.indices("ple_layer_ids")
    layers = []
    for i, kind in enumerate(kinds):
        kept: tuple[Kept, ...] = ()
        states: tuple[State, ...] = ()
        if kind == "linear_attention":
            states = delta_states(f)
        elif kind == "indexed_attention":
            kept = indexed_kept(f, kind)
            if i == kinds.index(kind):
                kept = (*kept, Kept("indexer positions", 3, 1, dtype="int64"))
        else:
            raise UnknownModel(f"{f.model_type}.layer_types: the planner does not know the kind {kind!r}")
        if i + 1 in lookups:  # counted from 1
            ngram, width = f.count("ngram_size"), f.count("hc_count") * f.count("hidden_size")
            length = (f.count("ple_conv_kernel_size") - 1) * ngram
            states = (
                *states,
                State("n-gram convolution", ((1, width * length),)),
                State("last token ids", ((1, ngram - 1),), "int64"),
            )
        layers.append(Layer(i, kind, kept, states))
    return layers


# --- caches that are not K and V


def xlnet(f: Fields) -> list[Layer]:
    """The inputs of the last `mem_len` tokens of every layer."""
    if not f.flag("use_mems_eval"):
        raise UnknownModel("xlnet.use_mems_eval is off: the model keeps nothing")
    kept = (Kept("layer inputs", 1, f.count("d_model"), Window(f.count("mem_len") + 1)),)
    return [Layer(i, "full_attention", kept) for i in range(f.layers("n_layer"))]


def reformer(f: Fields) -> list[Layer]:
    """The inputs of every token of every layer, and the buckets of those that hash."""
    kinds = f.get("attn_layers")
    if not isinstance(kinds, list | tuple) or not kinds:
        raise MissingField(f.model_type, "attn_layers")
    layers = []
    for i, kind in enumerate(kinds):
        kept: tuple[Kept, ...] = (Kept("layer inputs", 1, f.count("hidden_size")),)
        if kind == "lsh":
            heads, hashes = f.count("num_attention_heads"), f.count("num_hashes")
            kept = (*kept, Kept("buckets", heads, hashes, dtype="int64", after=f.count("lsh_attn_chunk_length")))
        elif kind != "local":
            raise UnknownModel(f"reformer.attn_layers: the planner does not know the kind {kind!r}")
        layers.append(Layer(i, "full_attention", kept))
    return layers
