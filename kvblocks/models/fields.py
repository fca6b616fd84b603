"""The fields of a config, each checked where it is asked for; what is missing or wrong is an error that names it."""

from collections.abc import Mapping
from typing import Any

from kvblocks.errors import MissingField, UnknownModel

__all__ = ["MOST_LAYERS", "Fields"]

MOST_LAYERS = 4096


class Fields:
    """The numbers of a config, each checked where it is used.

    Args:
        model_type: of the config.
        values: its fields.
        mla: what latent attention keeps: "latent", or "expanded" heads of K and V.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any], mla: str = "latent") -> None:
        self.model_type = model_type
        self.values = values
        self.mla = mla
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
        own = {**self.values, "per_layer_config": None, **self._overrides[index]}
        return Fields(self.model_type, own, self.mla)

    def has(self, name: str) -> bool:
        """Whether the config has the field, with a value other than None."""
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


# Older names, as transformers maps them.
_SYNONYMS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
