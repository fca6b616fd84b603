"""What the layers of a transformers model cache, read from its config: which of them, how far they attend, what shapes.

Knows no cache and no attention. Imports transformers.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from kvblocks.config import CacheConfig, Chunk, Group, LayerTensor, Window, key_value
from kvblocks.errors import UnknownModel, UnsupportedModel
from kvblocks.formats import format_of
from kvblocks.models.architectures import MODEL_TYPES
from kvblocks.models.grouping import PagedLayer, layer_groups
from kvblocks.models.read import read
from kvblocks.models.shapes import Kept, Layer, Reach
from kvblocks.sizes import checked_bytes, checked_size
from kvblocks.storage.host import slot_bytes
from kvblocks.tiers.tiers import FEWEST

__all__ = [
    "FEWEST_STATES",
    "KVShape",
    "ModelLayer",
    "cache_argument",
    "cache_config",
    "cache_groups",
    "check_prompts",
    "check_splits",
    "checkpoints_every",
    "filling",
    "flat",
    "goes_on_by_one",
    "host_memory_beside",
    "host_slots",
    "keeps_offsets",
    "kv_shape",
    "longest_sequence",
    "model_class",
    "model_layers",
    "one_block",
    "placeholder_tokens",
    "slots_beside",
    "slots_for",
]


_BFLOAT16 = format_of("bfloat16")
_MOST_SLOTS = 2**31 - 2  # that a manager counts
_EVERY = 256  # tokens between checkpoints
_FEWEST_SLOTS = 16  # of host memory for blocks, where stores are below it and nobody says how much
_RUNNING = 64  # sequences that have a slot for their state beside those of checkpoints
FEWEST_STATES = 2  # slots: of one sequence and its checkpoint
OLDEST = (5, 24)  # of transformers: the caches of earlier versions are asked in another way


def check_version(installed: str) -> None:
    """Raise `ImportError` for a version of transformers that is not served."""
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"kvblocks needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, and {installed} is installed; run: pip "
            'install "kvblocks[generate]"',
            name="transformers",
        )


check_version(transformers.__version__)


class KVShape(NamedTuple):
    """What a model's layers cache: heads count K/V heads, dims are of one head, the largest where layers differ.

    Attributes:
        layers: (num_kv_heads, head_dim, v_head_dim) of each layer that has a cache; None where all are alike.
        index_dims: dim of the index keys of each layer that has a cache, 0 for none; empty where no layer has any.
        states: what each layer that has states keeps for a sequence: a tensor of one dimension for each dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    layers: tuple[tuple[int, int, int], ...] | None = None
    index_dims: tuple[int, ...] = ()
    states: tuple[tuple[LayerTensor, ...], ...] = ()

    @property
    def of_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(num_kv_heads, head_dim, v_head_dim) of each layer that has a cache."""
        return self.layers or (self[1:4],) * self.num_layers

    @classmethod
    def of(
        cls,
        layers: Sequence[tuple[int, int, int]],
        index_dims: Sequence[int] = (),
        states: Sequence[tuple[LayerTensor, ...]] = (),
    ) -> "KVShape":
        heads, head_dim, v_head_dim = (max(sizes) for sizes in zip(*layers, strict=True))
        unequal = tuple(layers) if len(set(layers)) > 1 else None
        dims = tuple(index_dims) if any(index_dims) else ()
        return cls(len(layers), heads, head_dim, v_head_dim, unequal, dims, tuple(states))

    @property
    def tensors(self) -> tuple[tuple[LayerTensor, ...], ...]:
        """What each layer keeps for a token, as `CacheConfig(layers=...)` takes it."""
        return tuple(
            (*key_value(*sizes), *([LayerTensor("index", (1, dim))] if dim else []))
            for sizes, dim in zip(self.of_layers, self.index_dims or (0,) * self.num_layers, strict=True)
        )


# Model types whose K and V of a token depend on more than the tokens before it, and what that is. Those of the first
# are not served by steps either, which split prompts.
_NO_SPLITS = {
    "cpmant": "puts tokens of its own before each prompt, so its columns are not the prompt's",
    "moshi": "attends past its window within a pass, so it matters how a prompt is split",
    "prophetnet": "takes one token at a time once it has begun",
    "xlm": "puts a mask token behind the tokens of each pass",
}
_NO_PROMPTS = {**_NO_SPLITS, "git": "attends to padding and counts it as positions"}


# Model types whose modules hold states themselves, though transformers' cache has layers for them.
_OWN_STATES = {"recurrent_gemma"}

_SERVED = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


@dataclass(frozen=True, slots=True)
class ModelLayer:
    """One layer of a model.

    Attributes:
        index: in the model.
        storage: which layer of the cache holds its K and V: its own, or that of the layer whose K and V it reads; None
            for a layer without attention.
        writes: whether the K and V are its own.
        window: it attends to the last `window` tokens, itself counted; None for all. What keeps to a chunk keeps to a
            window of that size too.
        chunk: it attends within its own chunk of so many tokens.
        states: how many states of each kind it keeps for a row, of convolutions and of recurrences; 0 for none.
        index_dim: of the index keys that it keeps beside K and V, one for a token; 0 for none.
    """

    index: int
    storage: int | None
    writes: bool
    window: int | None
    chunk: int | None = None
    states: int = 0
    index_dim: int = 0


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder: of a multimodal model, its text part."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a model's config")
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def model_layers(config: PreTrainedConfig) -> tuple[ModelLayer, ...]:
    """The layers of a model, as transformers' own cache sees them.

    Raises:
        UnsupportedModel: a kind of layer that keeps what is not of a token or a row; an encoder-decoder.
    """
    text = text_config(config)
    name = type(text).__name__
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is of an encoder-decoder; only decoder-only models are served")
    if getattr(text, "cross_attention_layers", None):
        raise UnsupportedModel(f"{name} has layers of cross-attention, whose K and V belong to no token")
    kind_of_model = model_class(config)  # its module also names the kinds of layers that only it has
    try:
        kinds: Sequence[Any] = DynamicCache(config=text).layers
    except Exception as error:  # whatever a config lacks that transformers' own cache asks for
        raise UnsupportedModel(f"transformers has no cache for {name}: {error}") from None
    types = list(getattr(text, "layer_types", None) or ["full_attention"] * len(kinds))
    again = _repeated(text)
    kinds = [*kinds, *(kinds[index] for index in again)]
    types += [types[index] for index in again]
    others = sorted({layer_type for layer_type, kind in zip(types, kinds, strict=False) if not _is_served(kind)})
    if others:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(others)}, which keep what belongs neither to one token nor to the "
            "sequence as a whole; served are K, V and index keys of tokens, and states of sequences"
        )
    if text.model_type in _OWN_STATES or (
        getattr(kind_of_model, "_is_stateful", False)
        and not any(isinstance(kind, LinearAttentionLayer) for kind in kinds)
    ):
        raise UnsupportedModel(
            f"{name} is of a model that keeps a recurrent state outside of the cache, where no row takes it along"
        )
    if kind_of_model is not None:
        cache_argument(kind_of_model.forward)
    layers: list[ModelLayer] = []
    last: dict[str, ModelLayer] = {}  # who wrote last, by layer type: whose K and V a sharing layer reads
    shares = dict(enumerate(getattr(text, "kv_sharing_modes", None) or ()))
    for index, (kind, layer_type) in enumerate(zip(kinds, types, strict=True)):
        if type(kind).__name__ == "DummyLayer":
            source = last.get(layer_type) if shares.get(index) == "reuse" else None
            read, window, chunk = (None,) * 3 if source is None else (source.storage, source.window, source.chunk)
            layers.append(ModelLayer(index, read, False, window, chunk))
            continue
        states = kind.number_of_states if isinstance(kind, LinearAttentionLayer) else 0
        if not isinstance(kind, DynamicLayer):
            layers.append(ModelLayer(index, None, False, None, states=states))
            continue
        storage = sum(layer.writes for layer in layers)
        window = getattr(kind, "sliding_window", None)
        chunk = window if layer_type == "chunked_attention" else None
        layers.append(ModelLayer(index, storage, True, window, chunk, states, _index_dim(text, index, kind)))
        last[layer_type] = layers[-1]
    if not last:
        raise UnsupportedModel(f"{name} has no layer with K and V, so there is nothing to keep in blocks")
    return tuple(layers)


def _repeated(text: Any) -> list[int]:
    """The layers that a pass runs again, in that order: transformers' cache has a layer more for each time.

    Raises:
        UnsupportedModel: such a model that reads K and V of other times past `update`.
    """
    if (loops := getattr(text, "n_recurrent_loops", 1)) > 1:
        if text.recurrent_kv_cache_mode == "last_loop":
            raise UnsupportedModel(
                f"{type(text).__name__} runs some layers several times in a pass, and reads K and V of the last time "
                "past `update`; served is recurrent_kv_cache_mode='per_loop'"
            )
        return [text.n_input_layers + layer for layer in range(text.n_recurrent_layers)] * (loops - 1)
    if (loops := getattr(text, "loop_num_passes", 1)) > 1:
        return [*range(text.loop_layer_index_start, text.loop_layer_index_end)] * (loops - 1)
    return []


def cache_groups(config: PreTrainedConfig, *, chunks: bool = True) -> tuple[Group, ...]:
    """The layers of a model that write K and V, by their number in the cache, in groups for `CacheConfig`.

    Layers that cache more than others count for more, by the shapes that the config names; where it does not name them,
    all count alike.

    Args:
        config: of the model.
        chunks: whether a chunked layer keeps its chunk only. Where rows are padded nobody knows where chunks begin, and
            it keeps a window of that size.

    Raises:
        UnsupportedModel: as for `model_layers`.
    """
    writing = [layer for layer in model_layers(config) if layer.writes]
    try:
        kept = _kept(config, writing, _read(config))
    except UnsupportedModel:
        sizes = [1] * len(writing)
    else:
        rates = math.lcm(*(one.every for layer in kept for one in layer))
        sizes = [sum(one.entry_bytes(_BFLOAT16) * rates // one.every for one in layer) for layer in kept]
    layers = [
        PagedLayer(number, _reach(layer, chunks), size)
        for number, (layer, size) in enumerate(zip(writing, sizes, strict=True))
    ]
    longest = getattr(text_config(config), "max_position_embeddings", None)
    groups = layer_groups(layers, longest if isinstance(longest, int) and longest > 0 else None)
    return tuple(Group(group.reach, tuple(layer.index for layer in group.layers)) for group in groups)


def _reach(layer: ModelLayer, chunks: bool) -> Reach:
    if chunks and layer.chunk is not None:
        return Chunk(layer.chunk)
    return None if layer.window is None else Window(layer.window)


def check_prompts(config: PreTrainedConfig, *, padded: bool = False, positions_given: bool = False) -> None:
    """Raise `UnsupportedModel` where no prompt can go on from what another one computed, though it begin alike."""
    text = text_config(config)
    reason = _NO_PROMPTS.get(text.model_type)
    if padded and hasattr(text, "index_block_size"):
        reason = "takes padding for tokens where it puts index keys in blocks, and these prompts are not of one length"
    if _looks_ahead(text):
        reason = "attends to later tokens too"
    if not positions_given and keeps_offsets(config):
        reason = "keeps in itself by how much an image shifted the positions of the prompt before (rope_deltas)"
    if reason is not None:
        raise UnsupportedModel(
            f"{type(text).__name__} is of a model that {reason}; it shares no prompts: leave begin out"
            + (", or call begin_inputs, which gives the positions" if reason.endswith("(rope_deltas)") else "")
        )


def check_splits(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModel` where it matters to K and V how a prompt is split into passes."""
    text = text_config(config)
    reason = "attends to later tokens too" if _looks_ahead(text) else _NO_SPLITS.get(text.model_type)
    if reason is not None:
        raise UnsupportedModel(f"{type(text).__name__} is of a model that {reason}; use model.generate with PagedCache")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name by which a model's forward takes a cache: "cache", or "past_key_values" in older code.

    Raises:
        UnsupportedModel: it takes none.
    """
    known = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise UnsupportedModel(f"{forward.__qualname__} takes no cache, so the model keeps its K and V elsewhere, or none")


def goes_on_by_one(kind: type[Any] | None) -> bool:
    """Whether a model's layers go on from a state by one token in a pass only, as those of Mamba 1 (Jamba, Zamba) do.

    Transformers' scan over several tokens takes no state to begin from, as the kernels that it stands for take none: it
    begins at zeros, whatever the cache holds. Who splits a prompt has to go on by single tokens, as `CachedModel` does;
    `model.generate` does not, so a `PagedCache` finds no states of these models.
    """
    return kind is not None and hasattr(sys.modules.get(kind.__module__), "mamba_selective_scan")


def _looks_ahead(text: Any) -> bool:
    bidirectional = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    return bidirectional or not getattr(text, "is_causal", True)


def keeps_offsets(config: PreTrainedConfig) -> bool:
    """Whether a model with M-RoPE (Qwen2-VL and those after it) holds the offset of its positions outside its cache.

    For a prompt of which a part is found, transformers takes the offset of the prompt before, whatever that was. A
    model of text alone has none, as no image shifts its positions.
    """
    if text_config(config) is config:
        return False
    kind = model_class(config)
    home = None if kind is None else sys.modules.get(kind.__module__)
    parts = [] if home is None else [part for part in vars(home).values() if isinstance(part, type)]
    return any(hasattr(part, "get_rope_index") for part in parts)


def placeholder_tokens(config: PreTrainedConfig) -> dict[int, str]:
    """The ids that stand for images, videos or sounds in a prompt, each with the name of the config's field."""
    found = {}
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                found[token] = name
    return found


