"""The attention backend "kvblocks": a model's layers read the blocks in place, over a ragged batch without padding.

Importing this module registers the attention and its mask with transformers. Scheduling is not here.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel

from kvblocks.attention.call import paged_attention
from kvblocks.config import Chunk, Window
from kvblocks.engine import CacheEngine
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.layer import cache_layers
from kvblocks.integrations.transformers.layers import KVShape, ModelLayer, cache_argument, model_layers
from kvblocks.integrations.transformers.states import LayerStates
from kvblocks.step.buffers import StepBuffers
from kvblocks.storage.cache import PagedKVCache

__all__ = ["PagedModel", "check_model", "check_state"]

NAME = "kvblocks"


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside what `torch.compile` or PEFT made of it.

    Raises:
        UnsupportedModel: there is none, or PEFT puts K and V of its own before every prompt.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if getattr(inner, "_orig_mod", None) is not None:
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            if getattr(inner.active_peft_config, "is_prompt_learning", False):
                raise UnsupportedModel(
                    f"{type(model).__name__} learns a prompt ({inner.active_peft_config.peft_type}), whose K and V "
                    "belong to no token; served are adapters that change weights, as LoRA does"
                )
            inner = inner.get_base_model()
        else:
            raise UnsupportedModel(
                f"a {type(inner).__name__} is no transformers model, nor one that torch.compile or PEFT has wrapped"
            )
    return inner


def adapters(model: PreTrainedModel) -> bytes:
    """Which adapters change the model's K and V now, for the salt of a prompt; empty where none is there.

    Adapters are told apart by name: one that is trained on is new weights.
    """
    parts: Iterator[Any] = model.modules()
    states = {
        (tuple(part.active_adapters), bool(part.disable_adapters))
        for part in parts
        if hasattr(part, "active_adapters") and hasattr(part, "disable_adapters") and hasattr(part, "base_layer")
    }
    return repr(sorted(states)).encode() if states else b""


def check_state(model: PreTrainedModel) -> tuple[ModelLayer, ...]:
    """The model's layers; raises `UnsupportedModel` where it keeps what no cache here holds."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoder-only models are served")
    return model_layers(model.config)


def check_model(model: PreTrainedModel) -> tuple[ModelLayer, ...]:
    """The model's layers; raises `UnsupportedModel` for a model that is known not to work before it has run.

    Served are decoders whose attention goes through transformers' attention registry and whose only state is K and V.
    """
    name = type(model).__name__
    layers = check_state(model)
    if any(layer.states or layer.index_dim for layer in layers):
        raise UnsupportedModel(f"{name} keeps more than the K and V that attention reads: index keys, or states")
    if not all(part._can_set_attn_implementation() for part in model.modules() if isinstance(part, PreTrainedModel)):
        raise UnsupportedModel(
            f"{name} does not use transformers' attention registry, so its attention cannot be exchanged"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name}.forward takes no position_ids; rows of unequal length cannot be batched")
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in model.modules()):
        raise UnsupportedModel(f"{name} numbers its positions in its own way; served are those that count from 0")
    return layers


