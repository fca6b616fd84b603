"""What a model keeps by the metadata of its GGUF file, read by the `gguf` package, which is imported only here.

Keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Which layers have a window is written in
the file by newer converters; for the architectures of `_PERIODS` it is the rule that llama.cpp has for them.
"""

import re
from pathlib import Path
from typing import Any

from kvblocks.config import Chunk, Window
from kvblocks.errors import UnknownModel
from kvblocks.models.families import grouped_heads, latent_kept
from kvblocks.models.fields import Fields
from kvblocks.models.shapes import Kept, Layer, ModelCache, Reach

__all__ = ["GgufFile"]

# One full layer in so many, the last of each, where a file gives a window and no pattern.
_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "llama4": 4}
_CHUNK = Chunk(8192)  # Llama 4's, which files do not name; those without chunks name a window of 0
# What a file may say that decides how large the cache is, and that is not read here.
_OTHER = re.compile(
    r"^(ssm|wkv|shortconv|kda)\.|^decoder_block_count$|shared_kv_layers|indexer|temporal_pattern|full_attention_interval|_swa$"
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GgufFile:
    """A GGUF file, its metadata read.

    Args:
        path: of the file, or of the first of its parts.

    Raises:
        ModuleNotFoundError: gguf is not installed.
        UnknownModel: a file that is no GGUF file, or names no architecture.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f'{path} is a GGUF file, and gguf reads its metadata; run: pip install "kvblocks[gguf]", or give the '
                f"model's config.json",
                name="gguf",
            ) from None
        self._reader_of: Any = GGUFReader
        self.path = path
        try:
            fields = GGUFReader(str(path)).fields
            self.values: dict[str, Any] = {key: field.contents() for key, field in fields.items()}
        except Exception as error:  # of many kinds; a file may be cut off anywhere
            raise UnknownModel(f"{path} is no GGUF file that can be read: {' '.join(str(error).split())}") from error
        self.architecture = self.values.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise UnknownModel(f"{path} has no general.architecture, which says what its other fields mean")

    def weight_bytes(self) -> int:
        """Bytes of all tensors, those of the other parts of a split file included.

        Raises:
            FileNotFoundError: a part is not beside the first.
        """
        split = _PART.search(self.path.name)
        paths = [self.path]
        if split is not None:
            stem, number = self.path.name[: split.start()], int(split[2])
            paths = [self.path.with_name(f"{stem}-{i:05}-of-{number:05}.gguf") for i in range(1, number + 1)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there, one of the parts of {self.path.name}")
        return sum(int(tensor.n_bytes) for path in paths for tensor in self._reader_of(str(path)).tensors)

    def read(self, mla: str) -> ModelCache:
        """What the model keeps; `mla` as for `plan`.

        Raises:
            UnknownModel: a field that decides how large the cache is and is missing, wrong, or not known here.
        """
        prefix = f"{self.architecture}."
        own = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        for key, value in own.items():
            if _OTHER.search(key) and value not in (0, None, False, []):
                raise UnknownModel(
                    f"{self.path}: the planner does not know what {prefix}{key}={value!r:.60} means in a GGUF file; "
                    f"give the model's config.json instead"
                )
        f = Fields(f"{self.architecture} (GGUF)", own, mla)
        if own.get("attention.causal") is False:
            raise UnknownModel(
                f"{self.path}: {prefix}attention.causal is false: a model that attends both ways keeps no K and V"
            )
        number = f.layers("block_count")
        if f.has("nextn_predict_layers"):  # counted among the blocks, and without K and V until they are used
            number -= f.count("nextn_predict_layers", 0)
        reach: Reach = _CHUNK if self._chunked(f) else Window(f.count(_WINDOW)) if f.values.get(_WINDOW) else None
        near = self._windows(f, number)
        layers = tuple(self._layer(f, i, reach if near[i] else None) for i in range(number))
        return ModelCache(
            str(self.values.get("general.name") or self.path.stem),
            layers,
            num_query_heads=own["attention.head_count"] if isinstance(own.get("attention.head_count"), int) else None,
            max_seq_len=f.count("context_length") if f.has("context_length") else None,
        )

    def _windows(self, f: Fields, number: int) -> list[bool]:
        """Which layers do not attend to everything."""
        if not (f.values.get(_WINDOW) or self._chunked(f)):
            return [False] * number
        pattern = f.values.get(f"{_WINDOW}_pattern", _PERIODS.get(str(self.architecture)))
        if isinstance(pattern, list) and len(pattern) in (number, f.count("block_count")):
            return [bool(windowed) for windowed in pattern[:number]]
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
            return [(i + 1) % pattern != 0 for i in range(number)]
        raise UnknownModel(
            f"{self.path} has a window of {f.values[_WINDOW]!r:.60} tokens and does not say in which layers "
            f"(sliding_window_pattern={pattern!r:.60}); give the model's config.json instead"
        )

    def _chunked(self, f: Fields) -> bool:
        return self.architecture == "llama4" and f.values.get(_WINDOW) != 0

    def _layer(self, f: Fields, index: int, window: Reach) -> Layer:
        kind = "sliding_attention" if window else "full_attention"
        if f.has("attention.kv_lora_rank"):
            names = {"kv_lora_rank": "attention.kv_lora_rank", "qk_rope_head_dim": "rope.dimension_count"}
            latent = {ours: f.count(theirs) for ours, theirs in names.items()}
            if f.mla == "expanded":
                latent |= {"num_attention_heads": _at(f, "attention.head_count", index)}
                own = "_mla" if f.has("attention.key_length_mla") else ""
                latent["v_head_dim"] = f.count(f"attention.value_length{own}")
                latent["qk_nope_head_dim"] = f.count(f"attention.key_length{own}") - latent["qk_rope_head_dim"]
            return Layer(index, kind, latent_kept(Fields(f.model_type, latent, f.mla), window))
        queries = _at(f, "attention.head_count", index)
        heads = _at(f, "attention.head_count_kv", index) if f.has("attention.head_count_kv") else queries
        if not heads or not queries:
            return Layer(index, "no attention")
        numbers = Fields(f.model_type, {**f.values, "attention.head_count": queries})
        k_dim, v_dim = (
            f.count(name) if f.has(name) else numbers.divided("embedding_length", "attention.head_count")
            for name in ("attention.key_length", "attention.value_length")
        )
        kept: tuple[Kept, ...] = grouped_heads(numbers, heads, k_dim, v_dim, window, queries="attention.head_count")
        return Layer(index, kind, kept)


_WINDOW = "attention.sliding_window"


def _at(f: Fields, name: str, index: int) -> int:
    """A number of heads, which a file gives for all layers or for each."""
    value = f.get(name)
    if isinstance(value, list):
        if len(value) != f.layers("block_count"):
            raise UnknownModel(f"{f.model_type}.{name} has {len(value)} numbers for {f.count('block_count')} layers")
        return Fields(f.model_type, {name: value[index]}).count(name, 0)
    return f.count(name)
