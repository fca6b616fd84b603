"""The fields of a config, each checked where it is asked for; what is missing or wrong is an error that names it."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from kvblocks.config import itemsize
from kvblocks.errors import MissingField, UnknownModel
from kvblocks.formats import dtype_name

__all__ = [
    "DECIDING",
    "LAYERS",
    "MOST_LAYERS",
    "WIDTHS",
    "Fields",
    "defaults_note",
    "model_dtype",
    "object_in",
    "quiet_transformers",
    "refuse_no_objects",
]

MOST_LAYERS = 4096
LAYERS: tuple[str, ...] = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "layers")
LAYERS += ("decoder_layers", "layers_block_type")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_dim")
# Fields of a config that decide how large a cache is, where a reader knows them. One that it does not know is an error.
DECIDING = re.compile(
    r"^(sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size|layer_types|"
    r"layers_block_type|kv_lora_rank|num_kv_shared_layers|kv_sharing_modes|cross_attention_layers|per_layer_config|"
    r"(index|indexer)_(head_dim|types)|(mamba|ssm|linear|conv|cca|lru)_\w*|\w*conv\w*kernel\w*|state_size|"
    r"compress_rates|swa_\w+|global_head_dim|num_global_key_value_heads|num_kv_heads|kv_channels|"
    r"num_key_value_groups|num_key_value_heads_per_layer|use_cla)$"
)


class Fields:
    """The numbers of a config, each checked where it is used.

    Args:
        model_type: of the config.
        values: its fields.
        mla: what latent attention keeps: "latent", or "expanded" heads of K and V.
        defaults: those of the fields that the file leaves out, and that are their type's defaults.

    Attributes:
        taken: the defaults that were asked for.
    """

    def __init__(
        self,
        model_type: str,
        values: Mapping[str, Any],
        mla: str = "latent",
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.model_type = model_type
        self.values = values
        self.mla = mla
        self.defaults = defaults
        self.taken: dict[str, Any] = {}
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
        return self.with_values({**self.values, "per_layer_config": None, **self._overrides[index]})

    def with_values(self, values: Mapping[str, Any]) -> "Fields":
        """Other values of the same config; what is taken from the type is known to both."""
        fields = Fields(self.model_type, values, self.mla, self.defaults)
        fields.taken = self.taken
        return fields

    def has(self, name: str) -> bool:
        """Whether the config has the field, with a value other than None."""
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value, which may be None; MissingField where the config has no such field."""
        if name not in self.values:
            raise MissingField(self.model_type, name)
        if name in self.defaults:
            self.taken[name] = self.values[name]
        return self.values[name]

    def first(self, names: Iterable[str]) -> int | None:
        """The first of these fields that holds an integer; None where none does."""
        found = (name for name in names if type(self.values.get(name)) is int)
        return next((self.get(name) for name in found), None)

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


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config names; None where it names none.

    Raises:
        UnknownModel: it names one that is none.
    """
    for field in ("dtype", "torch_dtype"):
        given = config.get(field)
        if given is None:
            continue
        try:
            name = dtype_name(given)
            itemsize(name)
        except TypeError:
            raise UnknownModel(
                f"{config.get('model_type')}.{field}={given!r:.60} is not the name of a dtype, like 'bfloat16'; "
                f"correct it in the config, or remove it"
            ) from None
        return name
    return None


def object_in(config: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    """A field that holds an object; None where there is no such field, or null. UnknownModel where it holds another."""
    value = config.get(field)
    if value is None or isinstance(value, Mapping):
        return value
    raise UnknownModel(f"{field}={value!r:.60} of the config is of type {type(value).__name__}; it must be an object")


def refuse_no_objects(config: Mapping[str, Any]) -> None:
    """Raises UnknownModel for a field that must hold an object and does not, which transformers does not name."""
    for half in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for field in half:
            if str(field).endswith("_config") or field in ("rope_scaling", "rope_parameters"):
                object_in(half, field)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings, which matter only to those who run the model. Import transformers before."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def defaults_note(model_type: str, taken: Mapping[str, Any]) -> list[str]:
    """A sentence that names what is taken from a type; none where nothing is."""
    if not taken:
        return []
    named = ", ".join(f"{name}={value}" if type(value) is int else name for name, value in sorted(taken.items()))
    return [f"no fields of the config, and filled in as transformers does for model_type={model_type!r}: {named}"]


# Older names, as transformers maps them.
_SYNONYMS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