def model_class(config: PreTrainedConfig) -> type[Any] | None:
    """The class that transformers makes of a config, where it knows one that generates."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        known = mapping.get(type(config), None)
        if known is not None:
            return known[0] if isinstance(known, tuple) else known
    return None


def counts_padding(config: PreTrainedConfig) -> bool:
    """Whether padding may shift the positions of a row's tokens: the model takes no positions, or is not known."""
    kind = model_class(config)
    return kind is None or "position_ids" not in inspect.signature(kind.forward).parameters


def _is_served(kind: Any) -> bool:
    if type(kind).__name__ == "DummyLayer":
        return True
    return type(kind) in _SERVED or (_indexes(kind) and DynamicLayer in type(kind).__bases__)


def _indexes(kind: Any) -> bool:
    """Whether a layer of transformers' own cache takes index keys: by `update_indexer`, or as MiniMax M3 does it."""
    return hasattr(kind, "update_indexer") or hasattr(kind, "update_index")


def _index_dim(text: Any, index: int, kind: Any) -> int:
    """Dim of the index keys that a layer keeps; 0 for none."""
    if not _indexes(kind):
        return 0
    types = getattr(text, "indexer_types", None)
    if types is not None and types[index] == "shared":
        return 0  # it goes by what the indexer of a layer before it has found
    for name in ("index_head_dim", "indexer_head_dim"):
        if isinstance(dim := getattr(text, name, None), int):
            return dim
    raise UnsupportedModel(f"{type(text).__name__} has an indexer, and no index_head_dim to size a cache for its keys")


