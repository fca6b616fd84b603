"""What each architecture keeps in its cache, read from the numbers of its config.

One reader for each way of keeping a cache, and a table of the model types that keep it so. A reader asks `Fields` for
every number by name: what a config leaves out is an error that names it, never a guess. Imports no transformers.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from kvblocks.config import Chunk, Window
from kvblocks.planner.shapes import Kept, Layer, ModelCache, Reach, State, attention

__all__ = ["MODEL_TYPES", "MOST_LAYERS", "TRANSLATED", "Fields", "MissingField", "UnknownModel", "read_fields"]


MOST_LAYERS = 4096


class UnknownModel(ValueError):
    """An architecture, or a field of its config, that the planner cannot turn into bytes; the message names it."""


class MissingField(UnknownModel):
    """A field that a config does not have and that decides how large the cache is."""

    def __init__(self, model_type: str, name: str) -> None:
        super().__init__(f"config of model_type={model_type!r} has no {name}, which decides how large its cache is")
        self.name = name


class Fields:
    """The numbers of a config, each checked where it is used.

    Args:
        model_type: of the config.
        values: its fields.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.values = values
        overrides = values.get("per_layer_config") or {}
        try:
            self._overrides = {int(index): dict(fields) for index, fields in overrides.items()}
        except (AttributeError, TypeError, ValueError):
            raise UnknownModel(
                f"{model_type}.per_layer_config={overrides!r:.60} is no mapping of layers to fields"
            ) from None

    def layer(self, index: int) -> "Fields":
        """The fields as layer `index` has them."""
        if not self._overrides.get(index):
            return self
        return Fields(self.model_type, {**self.values, "per_layer_config": None, **self._overrides[index]})

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value, which may be None; MissingField where the config has no such field."""
        if name not in self.values:
            raise MissingField(self.model_type, name)
        return self.values[name]

    def count(self, name: str, low: int = 1) -> int:
        """A field that holds an integer of at least `low`."""
        value = self.get(name)
        if value is None:
            raise MissingField(self.model_type, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UnknownModel(
                f"{self.model_type}.{name}={value!r:.60} is of type {type(value).__name__}; an int is needed"
            )
        if not low <= value < 2**31:
            raise UnknownModel(f"{self.model_type}.{name}={value} is outside {low}..{2**31 - 1}")
        return value

    def layers(self, name: str) -> int:
        """A field that says how many layers there are."""
        number = self.count(name)
        if number > MOST_LAYERS:
            raise UnknownModel(f"{self.model_type}.{name}={number} is outside 1..{MOST_LAYERS}")
        return number

    def indices(self, name: str) -> frozenset[int]:
        """A field that names layers by their numbers; None names none."""
        value = self.get(name)
        if value is None:
            return frozenset()
        if not isinstance(value, list | tuple) or not all(type(index) is int and index >= 0 for index in value):
            raise UnknownModel(f"{self.model_type}.{name}={value!r:.60} is no list of layers")
        return frozenset(value)

    def factor(self, name: str) -> float:
        """A field that holds a positive number."""
        value = self.get(name)
        if value is None:
            raise MissingField(self.model_type, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise UnknownModel(f"{self.model_type}.{name}={value!r:.60} is not a number of more than 0")
        return value

    def flag(self, name: str) -> bool:
        """A field that is on or off; None is off."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise UnknownModel(
                f"{self.model_type}.{name}={value!r:.60} is of type {type(value).__name__}; a bool is needed"
            )
        return bool(value)

    def kinds(self, name: str, number: int) -> list[str]:
        """A field that names a kind for each of `number` layers."""
        value = self.get(name)
        if value is None:
            raise MissingField(self.model_type, name)
        if not isinstance(value, list | tuple) or not all(isinstance(kind, str) for kind in value):
            raise UnknownModel(f"{self.model_type}.{name}={value!r} is no list of names")
        if len(value) != number:
            raise UnknownModel(f"{self.model_type}.{name} names {len(value)} layers, the model has {number}")
        names: list[str] = list(value)
        return [_SYNONYMS.get(kind, kind) for kind in names]

    def divided(self, name: str, by: str) -> int:
        """`name` / `by`, which must come out even."""
        whole, parts = self.count(name), self.count(by)
        if whole % parts:
            raise UnknownModel(f"{self.model_type}.{name}={whole} does not divide by {by}={parts}")
        return whole // parts


# Names of before, as transformers maps them.
_SYNONYMS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}

