"""Where the numbers of a plan come from: a config as an object, a dict, a file, a folder or a hub id, or plain numbers.

Torch and transformers are imported only where a config leaves out what transformers fills in.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvblocks.config import Chunk, Window
from kvblocks.errors import MissingField, UnknownModel
from kvblocks.models.architectures import MODEL_TYPES, TRANSLATED, read_fields
from kvblocks.models.fields import (
    LAYERS,
    MOST_LAYERS,
    WIDTHS,
    Fields,
    model_dtype,
    object_in,
    quiet_transformers,
    refuse_no_objects,
)
from kvblocks.models.hub import HubModel, hub_model
from kvblocks.models.shapes import Layer, ModelCache, Reach, attention
from kvblocks.sizes import checked_integer

if TYPE_CHECKING:
    from kvblocks.models.gguf_file import GgufFile

__all__ = ["Source", "cache_dtype", "quantization_config", "read", "uniform"]

_NUMBERS = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "num_attention_heads", "reaches", "dtype")
_DEEPEST = 8  # text_configs inside each other
_PARAMS = {"dim", "n_layers", "n_heads"}  # in every params.json of Meta's and Mistral's
_CLASSES = {name.replace("_", "").replace("-", "").lower(): name for name in MODEL_TYPES}  # as classes are named
_CONFIG_FILES = ("config.json", "params.json")
_SINCE_5 = "transformers_version of 5 or more"
# Fields of older configs by which transformers fills in others.
_OLDER = {
    "linear_attn_config": ("linear_conv_kernel_dim", "linear_head_dim", "linear_num_heads", "layer_types"),
    "compress_ratios": ("compress_rates", "layer_types"),
    "full_attention_interval": ("layer_types",),
    "sliding_window_size": ("sliding_window",),
}


class Source:
    """A model to plan for.

    Args:
        config: its config as a dict, text half and all; None for plain numbers and GGUF files.
        read: makes the `ModelCache` for `mla`, "latent" or "expanded"; called once for each.
        origin: the folder, the model on the hub or the GGUF file that has the weights; None where there is none.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        read: Callable[[str], ModelCache],
        origin: "Path | HubModel | GgufFile | None" = None,
    ) -> None:
        self.config = config
        self.read = cache(read)
        self.origin = origin


def read(model: Any) -> Source:
    """The model that a caller names.

    Raises:
        UnknownModel: an architecture or a field that the planner does not know, or a field that is missing.
        FileNotFoundError, ValueError: no such config, or none that is JSON.
        TypeError: not something that names a model.
    """
    if isinstance(model, ModelCache):
        return Source(None, lambda _: model)
    if isinstance(model, Mapping):
        if "model_type" in model:
            return _config(dict(model), None)
        if "num_layers" in model:
            shape = uniform(**_checked_numbers(model))
            return Source(None, lambda _: shape)
        raise UnknownModel(
            f"a dict of {', '.join(map(str, model)) or 'nothing'} has neither model_type (for a config) "
            f"nor num_layers (for numbers)"
        )
    if isinstance(model, str | os.PathLike):
        if Path(model).suffix == ".gguf" and os.path.isfile(model):
            from kvblocks.models.gguf_file import GgufFile

            file = GgufFile(Path(model))
            return Source(None, file.read, file)
        path, name, origin = _config_file(model)
        source = _config(_json(path), name)
        return Source(source.config, source.read, origin)
    to_dict = getattr(model, "to_dict", None)
    if getattr(model, "model_type", None) is not None and callable(to_dict):
        return _config(to_dict(), None, whole=True)
    raise TypeError(
        f"model={model!r:.60} is of type {type(model).__name__}; give a config, a folder, a file, a hub id, numbers"
    )