def kv_shape(config: PreTrainedConfig) -> KVShape:
    """What a config says that the layers cache, as the planner reads it; of a multimodal one, the text part.

    Raises:
        UnsupportedModel: the config lacks a number; or as for `model_layers`.
    """
    described = model_layers(config)
    layers = [layer for layer in described if layer.writes]
    said = _read(config)
    shapes = [(key.stored_heads or key.heads, key.dim, value.dim) for key, value, *_ in _kept(config, layers, said)]
    return KVShape.of(shapes, [layer.index_dim for layer in layers], _states(config, described, said))


_LOOPED = {"inkling2_loop_text": "inkling2_text"}  # model types whose layers are those of another, some of them again


def _kept(config: PreTrainedConfig, layers: Sequence[ModelLayer], said: Sequence[Layer]) -> list[tuple[Kept, ...]]:
    """What each of the layers, all that write, keeps for a token: K, V, and index keys where it has some."""
    kept = [layer.kept for layer in said if layer.kept]
    if len(kept) != len(layers):
        raise UnsupportedModel(
            f"{type(text_config(config)).__name__} says what {len(kept)} layers cache, and transformers' own cache has "
            f"{len(layers)} layers with K and V"
        )
    return kept


def _states(
    config: PreTrainedConfig, layers: Sequence[ModelLayer], said: Sequence[Layer]
) -> list[tuple[LayerTensor, ...]]:
    """What each of the layers that have states keeps for a sequence, as `flat` has it."""
    found = []
    for layer, by_config in zip(layers, said, strict=False):
        if not layer.states:
            continue
        if not by_config.states:
            raise UnsupportedModel(
                f"{type(text_config(config)).__name__} does not say what states layer {layer.index} keeps, which has "
                "some in transformers' own cache; make a kvblocks.Pool of the model"
            )
        parts = [(state.dtype, state.kept_parts("transformers")) for state in by_config.states]
        found.append(flat([(dtype, sum(units * each for units, each in sizes)) for dtype, sizes in parts]))
    return found