class PagedModel:
    """A model whose layers attend through kvblocks for the length of a pass, and by themselves between passes.

    Args:
        model: a transformers model, or what torch.compile or PEFT made of one; attention itself is not compiled.

    Attributes:
        model: the transformers model.
        layers: of it.

    Raises:
        UnsupportedModel: see `check_model`.

    Thread-safety: passes over one model wait for each other, also those of other `PagedModel`s. Who runs the model by
    itself in another thread meanwhile gets an `UnsupportedModel` that says so.
    """

    attends_in_blocks = True
    keeps_states = False

    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        self.layers = check_model(self.model)
        self._call = model
        self._configs = _configs(self.model)
        self._reaches: dict[tuple[int, int | None, int | None], Window | Chunk | None] = {}
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def measure(self) -> KVShape:
        """What the layers hand to attention: the first time two tokens are run through the model, attending to nothing.

        Raises:
            UnsupportedModel: a layer does what the cache cannot serve.
        """
        return self._measure()[0]

    def states(self) -> tuple[LayerStates, ...]:
        """The states of each layer that keeps any: none is."""
        return ()

    def as_cached(self) -> bool:
        """Whether attention gets the very K and V that the model hands to a cache, so that one may find the other's."""
        return self._measure()[1]

    @torch.inference_mode()
    def _measure(self) -> tuple[KVShape, bool]:
        if self.model in _measured:
            return _measured[self.model]
        run = _PassState(self.layers, None, None, self._reaches)
        handed = _Handed()
        cache = Cache(layers=cache_layers(self.model.config, handed, self.layers)[0])
        # Neither token nor position is 0: their K might be the same before and after rotation, or all zeros.
        ids = torch.tensor([[1, 2]], device=self.model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": ids}
        if self._keeps:
            inputs["logits_to_keep"] = torch.tensor([1], device=ids.device)
        try:
            self._run(run, True, **inputs, **{cache_argument(self.model.forward): cache})
        except UnsupportedModel:  # it may be served without a cache all the same
            run = _PassState(self.layers, None, None, self._reaches)
            self._run(run, **inputs)
        writing = [layer for layer in self.layers if layer.writes]
        alike = all(_same(run.states.get(layer.index), handed.states.get(layer.index)) for layer in writing)
        measured = KVShape.of([run.shapes[layer.index] for layer in writing]), alike
        _measured[self.model] = measured
        return measured

    def forward(self, engine: CacheEngine, step: StepBuffers, wanted: Tensor) -> Tensor:
        """One forward pass over the tokens of a prepared step; their K and V are written into the cache on the way.

        Args:
            engine: a layer for each of the model's that writes K and V.
            step: filled by `BlockManager.prepare`; its moves have been made.
            wanted: int64 [n], the tokens of the step whose logits are asked for.

        Returns:
            logits [n, vocabulary], of the model's dtype.

        Raises:
            UnsupportedModel: a layer does what the cache cannot serve.
        """
        output = self._run(
            _PassState(self.layers, engine, step, self._reaches),
            input_ids=step.input_ids[None, : step.num_tokens],
            position_ids=step.positions[None, : step.num_tokens],
            **({"logits_to_keep": wanted} if self._keeps else {}),
        )
        logits: Tensor = output.logits[0]
        return logits if self._keeps else logits[wanted]

    def _run(self, run: "_PassState", use_cache: bool = False, /, **inputs: Any) -> Any:
        entered = _running.set(run)
        try:
            with _attached(self.model, self._configs):
                output = self._call(use_cache=use_cache, **inputs)
        finally:
            _running.reset(entered)
        expected = [layer.index for layer in self.layers if layer.storage is not None]
        if sorted(run.attended) != expected:
            raise UnsupportedModel(
                f"the layers of {type(self.model).__name__} that attended through kvblocks are {sorted(run.attended)}; "
                f"each of {expected} must once"
            )
        return output


_measured: "WeakKeyDictionary[PreTrainedModel, tuple[KVShape, bool]]" = WeakKeyDictionary()
_locks: "WeakKeyDictionary[PreTrainedModel, threading.RLock]" = WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextlib.contextmanager
def _attached(model: PreTrainedModel, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Let the model's layers attend through kvblocks, and give each part its own attention back, whatever happens.

    `set_attn_implementation` would search all modules of the model in every pass.

    Args:
        model: whose passes wait for each other.
        configs: as `_configs` finds them in the model.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        before = [(config, config._attn_implementation) for config in configs]
        try:
            for config in configs:
                config._attn_implementation = NAME
            yield
        finally:
            for config, attention in before:
                config._attn_implementation = attention


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that says how a part of the model attends, parents before their children."""
    found: dict[int, PreTrainedConfig] = {}

    def walk(config: PreTrainedConfig) -> None:
        found.setdefault(id(config), config)
        for name in config.sub_configs:
            if isinstance(child := getattr(config, name, None), PreTrainedConfig):
                walk(child)

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            walk(part.config)
    return list(found.values())


@dataclass
class _PassState:
    """What the layers need in one forward pass."""

    layers: Sequence[ModelLayer]
    engine: CacheEngine | None
    step: StepBuffers | None
    reaches: "dict[tuple[int, int | None, int | None], Window | Chunk | None]"
    attended: list[int] = field(default_factory=list)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # heads, dim of K, dim of V
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # K and V, kept while a model is measured


class _Handed:
    """The K and V that layers hand to a cache, for `PagedModel.as_cached`; see `LayerState`."""

    recording = False

    def __init__(self) -> None:
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def length(self, layer: ModelLayer) -> int:
        return self.states[layer.index][0].shape[2] if layer.index in self.states else 0

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.states[layer.index] = keys, values
        return keys, values

    def index(self, layer: ModelLayer, keys: Tensor) -> Tensor:
        return keys

    def enter(self, layer: ModelLayer, call: str) -> None:
        """No such model gets here: see `check_model`."""

    def check_batch(self, batch: int) -> None:
        """Nor does it come to this."""


def _same(attended: tuple[Tensor, Tensor] | None, cached: tuple[Tensor, Tensor] | None) -> bool:
    if attended is None or cached is None:
        return False
    return all(torch.equal(one, other) for one, other in zip(attended, cached, strict=True))


# Not every model hands keyword arguments on to its layers, so what they need reaches them by this.
_running: ContextVar[_PassState | None] = ContextVar("kvblocks_running", default=None)


@dataclass(frozen=True)
class _LocalMask:
    """Stands where a layer of limited reach would have its mask: the window or chunk that the mask would show."""

    size: int

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedModel(f"the model works on its masks itself (it asks for .{name}), and here none are built")


def _mask(
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    **kwargs: Any,
) -> _LocalMask | None:
    """The mask function: no mask is built, as block tables and lengths say all; what they cannot say is an error.

    Without a registered mask function transformers would drop a padding mask in silence.
    """
    if attention_mask is not None and not attention_mask.all():
        raise UnsupportedModel(
            f'attention "{NAME}" takes no padding mask: its batches are ragged; see {__name__}.PagedModel'
        )
    if use_vmap or allow_is_bidirectional_skip is not None:
        raise UnsupportedModel(f'attention "{NAME}" is causal; this model asks for a mask of its own')
    return None if local_size is None else _LocalMask(local_size)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _LocalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query, key, value [1, heads, tokens, dim]; returns [1, tokens, heads, dim]."""
    if torch.compiler.is_compiling():  # the kernels know tensors by address, and a trace has none
        return _untraced(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            is_causal=is_causal,
            position_bias=position_bias,
        )
    run = _running.get()
    if run is None:
        raise UnsupportedModel(
            f'attention "{NAME}" was called without a step: the model was not run through {__name__}.PagedModel. If '
            "another thread runs a pass of it, wait for that; else model.set_attn_implementation brings another back"
        )
    index: int | None = getattr(module, "layer_idx", None)
    if index is None or not 0 <= index < len(run.layers):
        raise UnsupportedModel(f"{type(module).__name__} has layer_idx={index}; there are {len(run.layers)} layers")
    layer = run.layers[index]
    if layer.storage is None:
        raise UnsupportedModel(f"{_named(module)} attends, and by its config it keeps no K and V")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedModel(f"{_named(module)} is not causal; cached K and V serve causal attention only")
    if position_bias is not None:
        raise UnsupportedModel(f"{_named(module)} adds a position bias to its scores, which paged attention does not")
    if dropout:
        raise UnsupportedModel(f"{_named(module)} asks for dropout={dropout}; call model.eval()")
    if attention_mask is not None and not isinstance(attention_mask, _LocalMask):
        raise UnsupportedModel(f"{_named(module)} makes a mask of its own, which paged attention does not take")
    asked = (index, sliding_window, None if attention_mask is None else attention_mask.size)
    if asked not in run.reaches:
        run.reaches[asked] = _reach(module, layer, *asked[1:])
    reach = run.reaches[asked]
    run.attended.append(index)
    run.shapes[index] = (key.shape[1], key.shape[3], value.shape[3])
    if run.engine is None or run.step is None:
        run.states[index] = key, value
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    cache = run.engine[layer.storage]
    made = None
    if torch.is_autocast_enabled(key.device.type):
        made = torch.get_autocast_dtype(key.device.type)  # what torch's own attention would see and give
        key, value, query = (states.to(made).to(cache.dtype) for states in (key, value, query))
    keys, values, queries = key[0].transpose(0, 1), value[0].transpose(0, 1), query[0].transpose(0, 1)
    if layer.writes and keys.shape[0] != run.step.num_tokens:
        raise UnsupportedModel(f"{_named(module)} makes K for {len(keys)} tokens, the step has {run.step.num_tokens}")
    if scaling is None:
        scaling = queries.shape[2] ** -0.5
    fits = run.shapes[index] == (cache.num_heads, cache.head_dim, cache.v_head_dim)
    heads, value_dim = queries.shape[1], values.shape[2]
    if not fits:
        keys, values, queries = _padded(module, cache, keys, values, queries)
    if layer.writes:
        cache.write(keys, values, run.step)
    nearer: dict[str, int] = {}
    if reach != cache.reach:
        nearer = _nearer(module, cache.reach, reach)
    output = paged_attention(queries, cache, run.step, scale=scaling, softcap=softcap, sinks=s_aux, **nearer)
    if not fits:
        output = output[:, :heads, :value_dim]
    return (output if made is None else output.to(made))[None], None


_untraced: Callable[..., tuple[Tensor, None]] = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]


def _named(module: nn.Module) -> str:
    return f"layer {module.layer_idx} ({type(module).__name__})"


def _nearer(module: nn.Module, kept: Window | Chunk | None, asked: Window | Chunk | None) -> dict[str, int]:
    """The option of `paged_attention` for a layer that attends less far than its group keeps blocks for.

    Raises:
        UnsupportedModel: it attends further, to blocks that its group has given back.
    """
    # A chunk never reaches further back than a window of its size.
    if isinstance(kept, Chunk) or asked is None or (kept is not None and asked.size > kept.size):
        raise UnsupportedModel(f"{_named(module)} attends to {asked or 'all tokens'}, and its group keeps {kept}")
    return {"window": asked.size} if isinstance(asked, Window) else {"chunk": asked.size}


def _padded(
    module: nn.Module, cache: PagedKVCache, keys: Tensor, values: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and queries with zeros added up to the heads and dims of the cache, where the layer has fewer.

    What is added to K and queries adds nothing to a score; the heads and dims added to the output are cut off again.
    """
    made = (keys.shape[1], keys.shape[2], values.shape[2])
    held = (cache.num_heads, cache.head_dim, cache.v_head_dim)
    if any(size > most for size, most in zip(made, held, strict=True)):
        raise UnsupportedModel(
            f"{_named(module)} makes {made[0]} heads of K [{made[1]}] and V [{made[2]}], the cache holds {held[0]} "
            f"heads of [{held[1]}] and [{held[2]}]"
        )
    more = held[0] - made[0]
    queries = pad(queries, (0, held[1] - made[1], 0, more * (queries.shape[1] // made[0])))
    return pad(keys, (0, held[1] - made[1], 0, more)), pad(values, (0, held[2] - made[2], 0, more)), queries


def _reach(
    module: nn.Module, layer: ModelLayer, sliding_window: int | None, masked: int | None
) -> Window | Chunk | None:
    """How far a layer attends: by its config, by what transformers hands it, and by its mask, which must agree.

    Transformers hands a layer its window, but not its chunk. What a layer is not handed, its mask shows.
    """
    if layer.chunk is not None:
        window, chunk = None, layer.chunk
    else:
        window, chunk = masked if sliding_window is None else sliding_window, None
        if window is None and layer.window is not None:
            raise UnsupportedModel(
                f"{_named(module)} leaves its sliding window to transformers' cache: the layer and mask do not know "
                f"of the {layer.window} tokens"
            )
    if masked != (window if chunk is None else chunk):
        raise UnsupportedModel(
            f"{_named(module)} has window={window} and chunk={chunk}, but its mask would show {masked}"
        )
    if chunk is not None:
        return Chunk(chunk)
    return None if window is None else Window(window)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