def uniform(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    num_attention_heads: int | None = None,
    reaches: Any = None,
    dtype: str | None = None,
) -> ModelCache:
    """A model from plain numbers.

    Args:
        num_layers, num_kv_heads, head_dim: as they are called in configs.
        v_head_dim: where V's differs from K's.
        num_attention_heads: to check tensor parallelism by, and to say which K and V heads a device keeps.
        reaches: how far each layer attends, None, a `Window` or a `Chunk` each; by default all attend to everything.
        dtype: that the model computes in.

    Raises:
        TypeError, ValueError: numbers that are no positive integers, queries that do not divide by K and V heads, or
            another number of reaches than layers.
    """
    numbers = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    numbers |= {} if v_head_dim is None else {"v_head_dim": v_head_dim}
    numbers |= {} if num_attention_heads is None else {"num_attention_heads": num_attention_heads}
    checked = {
        name: checked_integer(name, value, 1, MOST_LAYERS if name == "num_layers" else 2**31 - 1)
        for name, value in numbers.items()
    }
    num_layers, num_kv_heads, head_dim = (checked[name] for name in ("num_layers", "num_kv_heads", "head_dim"))
    v_head_dim, num_attention_heads = checked.get("v_head_dim"), checked.get("num_attention_heads")
    if num_attention_heads is not None and num_attention_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads={num_attention_heads} does not divide by num_kv_heads={num_kv_heads}; each head of K "
            f"and V serves equally many queries"
        )
    if reaches is not None and (isinstance(reaches, str | bytes) or not isinstance(reaches, Sequence)):
        raise TypeError(
            f"reaches={reaches!r:.60} is of type {type(reaches).__name__}; give a list of None, a Window or a Chunk "
            f"for each layer"
        )
    far: list[Reach] = [None] * num_layers if reaches is None else list(reaches)
    if len(far) != num_layers:
        raise ValueError(f"reaches names {len(far)} layers; num_layers is {num_layers}")
    for reach in far:
        if reach is not None and not isinstance(reach, Window | Chunk):
            raise TypeError(f"reaches holds {reach!r}; give None, a Window or a Chunk for each layer")
    v_dim = head_dim if v_head_dim is None else v_head_dim
    layers = [
        Layer(
            i,
            "full_attention" if reach is None else "sliding_attention",
            attention(num_kv_heads, head_dim, v_dim, reach, queries=num_attention_heads),
        )
        for i, reach in enumerate(far)
    ]
    return ModelCache("model", tuple(layers), num_query_heads=num_attention_heads, dtype=dtype)