def flat(states: Iterable[tuple[str | None, int]]) -> tuple[LayerTensor, ...]:
    """Tensors of one dimension, one for each dtype, that hold all states of a layer: (dtype, numbers) of each.

    Token ids are kept as bytes.
    """
    numbers: dict[str | None, int] = {}
    for dtype, count in states:
        if dtype == "int64":
            dtype, count = "uint8", 8 * count
        numbers[dtype] = numbers.get(dtype, 0) + count
    return tuple(LayerTensor(f"state_{dtype or 'own'}", (n,), dtype, per="sequence") for dtype, n in numbers.items())


def _read(config: PreTrainedConfig) -> list[Layer]:
    """What a config says of the layers that transformers' own cache has, in its order."""
    text = text_config(config)
    fields: Any = text
    if text.model_type in _LOOPED:
        fields = {name: value for name, value in text.to_dict().items() if not name.startswith("loop_")}
        fields["model_type"] = _LOOPED[text.model_type]
    elif text.model_type not in MODEL_TYPES:  # its code came with its weights: its fields mean what they usually do
        fields = {**text.to_dict(), "model_type": "deepseek_v3" if getattr(text, "kv_lora_rank", None) else "llama"}
    try:
        once = read(fields).read("expanded").layers
    except UnknownModel as problem:
        raise UnsupportedModel(f"{type(text).__name__} does not say what its layers cache: {problem}") from None
    return [*once, *(once[index] for index in _repeated(text))]