Reader = Callable[[Fields], list[Layer]]
_READERS: dict[str, Reader] = {}
# Fields of a config that decide how large a cache is, where a reader knows them. One that it does not know is an error.
_DECIDING = re.compile(
    r"^(sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size|layer_types|"
    r"layers_block_type|kv_lora_rank|num_kv_shared_layers|kv_sharing_modes|cross_attention_layers|per_layer_config|"
    r"(index|indexer)_(head_dim|types)|(mamba|ssm|linear|conv|cca|lru)_\w*|\w*conv\w*kernel\w*|state_size|"
    r"compress_rates|swa_\w+|global_head_dim|num_global_key_value_heads|num_kv_heads|kv_channels|"
    r"num_key_value_groups|num_key_value_heads_per_layer)$"
)
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
    heads = [fields.values.get(key) for key in _QUERY_HEADS]
    lengths = [fields.values.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype")
    return ModelCache(
        name or fields.model_type,
        tuple(layers),
        num_query_heads=_first(heads),
        max_seq_len=_first(lengths),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        uncached=_UNCACHED.get(fields.model_type),
    )


def _first(values: list[Any]) -> int | None:
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _refuse_unknown(fields: Fields) -> None:
    known = _KNOWN[fields.model_type]
    for name, value in fields.values.items():
        if _DECIDING.match(name) and name not in known and value not in (None, False, [], {}):
            if name == "layer_types" and set(value) <= {"full_attention", "attention"}:
                continue
            raise UnknownModel(
                f"{fields.model_type}.{name}={value!r}: the planner does not know what this field means for this "
                f"model_type; remove it if it means nothing, or give the numbers instead"
            )


_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads")


# --- attention with heads of K and V


def _head_dim(f: Fields, heads: str = "num_attention_heads", hidden: str = "hidden_size") -> int:
    if f.has("head_dim"):
        return f.count("head_dim")
    if f.model_type in _OWN_HEAD_DIM and "head_dim" not in f.values:
        raise MissingField(f.model_type, "head_dim")
    return f.divided(hidden, heads)


def _kv_heads(f: Fields) -> int:
    """K and V heads; where a config says None, as many as there are queries."""
    if f.has("num_key_value_heads"):
        return f.count("num_key_value_heads")
    if f.model_type in _OWN_KV_HEADS and "num_key_value_heads" not in f.values:
        raise MissingField(f.model_type, "num_key_value_heads")
    return f.count("num_attention_heads")


def _plain(layers: str, heads: str, hidden: str, head_dim: str | None = None) -> Reader:
    """Every layer keeps K and V of as many heads as there are queries."""

    def read(f: Fields) -> list[Layer]:
        dim = f.count(head_dim) if head_dim is not None else f.divided(hidden, heads)
        return [Layer(i, "full_attention", attention(f.count(heads), dim, dim)) for i in range(f.layers(layers))]

    return read


def _window(f: Fields, name: str = "sliding_window") -> Window:
    return Window(f.count(name))


def _reach(f: Fields, kind: str, window: str = "sliding_window") -> Reach:
    if kind in ("full_attention", "indexed_attention", "hybrid", "minimax_m3_sparse"):
        return None
    if kind in ("sliding_attention", "hybrid_sliding"):
        return _window(f, window)
    if kind == "chunked_attention":
        return Chunk(f.count("attention_chunk_size"))
    raise UnknownModel(f"{f.model_type}.layer_types: the planner does not know the kind {kind!r}")


def _layer_kinds(f: Fields) -> list[str]:
    """The kind of every layer: named, or by the rule by which transformers fills them in for configs of before."""
    number = f.layers("num_hidden_layers")
    if f.has("layer_types"):
        return f.kinds("layer_types", number)
    rule = _RULES.get(f.model_type)
    if rule is not None:
        return [rule(f, i) for i in range(number)]
    raise MissingField(f.model_type, "layer_types")


def _every(period: str, default: int, offset: int = 0) -> Callable[[Fields, int], str]:
    """One full layer in so many, the others sliding."""

    def kind(f: Fields, i: int) -> str:
        each = f.count(period) if f.has(period) else default
        return "full_attention" if (i + 1 + offset) % each == 0 else "sliding_attention"

    return kind


def _qwen(f: Fields, i: int) -> str:
    if not f.flag("use_sliding_window") or not f.has("sliding_window"):
        return "full_attention"
    return "sliding_attention" if i >= f.count("max_window_layers") else "full_attention"


# How transformers fills in layer_types where a config has none.
_RULES: dict[str, Callable[[Fields, int], str]] = {
    "gemma2": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "vaultgemma": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "gpt_oss": lambda f, i: "full_attention" if i % 2 else "sliding_attention",
    "gemma3_text": _every("sliding_window_pattern", 6),
    "cohere2": _every("sliding_window_pattern", 4),
    "olmo3": _every("", 4),
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma3n_text": _every("", 5),
}


def _grouped(f: Fields) -> list[Layer]:
    """K and V heads shared by queries, every layer alike, in a window where the config has one."""
    reach = _window(f) if f.has("sliding_window") else None
    if reach is None and f.model_type in _OWN_WINDOW and "sliding_window" not in f.values:
        raise MissingField(f.model_type, "sliding_window")
    if f.model_type == "qwen3_moe" and not f.flag("use_sliding_window"):
        reach = None
    kind = "full_attention" if reach is None else "sliding_attention"
    heads, dim = _kv_heads(f), _head_dim(f)
    return [Layer(i, kind, attention(heads, dim, dim, reach)) for i in range(f.layers("num_hidden_layers"))]


def _mixed(f: Fields) -> list[Layer]:
    """K and V heads shared by queries, layers of several reaches; the last may read what others keep."""
    if f.values.get("use_bidirectional_attention") in (True, "all"):
        raise UnknownModel(
            f"{f.model_type}.use_bidirectional_attention={f.get('use_bidirectional_attention')!r}: "
            f"a model that attends both ways keeps no cache"
        )
    kinds = _layer_kinds(f)
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
        k_dim = _head_dim(at)
        v_dim = at.count("v_head_dim") if f.model_type == "mimo_v2_flash" else k_dim
        heads = _kv_heads(at)
        if f.model_type == "mimo_v2_flash" and kind == "sliding_attention":
            heads *= 2
        kept: tuple[Kept, ...] = attention(heads, k_dim, v_dim, _reach(at, kind))
        if kind == "minimax_m3_sparse":
            kept = (*kept, Kept("indexer key", 1, at.count("index_head_dim")))
        layers.append(Layer(i, kind, kept))
    return layers


def _gemma4(f: Fields) -> list[Layer]:
    if "per_layer_config" not in f.values:
        # Before, the heads of full layers had fields of their own; the rule for them is transformers'.
        raise MissingField(f.model_type, "per_layer_config")
    return _mixed(f)


def _gpt_neo(f: Fields) -> list[Layer]:
    """Every other layer sees a window; transformers' cache keeps all of it."""
    heads = f.count("num_heads")
    dim = f.divided("hidden_size", "num_heads")
    layers = []
    for i, kind in enumerate(f.kinds("attention_layers", f.layers("num_layers"))):
        if kind not in ("global", "local"):
            raise UnknownModel(f"gpt_neo.attention_layers: the planner does not know the kind {kind!r}")
        reach = _window(f, "window_size") if kind == "local" else None
        kept = tuple(Kept(name, heads, dim, reach, stored_reach=False) for name in ("K", "V"))
        layers.append(Layer(i, "sliding_attention" if reach else "full_attention", kept))
    return layers


def _gpt_bigcode(f: Fields) -> list[Layer]:
    heads = 1 if f.flag("multi_query") else f.count("n_head")
    dim = f.divided("n_embd", "n_head")
    return [Layer(i, "full_attention", attention(heads, dim, dim)) for i in range(f.layers("n_layer"))]


def _falcon(f: Fields) -> list[Layer]:
    """One K and V head, a few, or one to a query; transformers repeats the few."""
    queries = f.count("num_attention_heads")
    new = f.flag("new_decoder_architecture")
    heads = f.count("num_kv_heads") if f.has("num_kv_heads") else queries
    if f.flag("multi_query") and not new:
        heads = 1
    dim = f.divided("hidden_size", "num_attention_heads")
    kept = attention(heads, dim, dim, stored_heads=queries if new else heads)
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def _dbrx(f: Fields) -> list[Layer]:
    given = f.get("attn_config")
    if not isinstance(given, Mapping):
        raise (
            MissingField(f.model_type, "attn_config")
            if given is None
            else UnknownModel("dbrx.attn_config is no object")
        )
    inner = Fields("dbrx.attn_config", given)
    dim = f.divided("d_model", "n_heads")
    kept = attention(inner.count("kv_n_heads"), dim, dim)
    return [Layer(i, "full_attention", kept) for i in range(f.layers("n_layers"))]


def _jetmoe(f: Fields) -> list[Layer]:
    kept = attention(f.count("num_key_value_heads"), f.count("kv_channels"), f.count("kv_channels"))
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def _cpmant(f: Fields) -> list[Layer]:
    """Learned prompt tokens stand before the first token of every sequence."""
    heads, dim = f.count("num_attention_heads"), f.count("dim_head")
    kept = tuple(Kept(name, heads, dim, extra_tokens=f.count("prompt_length")) for name in ("K", "V"))
    return [Layer(i, "full_attention", kept) for i in range(f.layers("num_hidden_layers"))]


def _hrm(f: Fields) -> list[Layer]:
    """The layers of a stack run several times, and each run keeps K and V of its own."""
    runs = f.layers("num_hidden_layers")
    if not f.has("num_layers_per_stack"):
        runs *= f.count("H_cycles") * (f.count("L_cycles") + 1)
    heads, dim = f.count("num_attention_heads"), _head_dim(f)
    return [Layer(i, "full_attention", attention(heads, dim, dim)) for i in range(runs)]


def _mllama(f: Fields) -> list[Layer]:
    """Some layers attend to the image instead of the text; what they keep is counted by `encoder_tokens`."""
    if not f.has("cross_attention_layers"):
        raise MissingField(f.model_type, "cross_attention_layers")
    cross = f.indices("cross_attention_layers")
    heads, dim = _kv_heads(f), _head_dim(f)
    kept = attention(heads, dim, dim)
    return [
        Layer(i, "cross_attention", cross=kept) if i in cross else Layer(i, "full_attention", kept)
        for i in range(f.layers("num_hidden_layers"))
    ]


def _decoder_half(layers: str, heads: str, hidden: str) -> Reader:
    """The decoder of an encoder-decoder: K and V of its own tokens, and of the encoder's where there is one."""

    def read(f: Fields) -> list[Layer]:
        dim = f.divided(hidden, heads)
        kept = attention(f.count(heads), dim, dim)
        cross = kept if f.flag("is_encoder_decoder") else ()
        return [Layer(i, "full_attention", kept, cross=cross) for i in range(f.layers(layers))]

    return read


def _t5(f: Fields) -> list[Layer]:
    number = f.layers("num_decoder_layers") if f.has("num_decoder_layers") else f.layers("num_layers")
    kept = attention(f.count("num_heads"), f.count("d_kv"), f.count("d_kv"))
    return [Layer(i, "full_attention", kept, cross=kept) for i in range(number)]


# --- latent attention


def _latent_kept(f: Fields, mla: str, reach: Reach = None) -> tuple[Kept, ...]:
    rope = f.count("qk_rope_head_dim")
    if mla == "latent":
        return Kept("latent", 1, f.count("kv_lora_rank"), reach), Kept("rope key", 1, rope, reach)
    heads = f.count("num_attention_heads")
    return attention(heads, f.count("qk_nope_head_dim") + rope, f.count("v_head_dim"), reach)


def _latent(f: Fields) -> list[Layer]:
    """Multi-head latent attention: one latent and one rotated key for all heads."""
    number = f.layers("num_hidden_layers")
    kinds = f.kinds("layer_types", number) if f.has("layer_types") else ["full_attention"] * number
    return [Layer(i, kind, _latent_kept(f.layer(i), _mla(f), _reach(f.layer(i), kind))) for i, kind in enumerate(kinds)]


def _longcat(f: Fields) -> list[Layer]:
    return [Layer(i, "full_attention", _latent_kept(f, _mla(f))) for i in range(2 * f.layers("num_layers"))]


def _indexed(f: Fields) -> list[Layer]:
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
        kept = _latent_kept(at, _mla(f), _reach(at, kind))
        if indexer not in ("full", "shared"):
            raise UnknownModel(f"{f.model_type}.indexer_types: the planner does not know the kind {indexer!r}")
        if kind == "indexed_attention" and indexer == "full":
            kept = (*kept, Kept("indexer key", 1, at.count("index_head_dim"), dtype=dtype))
        layers.append(Layer(i, kind, kept))
    return layers


def _mla(f: Fields) -> str:
    return str(f.values.get("_mla", "latent"))


# --- state: Mamba, linear attention, convolutions


def _mamba(f: Fields, inner: int, state: str, conv: str) -> tuple[State, ...]:
    """Mamba 1: a convolution's window and a state for each channel."""
    return (
        State("convolution", ((inner, f.count(conv)),)),
        State("recurrent state", ((inner, f.count(state)),), "float32"),
    )


def _mamba2(f: Fields, heads: int, head_dim: int, groups: int, state: int, conv: int) -> tuple[State, ...]:
    """Mamba 2: the convolution runs over x, B and C."""
    return (
        State("convolution", ((heads, head_dim * conv), (2 * groups, state * conv))),
        State("recurrent state", ((heads, head_dim * state),), "float32"),
    )


def _bamba_states(f: Fields) -> tuple[State, ...]:
    heads, head_dim = f.count("mamba_n_heads"), f.get("mamba_d_head")
    if head_dim == "auto":
        inner = f.count("mamba_expand") * f.count("hidden_size")
        head_dim = inner // heads
    else:
        head_dim = f.count("mamba_d_head")
    return _mamba2(f, heads, head_dim, f.count("mamba_n_groups"), f.count("mamba_d_state"), f.count("mamba_d_conv"))


def _delta_states(f: Fields) -> tuple[State, ...]:
    """Gated delta rule: the convolution runs over q, k and v; a state of keys by values for each head."""
    keys, key_dim = f.count("linear_num_key_heads"), f.count("linear_key_head_dim")
    values, value_dim = f.count("linear_num_value_heads"), f.count("linear_value_head_dim")
    conv = f.count("linear_conv_kernel_dim")
    return (
        State("convolution", ((2 * keys, key_dim * conv), (values, value_dim * conv))),
        State("recurrent state", ((values, key_dim * value_dim),), "float32"),
    )


def _kimi_states(f: Fields) -> tuple[State, ...]:
    heads, dim, conv = f.count("linear_num_heads"), f.count("linear_head_dim"), f.count("linear_conv_kernel_dim")
    return (
        State("convolution", ((3 * heads, dim * conv),)),
        State("recurrent state", ((heads, dim * dim),), "float32"),
    )


def _grouped_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    dim = _head_dim(f)
    return attention(_kv_heads(f), dim, dim, _reach(f, kind))


def _indexed_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    kept = _grouped_kept(f, kind)
    if kind != "indexed_attention":
        return kept
    if not f.has("indexer_head_dim"):
        raise MissingField(f.model_type, "indexer_head_dim")
    return (*kept, Kept("indexer key", 1, f.count("indexer_head_dim")))


_Kinds = Callable[[Fields], list[str]]
_KeptOf = Callable[[Fields, str], tuple[Kept, ...]]


def _by_kind(kinds: _Kinds, states: Callable[[Fields], tuple[State, ...]], kept: _KeptOf) -> Reader:
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


def _named(field: str, number: str | None = "num_hidden_layers") -> _Kinds:
    def kinds(f: Fields) -> list[str]:
        value = f.get(field)
        return f.kinds(field, f.layers(number) if number else len(value) if isinstance(value, list | tuple) else 0)

    return kinds


def _all(kind: str) -> _Kinds:
    return lambda f: [kind] * f.layers("num_hidden_layers")


def _bamba_kinds(f: Fields) -> list[str]:
    indices = f.indices("attn_layer_indices")
    return ["full_attention" if i in indices else "linear_attention" for i in range(f.layers("num_hidden_layers"))]


def _jamba_kinds(f: Fields) -> list[str]:
    period, offset = f.count("attn_layer_period"), f.count("attn_layer_offset", 0)
    return [
        "full_attention" if i % period == offset else "linear_attention" for i in range(f.layers("num_hidden_layers"))
    ]


def _zamba_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    dim = f.count("attention_head_dim")
    return attention(f.count("num_key_value_heads"), dim, dim)


def _lfm_states(f: Fields) -> tuple[State, ...]:
    return (State("convolution", ((f.count("hidden_size"), f.count("conv_L_cache")),)),)


def _minimax_states(f: Fields) -> tuple[State, ...]:
    dim = _head_dim(f)
    return (State("recurrent state", ((f.count("num_attention_heads"), dim * dim),)),)


def _minimax_kept(f: Fields, kind: str) -> tuple[Kept, ...]:
    if kind != "full_attention":
        raise UnknownModel(f"minimax.layer_types: the planner does not know the kind {kind!r}")
    heads, dim = _kv_heads(f), _head_dim(f)
    reach = _window(f) if f.has("sliding_window") else None
    return tuple(Kept(name, heads, dim, reach, stored_reach=False) for name in ("K", "V"))


def _zaya_states(f: Fields) -> tuple[State, ...]:
    heads, kv_heads, dim = f.count("num_attention_heads"), _kv_heads(f), _head_dim(f)
    window = f.count("cca_time0") + f.count("cca_time1") - 2
    states = (State("delayed value", ((kv_heads, dim // 2),)),)
    return (State("convolution", ((heads + kv_heads, dim * window),)), *states) if window else states


def _inkling(f: Fields) -> list[Layer]:
    """Four short convolutions in every layer: over K, V and the two inputs; in single precision where it is inkling."""
    kernel, hidden = f.count("conv_kernel_size"), f.count("hidden_size")
    dtype = "float32"
    layers = []
    for i, kind in enumerate(f.kinds("layer_types", f.layers("num_hidden_layers"))):
        swa = "swa_" if kind == "hybrid_sliding" else ""
        heads, dim = f.count(f"{swa}num_key_value_heads"), f.count(f"{swa}head_dim")
        kept = attention(heads, dim, dim, _reach(f, kind, "sliding_window_size"))
        states = (
            State("convolutions of K and V", ((2 * heads, dim * kernel),), dtype),
            State("convolutions of the inputs", ((2 * hidden, kernel),), dtype),
        )
        layers.append(Layer(i, kind, kept, states))
    return layers


def _recurrent_gemma(f: Fields) -> list[Layer]:
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
            dim = _head_dim(f)
            kept = attention(_kv_heads(f), dim, dim, _window(f, "attention_window_size"))
            layers.append(Layer(i, "sliding_attention", kept))
        else:
            raise UnknownModel(f"recurrent_gemma.block_types: the planner does not know the kind {kind!r}")
    return layers


def _rwkv(f: Fields) -> list[Layer]:
    hidden = f.count("hidden_size")
    states = (
        State("shifted inputs", ((1, 2 * hidden),)),
        State("recurrent state", ((3 * hidden, 1),), "float32"),
    )
    return [Layer(i, "linear_attention", states=states) for i in range(f.layers("num_hidden_layers"))]


def _xlstm(f: Fields) -> list[Layer]:
    heads, hidden = f.count("num_heads"), f.count("hidden_size")
    dims = []
    for name in ("qk_dim_factor", "v_dim_factor"):
        dims.append(64 * math.ceil(hidden * f.factor(name) / 64) // heads)
    states = (State("matrix memory", ((heads, dims[0] * dims[1] + dims[0] + 1),)),)
    layers = [Layer(i, "linear_attention", states=states) for i in range(f.layers("num_hidden_layers"))]
    # transformers counts the tokens of a sequence in a tensor.
    layers[0] = Layer(0, "linear_attention", states=(*states, State("token count", ((1, 1),), "int64")))
    return layers


def _deepseek_v4(f: Fields) -> list[Layer]:
    """A window of one head that is both K and V, and for most layers compressed entries of everything before."""
    number = f.layers("num_hidden_layers")
    if not f.has("compress_rates"):
        raise MissingField(f.model_type, "compress_rates")
    rates = f.get("compress_rates")
    if not isinstance(rates, Mapping):
        raise UnknownModel(f"deepseek_v4.compress_rates={rates!r:.60} is no mapping of kinds to rates")
    dim, index_dim = f.count("head_dim"), f.count("index_head_dim")
    window = _window(f)
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
                State("overlap of the last entry", ((1, 2 * rate * both),), varies=("last", rate)),
            )
        else:
            raise UnknownModel(f"deepseek_v4.layer_types: the planner does not know the kind {kind!r}")
        layers.append(Layer(i, kind, kept, states))
    return layers


def _qwen4(f: Fields) -> list[Layer]:
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
            states = _delta_states(f)
        elif kind == "indexed_attention":
            kept = _indexed_kept(f, kind)
            if i == kinds.index(kind):
                kept = (*kept, Kept("indexer positions", 3, 1, dtype="int64"))
        else:
            raise UnknownModel(f"{f.model_type}.layer_types: the planner does not know the kind {kind!r}")
        if i in lookups:
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


def _xlnet(f: Fields) -> list[Layer]:
    """The inputs of the last `mem_len` tokens of every layer."""
    if not f.flag("use_mems_eval"):
        raise UnknownModel("xlnet.use_mems_eval is off: the model keeps nothing")
    kept = (Kept("layer inputs", 1, f.count("d_model"), Window(f.count("mem_len") + 1)),)
    return [Layer(i, "full_attention", kept) for i in range(f.layers("n_layer"))]


def _reformer(f: Fields) -> list[Layer]:
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


# --- the table

_register(
    "bert bert-generation big_bird biogpt camembert data2vec-text electra ernie git gpt_neox gpt_neox_japanese "
    "megatron-bert musicgen_decoder musicgen_melody_decoder opt persimmon rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    _plain("num_hidden_layers", "num_attention_heads", "hidden_size"),
)
_register("gpt2 codegen gptj ctrl openai-gpt", _plain("n_layer", "n_head", "n_embd"))
_register("bloom", _plain("n_layer", "n_head", "hidden_size"))
_register("mpt", _plain("n_layers", "n_heads", "d_model"))
_register("xlm", _plain("n_layers", "n_heads", "emb_dim"))
_register("xglm", _plain("num_layers", "attention_heads", "d_model"))
_register(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper",
    _decoder_half("decoder_layers", "decoder_attention_heads", "d_model"),
)
_register("t5 mt5 umt5", _t5)
_register("prophetnet", _decoder_half("num_decoder_layers", "num_decoder_attention_heads", "hidden_size"))

_register(
    "apertus arcee aria_text bitnet cohere diffllama emu3_text_model ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 "
    "glm4_moe granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 "
    "iquestcoder jais2 llama minimax_m2 nanochat nemotron olmo olmo2 olmoe phi seed_oss solar_open stablelm",
    _grouped,
)
_register(
    "doge ministral3 mistral mixtral moshi phi3 phi4_multimodal phimoe qwen3_moe starcoder2", _grouped, "sliding_window"
)
_register(
    "afmoe beam cohere2 cohere2_moe cohere_compass_text cwm dots1 exaone4 exaone_moe flint gemma2 gemma3_text gpt_oss "
    "granite_swa granitemoe_swa kolibri1 laguna mellum mimo_v2_flash ministral olmo3 qwen2 qwen2_moe qwen3 smollm3 "
    "vaultgemma",
    _mixed,
    "layer_types sliding_window per_layer_config",
)
_register("modernbert-decoder", _mixed, "layer_types sliding_window local_attention")
_register("gemma3n_text", _mixed, "layer_types sliding_window num_kv_shared_layers")
_register(
    "gemma4_text gemma4_unified_text", _gemma4, "layer_types sliding_window num_kv_shared_layers per_layer_config"
)
_register("llama4_text", _mixed, "layer_types attention_chunk_size")
_register("minimax_m3_vl_text", _mixed, "layer_types index_head_dim")
_register("gpt_neo", _gpt_neo, "window_size")
_register("gpt_bigcode", _gpt_bigcode)
_register("falcon", _falcon, "num_kv_heads")
_register("dbrx", _dbrx)
_register("jetmoe", _jetmoe, "kv_channels")
_register("cpmant", _cpmant)
_register("hrm_text", _hrm)
_register("mllama_text_model", _mllama, "cross_attention_layers")

_register("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu", _latent, "kv_lora_rank")
_register("longcat_flash", _longcat, "kv_lora_rank")
_register(
    "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4",
    _indexed,
    "kv_lora_rank layer_types index_head_dim indexer_types sliding_window per_layer_config",
)

_LINEAR = "layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
_LINEAR += "linear_num_value_heads linear_head_dim linear_num_heads short_conv_kernel_size kv_lora_rank "
_LINEAR += "linear_a_log_min linear_a_log_max linear_dt_min linear_dt_max linear_dt_init_floor linear_allow_neg_eigval"
_MAMBA = "layer_types layers_block_type mamba_n_heads mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv "
_MAMBA += "mamba_expand mamba_chunk_size mamba_conv_bias mamba_proj_bias mamba_dt_rank mamba_d_ssm mamba_rms_norm "
_MAMBA += "mamba_norm_before_gate mamba_ngroups mamba_headdim mamba_num_heads mamba_head_dim mamba_hidden_act "
_MAMBA += "mamba_ssm_cache_dtype ssm_state_size conv_kernel state_size n_mamba_heads kv_channels ssm_multipliers "
_MAMBA += "ssm_in_multiplier ssm_out_multiplier conv_bias"

_register(
    "qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid",
    _by_kind(_named("layer_types"), _delta_states, _grouped_kept),
    _LINEAR,
)
_register(
    "kimi_linear bailing_hybrid",
    _by_kind(_named("layer_types"), _kimi_states, lambda f, kind: _latent_kept(f, _mla(f), _reach(f, kind))),
    _LINEAR,
)
_register("qwen4_exp_text", _qwen4, _LINEAR + " indexer_head_dim ple_conv_kernel_size")
_register("bamba", _by_kind(_bamba_kinds, _bamba_states, _grouped_kept), _MAMBA)
_register("granitemoehybrid", _by_kind(_named("layer_types"), _bamba_states, _grouped_kept), _MAMBA)
_register("falcon_h1", _by_kind(_all("hybrid"), _bamba_states, _grouped_kept), _MAMBA)
_register(
    "jamba",
    _by_kind(
        _jamba_kinds,
        lambda f: _mamba(f, f.count("mamba_expand") * f.count("hidden_size"), "mamba_d_state", "mamba_d_conv"),
        _grouped_kept,
    ),
    _MAMBA,
)
_register(
    "mamba falcon_mamba",
    _by_kind(
        _all("linear_attention"),
        lambda f: _mamba(f, f.count("expand") * f.count("hidden_size"), "state_size", "conv_kernel"),
        _grouped_kept,
    ),
    _MAMBA,
)
_register(
    "mamba2",
    _by_kind(
        _all("linear_attention"),
        lambda f: _mamba2(
            f,
            f.count("num_heads"),
            f.count("head_dim"),
            f.count("n_groups"),
            f.count("state_size"),
            f.count("conv_kernel"),
        ),
        _grouped_kept,
    ),
    _MAMBA,
)
_register(
    "nemotron_h",
    _by_kind(
        _named("layers_block_type", None),
        lambda f: _mamba2(
            f,
            f.count("mamba_num_heads"),
            f.count("mamba_head_dim"),
            f.count("n_groups"),
            f.count("ssm_state_size"),
            f.count("conv_kernel"),
        ),
        _grouped_kept,
    ),
    _MAMBA,
)
_register(
    "zamba",
    _by_kind(
        _named("layers_block_type"),
        lambda f: (
            State("convolution", ((f.count("mamba_expand") * f.count("hidden_size"), f.count("mamba_d_conv")),)),
            State(
                "recurrent state",
                ((f.count("mamba_expand") * f.count("hidden_size"), f.count("mamba_d_state")),),
                "float32",
            ),
        ),
        _zamba_kept,
    ),
    _MAMBA,
)
_register(
    "zamba2",
    _by_kind(
        _named("layers_block_type"),
        lambda f: _mamba2(
            f,
            f.count("n_mamba_heads"),
            f.count("mamba_headdim"),
            f.count("mamba_ngroups"),
            f.count("mamba_d_state"),
            f.count("mamba_d_conv"),
        ),
        _zamba_kept,
    ),
    _MAMBA,
)
_register(
    "lfm2 lfm2_moe", _by_kind(_named("layer_types"), _lfm_states, _grouped_kept), "layer_types conv_L_cache conv_bias"
)
_register(
    "lfm3",
    _by_kind(_named("layer_types"), _lfm_states, _grouped_kept),
    "layer_types conv_L_cache conv_bias sliding_window",
)
_register(
    "minimax",
    _by_kind(_named("layer_types"), _minimax_states, _minimax_kept),
    "layer_types sliding_window linear_attn_alpha_factor linear_attn_beta_factor",
)
_register(
    "zaya",
    _by_kind(_named("layer_types"), _zaya_states, _grouped_kept),
    "layer_types sliding_window cca_time0 cca_time1",
)
_register(
    "inkling_text inkling2_text",
    _inkling,
    "layer_types conv_kernel_size sliding_window_size swa_num_attention_heads swa_num_key_value_heads swa_head_dim",
)
_register("recurrent_gemma", _recurrent_gemma, "attention_window_size lru_width conv1d_width")
_register("rwkv", _rwkv)
_register("xlstm", _xlstm)
_register("deepseek_v4", _deepseek_v4, "layer_types compress_rates sliding_window index_head_dim")
_register("xlnet", _xlnet)
_register("reformer", _reformer)

# Model types whose configs of before transformers 5 say some of this by other fields, which transformers translates.
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

# Model types whose class has a number of its own for a field that a config leaves out. For all others it means: as many
# K and V heads as queries, a head as wide as its share of the hidden size, no window.
_OWN_KV_HEADS = frozenset(
    [
        "axk1",
        "axk2",
        "bailing_hybrid",
        "bamba",
        "beam",
        "bitnet",
        "cwm",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note_text",
        "emu3_text_model",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "falcon_h1",
        "flint",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_oss",
        "granite_swa",
        "helium",
        "hy_v3",
        "internlm3",
        "iquestcoder",
        "jamba",
        "kolibri1",
        "laguna",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "llama4_text",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "mllama_text_model",
        "nemotron_h",
        "phi4_multimodal",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen4_exp_text",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "zaya",
    ]
)
_OWN_HEAD_DIM = frozenset(
    [
        "afmoe",
        "beam",
        "cohere2_moe",
        "cwm",
        "ernie4_5",
        "flint",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "gpt_oss",
        "helium",
        "hrm_text",
        "hy_v3",
        "internlm3",
        "iquestcoder",
        "kolibri1",
        "laguna",
        "lfm3",
        "llama4_text",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral3",
        "nemotron_h",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp_text",
        "seed_oss",
        "solar_open",
        "vaultgemma",
        "zaya",
    ]
)
_OWN_WINDOW = frozenset(["mistral", "moshi", "qwen3_moe"])
_SHARING = frozenset({"gemma3n_text", "gemma4_text", "gemma4_unified_text"})