def _checked_numbers(model: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [str(name) for name in model if name not in _NUMBERS]
    if unknown:
        raise UnknownModel(f"{', '.join(unknown)}: not known among plain numbers; these are {', '.join(_NUMBERS)}")
    missing = [name for name in _NUMBERS[:3] if name not in model]
    if missing:
        raise UnknownModel(f"plain numbers need {', '.join(missing)} too")
    return dict(model)


def _config_file(model: "str | os.PathLike[str]") -> tuple[Path, str, Path | HubModel | None]:
    """The config.json of a folder, a file, or a hub id; a name for it; and where its weights are."""
    path = Path(model)
    try:
        there = path.exists()
    except OSError as error:  # a name that no file system takes, or a folder that must not be looked into
        raise FileNotFoundError(f"{os.fspath(model):.60} cannot be looked up: {error.strerror}") from None
    if there and path.is_dir():
        file = next((path / name for name in _CONFIG_FILES if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has no config.json")
        return file, path.resolve().name, path
    if path.is_file():
        if path.name not in _CONFIG_FILES:
            return path, path.stem, None
        return path, path.resolve().parent.name, path.parent
    text = os.fspath(model)
    named = None if path.suffix == ".json" else hub_model(text)
    if named is None:
        raise FileNotFoundError(f"{text} is neither a folder with a config.json nor a file")
    return named.file("config.json"), text, named


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no text, no JSON, or a number with more digits than Python reads
        raise ValueError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} nests deeper than any config does") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; a config is an object with fields")
    return found


def _config(config: dict[str, Any], name: str | None, *, whole: bool = False) -> Source:
    """The model of a config; `whole` where transformers has already filled in what it leaves out."""
    strange = next((key for key in config if not isinstance(key, str)), None)
    if strange is not None:
        raise UnknownModel(f"{name or 'the config'} has the key {strange!r:.60}; fields have names")
    config = given = {**config, "model_type": _model_type(config, name)}
    for named in (cache_dtype, model_dtype):
        named(config)  # what is wrong in it is named before transformers stumbles over it
    model_dtype(_innermost(config))
    problem: UnknownModel
    try:
        text = _text_half(config)
        known = text["model_type"] in MODEL_TYPES
        if whole or (known and (text["model_type"] not in TRANSLATED or _written_by(config) >= 5)):
            return _read(config, name, text)
        problem = MissingField(text["model_type"], _SINCE_5 if known else "text_config")
    except UnknownModel as error:
        # transformers fills in what is missing, and translates fields of older configs.
        if whole or not (isinstance(error, MissingField) or TRANSLATED.intersection(_model_types(config))):
            raise
        problem, known = error, True
    config = _completed(config, problem, name, known=known)
    text = _text_half(config)
    if config is given:  # transformers does not know it either
        return _read(config, name, text)
    half = _innermost(given)
    defaults = _defaults(half, text)
    if half is given or half.keys() <= {"model_type"}:
        _refuse_sizeless(text, defaults, name or "the config", given["model_type"])
    return _read(config, name, text, defaults)


def _read(
    config: dict[str, Any],
    name: str | None,
    text: dict[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Source:
    """The model of a config whose text half is `text`, by the reader of its type, or measured where there is none."""

    def read_text(mla: str) -> ModelCache:
        return read_fields(Fields(text["model_type"], text, mla, defaults), name)

    if text["model_type"] not in MODEL_TYPES:
        from kvblocks.models.measure import measure

        shape = measure(config, name, defaults)
        return Source(config, lambda _: shape)  # both ways to keep latent attention are what transformers keeps
    source = Source(config, read_text)
    source.read("latent")
    return source


def _refuse_sizeless(text: Mapping[str, Any], defaults: Mapping[str, Any], name: str, model_type: str) -> None:
    """Raises UnknownModel where a completed text half has its number of layers, or its width, from its type.

    What else comes from there is named in a note of the plan. A text half inside another config may leave out these two
    as well, and has them in the note: transformers writes it without what equals the defaults.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kinds: Any = CONFIG_MAPPING
    own: Mapping[str, Any] = {}
    with quiet_transformers(), suppress(Exception):  # a type without defaults
        own = kinds[text["model_type"]]().to_dict()  # what other files call these things is carried along unread
    for sizes in (LAYERS, WIDTHS):
        there = [size for size in sizes if size in text and size in (own or text)]
        if there and defaults.keys() >= {*there}:
            half = "" if text["model_type"] == model_type else ", nor a text_config that would"
            raise UnknownModel(
                f"{name} of model_type={model_type!r} gives no {there[0]}{half}; a number of layers and a width are "
                f"never taken from the defaults of a type: give the whole config of the model"
            )


def _defaults(given: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a completed text half that are its type's defaults.

    They are not as the file gives them, and as they are in a config that gives nothing, or the number of layers alone.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kinds: Any = CONFIG_MAPPING
    older = {name for field, names in _OLDER.items() if given.get(field) is not None for name in names}
    told, empty, alike = {*given} | older, {}, {}
    with quiet_transformers(), suppress(Exception):  # a type without defaults, or whatever its validators raise
        kind = kinds[text["model_type"]]
        told |= {ours for ours, theirs in kind.attribute_map.items() if theirs in given}
        told |= {theirs for ours, theirs in kind.attribute_map.items() if ours in given}
        empty = alike = kind().to_dict()
        alike = kind(**{name: given[name] for name in LAYERS if name in given and name in empty}).to_dict()
    return {
        name: value
        for name, value in text.items()
        if (name not in told and (name == "num_key_value_heads" or value == alike.get(name, value)))
        or (name not in older and given.get(name, value) != value == empty.get(name))
    }


def _model_type(config: Mapping[str, Any], name: str | None) -> str:
    """What says what the other fields mean: the model_type; where nobody knows that, the class that runs the model."""
    given = config.get("model_type")
    if given is not None and not isinstance(given, str):
        raise UnknownModel(f"{name or 'the config'} has no model_type but {given!r:.60}; it must be a name")
    classes = config.get("architectures")
    named = [str(one).partition("For")[0].lower() for one in classes] if isinstance(classes, list | tuple) else []
    if given == "git" and "grok1" in named:
        return "grok-1"  # Grok 2 calls itself git, which is a captioner of images
    if given in MODEL_TYPES or _inner(config) is not None:
        return given or ""
    found = next((_CLASSES[name] for name in named if name in _CLASSES), None)
    if found is not None:
        return found
    if given is None and config.keys() >= _PARAMS:
        return "params"
    if given is None and config.get("peft_type") is not None:
        raise UnknownModel(
            f"{name or 'the config'} is an adapter's (peft_type={config['peft_type']!r:.60}), which keeps no cache "
            f"of its own; give the config of its base model, {config.get('base_model_name_or_path')!r:.200}"
        )
    if given is None:
        raise UnknownModel(
            f"{name or 'the config'} has no model_type, which says what its other fields mean; give a model's "
            f"config.json or params.json"
        )
    return given


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config that a model that sees or hears holds for its text half."""
    halves = (object_in(config, name) for name in ("text_config", "llm_config", "language_config", "thinker_config"))
    return next((half for half in halves if half is not None), None)


def _innermost(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text half of a text half, and so on; the config itself where it has none."""
    while (inner := _inner(config)) is not None:
        config = inner
    return config


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config, or its text half, says of how its weights are quantized; None where it says nothing.

    Raises:
        UnknownModel: what it says is no object.
    """
    return object_in(config, "quantization_config") or object_in(config, "compression_config")


def cache_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a quantized checkpoint asks for K and V in; None where it asks for none that is known.

    compressed-tensors and ModelOpt write `kv_cache_scheme`, ModelOpt also `kv_cache_quant_algo`.
    """
    for _ in range(_DEEPEST):
        given = quantization_config(config)
        if given:
            scheme = object_in(given, "kv_cache_scheme")
            if scheme and scheme.get("num_bits") == 8:
                return {"float": "float8_e4m3fn", "int": "int8"}.get(str(scheme.get("type")))
            return "float8_e4m3fn" if given.get("kv_cache_quant_algo") == "FP8" else None
        inner = _inner(config)
        if inner is None:
            return None
        config = inner
    return None


def _written_by(config: Mapping[str, Any]) -> int:
    """The major version of transformers that saved a config; 0 where it does not say."""
    major = str(config.get("transformers_version") or "").partition(".")[0]
    return int(major) if major.isdecimal() else 0


def _model_types(config: Mapping[str, Any]) -> set[Any]:
    text = _inner(config)
    return {config["model_type"]} | ({text.get("model_type")} if text is not None else set())


def _text_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text half, which several kinds of models hold inside theirs."""
    dtype: dict[str, Any] = {}
    for _ in range(_DEEPEST):
        model_type = config["model_type"]
        own = {name: config[name] for name in ("dtype", "torch_dtype") if config.get(name) is not None}
        dtype = own or dtype
        inner = _inner(config)
        if model_type in MODEL_TYPES or inner is None:
            return {**config, **dtype}
        if not isinstance(inner.get("model_type"), str):
            raise MissingField(model_type, "text_config.model_type")
        config = {**inner, "model_type": _model_type(inner, None)}
    raise UnknownModel(f"the config holds more than {_DEEPEST} text_configs, each inside another; no model does")


def _completed(config: dict[str, Any], missing: UnknownModel, name: str | None, *, known: bool) -> dict[str, Any]:
    """The config with what transformers fills in; as it is where nobody knows the model_type."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ModuleNotFoundError:
        if not known:
            return config
        raise UnknownModel(
            f"{missing}; transformers knows what it fills in, and is not installed. "
            f'Add the field, or run: pip install "kvblocks[plan]"'
        ) from None
    kinds: Any = CONFIG_MAPPING
    if config["model_type"] not in kinds:
        if not known:
            return config
        raise UnknownModel(f"{missing}, and the installed transformers has no such model_type")
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")  # it is asked to read older names, so it need not warn of them
            completed: dict[str, Any] = kinds[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # its validators raise whatever they like
        refuse_no_objects(config)
        reason = " ".join(str(error).split())
        if not (isinstance(missing, MissingField) and missing.name == _SINCE_5):
            raise UnknownModel(f"{missing}, and transformers refuses the config: {reason}") from error
        raise UnknownModel(
            f"transformers refuses the config of model_type={config['model_type']!r}: {reason}; correct it, or give "
            f"the numbers instead: num_layers, num_kv_heads, head_dim"
        ) from error
    return completed