def one_block(shape: KVShape, block_size: int, groups: Sequence[Group]) -> CacheConfig:
    """The sizes of a cache of one block. Layers with states come after those with K and V, as layers of their own."""
    return CacheConfig(layers=(*shape.tensors, *shape.states), num_gpu_blocks=1, block_size=block_size, groups=groups)


def filling(
    config: CacheConfig, memory: int | str, dtype: torch.dtype, *, every: int = 0, num_states: int | None = None
) -> tuple[CacheConfig, int]:
    """The config with as many blocks as `memory` holds in `dtype`, and slots for states beside them.

    Args:
        memory: of all blocks and slots, in bytes or text such as "1GiB".
        every, num_states: as for `slots_for`; an explicit number is kept.

    Raises:
        ValueError, TypeError: it is no size, or holds no block.
    """
    num_bytes, each = checked_bytes("memory", memory), config.state_bytes(dtype)
    if num_states is None:
        num_states = slots_for(config, num_bytes, dtype, every)
    num_blocks = (num_bytes - num_states * each) // config.block_bytes(dtype)
    if num_blocks < 1:
        beside = f", beside {num_states} states of {each} bytes" if each else ""
        raise ValueError(f"memory={memory!r} holds no block; one is {config.block_bytes(dtype)} bytes{beside}")
    return config.replace(num_gpu_blocks=num_blocks), num_states


def slots_for(config: CacheConfig, num_bytes: int, dtype: torch.dtype, every: int) -> int:
    """Slots for states in a pool of so many bytes; 0 where no layer keeps any.

    There is one for a checkpoint at each `every` tokens that the bytes could hold, and 64 for sequences that run, as
    far as a quarter of the bytes goes, but at least 2. So many may be of use, whatever runs; what a known number of
    sequences needs is for `plan(...).num_states` to say.
    """
    each = config.state_bytes(dtype)
    if not each:
        return 0
    return max(FEWEST_STATES, _states_in(num_bytes, config, config.block_bytes(dtype), each, every, _RUNNING))


