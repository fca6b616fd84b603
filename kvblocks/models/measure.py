"""What a model keeps, measured: built without memory, run for a few lengths, and read off its cache, layer by layer.

For model types that no reader knows. A measurement counts only if it also predicts, to the byte, what the model keeps
at a length that it was not taken from; otherwise it is an error. Imports torch and transformers when it runs.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from kvblocks.config import Window, tensor_itemsize
from kvblocks.errors import UnknownModel
from kvblocks.formats import format_of
from kvblocks.models.fields import (
    DECIDING,
    LAYERS,
    WIDTHS,
    defaults_note,
    model_dtype,
    quiet_transformers,
    refuse_no_objects,
)
from kvblocks.models.shapes import Kept, Layer, ModelCache, State

__all__ = ["NOTE", "measure", "tensors_held"]

NOTE = "measured from transformers: no table knows this model_type; its cache was filled without memory and read off"
_SHORT, _LONG, _CHECKED, _ENCODED = 6, 7, 11, 5  # tokens
_CACHES = ("cache", "past_key_values", "cache_params")  # as transformers 5.24 calls it, and as it did before
_LONGEST_WINDOW = 4096  # beyond which a window is not filled to see where it ends
# Layers of transformers' caches that grow by the token, keep a window, keep a state, or keep nothing.
_PLAIN_LAYERS = frozenset(
    [
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "DynamicIndexedLayer",
        "DummyLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    ]
)

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_heads", "decoder_attention_heads")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_USUAL = ("num_hidden_layers", "num_attention_heads", "hidden_size")
_APART = re.compile(
    "mamba|ssm|linear|conv_|recurrent|layer_types|type_list|pattern|lora_rank|window|chunk|mixer|layer_group|_cla$|"
    "^cla_|attention_head_dim"
)
_OTHER = "give the numbers instead: num_layers, num_kv_heads, head_dim"


def measure(config: Mapping[str, Any], name: str | None, defaults: Mapping[str, Any] = _NOTHING) -> ModelCache:
    """What transformers' model of a config keeps; `defaults` are the fields that it has from its type.

    Raises:
        UnknownModel: the installed transformers has no such model, cannot build or run it without memory, or keeps
            something that the lengths it was run for do not explain.
    """
    model_type = str(config["model_type"])
    other = _OTHER + _usual(config)
    try:
        import torch

        made, model = _built(config)
    except ModuleNotFoundError as error:
        raise UnknownModel(
            f"model_type={model_type!r} is in no table of the planner, and to measure it {error.name} is needed; "
            f'run: pip install "kvblocks[plan]", or {other}'
        ) from None
    except UnknownModel:
        raise
    except Exception as error:  # whatever a model's constructor raises
        refuse_no_objects(config)
        raise UnknownModel(f"transformers cannot build {model_type}: {_one_line(error)}; {other}") from error

    def held(tokens: int) -> Any:
        ids = {"input_ids": torch.zeros((1, tokens), dtype=torch.long, device="meta")}
        if made.is_encoder_decoder:
            ids["decoder_input_ids"] = ids["input_ids"]
            ids["input_ids"] = torch.zeros((1, _ENCODED), dtype=torch.long, device="meta")
        with quiet_transformers(), torch.no_grad():
            output = model(**ids, use_cache=True)
        found = next((output[name] for name in _CACHES if output.get(name) is not None), None)
        if found is None:
            raise UnknownModel("it hands no cache back")
        return found

    try:
        layers = _layers(held(_SHORT), held(_LONG))
        lengths = {_CHECKED}
        for kept in (kept for layer in layers for kept in layer.kept):
            if kept.reach is not None and kept.reach.size <= _LONGEST_WINDOW:
                lengths.add(kept.reach.size + 2)
        for tokens in sorted(lengths):
            real = sum(tensor.numel() * tensor.element_size() for tensor in tensors_held(held(tokens), set()))
            read_off = _bytes(layers, tokens)
            if real != read_off:
                raise UnknownModel(f"{tokens} tokens take {real} bytes, and what was read off explains {read_off}")
    except Exception as error:  # whatever a model's forward pass raises
        raise UnknownModel(
            f"model_type={model_type!r} is in no table of the planner, and transformers' model cannot be measured "
            f"without memory: {_one_line(error)}; {other}"
        ) from error
    text = made.get_text_config(decoder=True).to_dict()
    decides = (field for field in defaults if DECIDING.match(field) or field in (*LAYERS, *WIDTHS, *_HEADS))
    taken = {field: defaults[field] for field in decides if defaults[field] not in (None, False, [], {})}
    return ModelCache(
        name or model_type,
        layers,
        num_query_heads=_whole(text.get("num_attention_heads")),
        max_seq_len=_whole(text.get("max_position_embeddings")),
        dtype=model_dtype(config) or model_dtype(text),
        notes=(NOTE, *defaults_note(model_type, taken)),
        model_type=model_type,
    )


def _built(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config and the model, in bfloat16 on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kinds: Any = CONFIG_MAPPING
    if config["model_type"] not in kinds:
        raise UnknownModel(
            f"model_type={config['model_type']!r} is not an architecture that the planner knows, nor the installed "
            f"transformers; {_OTHER}{_usual(config)}"
        )
    plain = {field: value for field, value in config.items() if field != "quantization_config"}
    with quiet_transformers():
        made = kinds[config["model_type"]].from_dict(plain)
    # Of types that are registered as both, the causal one keeps the same and needs nothing of an image's.
    makers: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM]
    if made.is_encoder_decoder:
        makers.reverse()
    maker = next((maker for maker in makers if type(made) in maker._model_mapping), None)
    if maker is None:
        raise UnknownModel(
            f"model_type={config['model_type']!r} makes no text, so that it keeps no K and V; plan the model whose "
            f"text half reads what it sees or hears"
        )
    with quiet_transformers(), torch.device("meta"):
        model = maker.from_config(made, dtype=torch.bfloat16, attn_implementation="eager")
    model.train(False)
    return made, model


def _usual(config: Mapping[str, Any]) -> str:
    """What the numbers are where the config, or one in it, has the fields that most have, and attends as most do.

    Empty where it does not.
    """
    for half in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        layers, heads, hidden = (_whole(half.get(name)) for name in _USUAL)
        apart = any(
            value and _APART.search(str(name)) for name, value in half.items() if not isinstance(value, Mapping)
        )
        if layers and heads and hidden and not apart and half.get("is_decoder") is not False:
            kv_heads = _whole(half.get("num_key_value_heads")) or heads
            dim = _whole(half.get("head_dim")) or hidden // heads
            numbers = f"num_layers={layers}, num_kv_heads={kv_heads}, head_dim={dim}"
            return f" (by its config {numbers}, if it attends as most do)"
    return ""


def _layers(short: Any, long: Any) -> tuple[Layer, ...]:
    """The layers of a cache, from what it holds at two lengths."""
    own, cross = _halves(short)
    longer, _ = _halves(long)
    layers = []
    for i, (one, two) in enumerate(zip(own, longer, strict=True)):
        kind = type(one).__name__
        if kind not in _PLAIN_LAYERS:
            raise UnknownModel(f"its layer {i} is a {kind}, which grows in a way of its own")
        window = getattr(one, "sliding_window", None)
        kept, states = [], []
        for (label, a), (_, b) in zip(_named(one), _named(two), strict=True):
            if a.shape == b.shape:
                if label in _GROWING:
                    raise UnknownModel(f"its {label} in layer {i} does not grow from {_SHORT} tokens to {_LONG}")
                states.append(_state(label, a))
            else:
                kept.append(_kept(label, a, _SHORT, b, _LONG, None if window is None else Window(int(window))))
        across = tuple(_kept(label, a, _ENCODED) for label, a in _named(cross[i])) if cross else ()
        layers.append(Layer(i, "sliding_attention" if window else "full_attention", tuple(kept), tuple(states), across))
    return tuple(layers)


def _halves(cache: Any) -> tuple[list[Any], list[Any]]:
    """The layers that hold the model's own tokens, and those that hold an encoder's."""
    cross = getattr(cache, "cross_attention_cache", None)
    own = cache if cross is None else cache.self_attention_cache
    if not hasattr(own, "layers"):
        raise UnknownModel(f"it hands back a {type(cache).__name__}, which has no layers")
    return list(own.layers), [] if cross is None else list(cross.layers)


def _named(layer: Any) -> list[tuple[str, Any]]:
    """The tensors of a layer by name, except the one that holds the width of its window."""
    import torch

    found = []
    for name, value in sorted(vars(layer).items()):
        if name == "_sliding_window_tensor":
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, tensor in inner:
            if isinstance(tensor, torch.Tensor):
                found.append((f"{_NAMES.get(name, name.replace('_', ' '))}{key or ''}", tensor))
    return found


_NAMES: dict[str, str] = {
    "keys": "K",
    "values": "V",
    "conv_states": "convolution",
    "recurrent_states": "recurrent state",
}
_NAMES |= {"indexer_keys": "indexer key"}
_GROWING = ("K", "V", "indexer key")


def _kept(label: str, a: Any, tokens: int, b: Any = None, more: int = 0, reach: Window | None = None) -> Kept:
    """A tensor that grows along one axis, one step a token; of the axes before the last the first is the batch."""
    if a.dim() < 3 or a.shape[0] != 1 or a.shape[-2] != tokens:
        raise UnknownModel(f"its {label} has the shape {tuple(a.shape)} after {tokens} tokens")
    if b is not None and tuple(b.shape) != (*a.shape[:-2], more, a.shape[-1]):
        raise UnknownModel(f"its {label} has the shape {tuple(b.shape)} after {more} tokens")
    heads = a[..., 0, 0].numel()
    return Kept(label, heads, a.shape[-1], reach, dtype=_own_dtype(a))


def _state(label: str, tensor: Any) -> State:
    if label.startswith("convolution"):
        columns = tensor.shape[-1]
        return State(label, ((tensor.numel() // columns, 1),), _own_dtype(tensor), kernel=columns)
    return State(label, ((1, tensor.numel()),), _own_dtype(tensor))


def _own_dtype(tensor: Any) -> str | None:
    """None where a tensor follows the model, which is built in bfloat16."""
    name = str(tensor.dtype).removeprefix("torch.")
    return None if name == "bfloat16" else name


def _bytes(layers: tuple[Layer, ...], tokens: int) -> int:
    """What transformers' cache takes by what was read off."""
    format, total = format_of("bfloat16"), 0
    for layer in layers:
        total += sum(kept.entry_bytes(format) * kept.entries(tokens, "transformers") for kept in layer.kept)
        total += sum(kept.entry_bytes(format) * _ENCODED for kept in layer.cross)
        for state in layer.states:
            numbers = sum(units * each for units, each in state.kept_parts("transformers"))
            total += numbers * (2 if state.dtype is None else tensor_itemsize(state.dtype))
    return total


def tensors_held(held: Any, seen: set[int]) -> Iterator[Any]:
    """Every tensor of a cache once, however deep in it, except those that hold the width of a window."""
    import torch

    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from tensors_held(value, seen)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors_held(value, seen)
    elif type(held).__module__.startswith("transformers.") and "configuration" not in type(held).__module__:
        for name, value in getattr(held, "__dict__", {}).items():
            if name != "_sliding_window_tensor":
                yield from tensors_held(value, seen)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