def _states_in(num_bytes: int, config: CacheConfig, block: int, state: int, every: int, running: int) -> int:
    """Slots for states, of `state` bytes each, among so many bytes of blocks and states.

    There are `running`, and one for each `every` tokens of the blocks, of `block` bytes each, that the bytes could
    hold; all together take no more than a quarter of the bytes.
    """
    tokens = num_bytes // block * config.block_size
    return min(tokens // every + running, num_bytes // 4 // state)


def slots_beside(config: CacheConfig, dtype: torch.dtype, every: int) -> int:
    """Slots for states where the blocks are given: `slots_for` the bytes of which these are three quarters."""
    return slots_for(config, config.memory_bytes(dtype) * 4 // 3, dtype, every)


def checkpoints_every(block_size: int, every: int | None = None) -> int:
    """Tokens from one checkpoint of a state to the next: a multiple of the block size, by default about 256.

    Raises:
        ValueError, TypeError: `every` is no size, or no multiple of the block size.
    """
    if every is None:
        return -(-_EVERY // block_size) * block_size
    if checked_size("state_every", every) % block_size:
        raise ValueError(f"state_every={every} is not a multiple of block_size={block_size}")
    return every


def host_slots(
    config: CacheConfig, host_memory: int | str | None, dtype: torch.dtype, every: int, *, stores: bool = False
) -> tuple[int, int]:
    """How many slots for blocks `host_memory` holds, and beside them for checkpoints of states; none for None.

    Where layers keep states there is one checkpoint for each `every` tokens that the bytes could hold, as far as a
    quarter of the bytes goes. With stores there are at least 8, as only a quarter of them may come and go at once.

    Args:
        host_memory: in bytes or text such as "1GiB".
        every: tokens from one checkpoint to the next.
        stores: whether there are stores below.

    Raises:
        ValueError, TypeError: it is no size, or holds no block; with stores, fewer than four.
    """
    if host_memory is None:
        return 0, 0
    each, num_bytes, checkpoints = slot_bytes(config.block_bytes(dtype)), checked_bytes("host_memory", host_memory), 0
    slots, state, beside = num_bytes // each, 0, ""
    if config.state_bytes(dtype):
        state = slot_bytes(config.state_bytes(dtype))
        checkpoints = max(_states_in(num_bytes, config, each, state, every, 0), FEWEST["host_states"] if stores else 0)
        slots = max(0, num_bytes - checkpoints * state) // each
        beside = f" beside {checkpoints} of {state} bytes for states"
    fewest = FEWEST["host_blocks"] if stores else 1
    if not fewest <= slots <= _MOST_SLOTS:
        least = checkpoints * state + fewest * each
        bound = f"at least {least} bytes" if slots < fewest else f"memory for {_MOST_SLOTS} at most"
        raise ValueError(f"host_memory={host_memory!r} holds {slots} slots of {each} bytes{beside}; give {bound}")
    return slots, checkpoints


def host_memory_beside(config: CacheConfig, num_states: int, dtype: torch.dtype) -> int:
    """Bytes of host memory for a pool with stores where nobody says how much: a quarter of the pool's."""
    state_bytes = config.state_bytes(dtype)
    fewest = _FEWEST_SLOTS * slot_bytes(config.block_bytes(dtype))
    fewest += FEWEST["host_states"] * slot_bytes(state_bytes) if state_bytes else 0
    return max((config.memory_bytes(dtype) + num_states * state_bytes) // 4, fewest)


def cache_config(
    config: PreTrainedConfig, memory_bytes: int | str, dtype: torch.dtype, *, block_size: int = 16
) -> CacheConfig:
    """The largest cache for the model within `memory_bytes`, its layers in groups by how far they attend.

    Raises:
        ValueError: not one block fits.
        UnsupportedModel: as for `kv_shape`.
    """
    shape = kv_shape(config)
    return CacheConfig.for_memory(
        layers=shape.tensors,
        memory_bytes=memory_bytes,
        dtype=dtype,
        block_size=block_size,
        groups=cache_groups(config),
    )


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens a sequence may have: the model's `max_position_embeddings`, or None where it names no limit.

    Rotary frequencies of type "dynamic" and "longrope" change for all sequences of a batch once the longest passes the
    length the model was first trained on. That length is the limit then: no request changes another's tokens.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None), unscaled_length(config)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def unscaled_length(config: PreTrainedConfig) -> int | None:
    """The length past which the rotary frequencies of a "dynamic" or "longrope" model change; None for others."""
    text = config.get_text_config(decoder=True)
    limits = []
    rope = getattr(text, "rope_parameters", None) or {}
    for entry in [rope, *rope.values()]:
        if isinstance(entry, dict) and entry.get("rope_type") in ("dynamic", "longrope"):
            limits.append(
                entry.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
            )
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
