"""The attention backend "kvblocks": a model's layers read the blocks in place, over a ragged batch without padding.

Importing this module registers the attention and its mask with transformers. Scheduling is not here.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvblocks.attention import paged_attention
from kvblocks.engine import CacheEngine
from kvblocks.integrations.transformers.layers import UnsupportedModel, model_layers
from kvblocks.step import StepBuffers

__all__ = ["attached", "check_model", "forward"]

NAME = "kvblocks"


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` for one that is known not to work before it has run.

    Served are decoders whose attention goes through transformers' attention registry and whose only state is K and V.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoder-only models are served")
    model_layers(model.config)
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{name} keeps a recurrent state between tokens, which a K/V cache does not hold")
    if not all(part._can_set_attn_implementation() for part in model.modules() if isinstance(part, PreTrainedModel)):
        raise UnsupportedModel(
            f"{name} does not use transformers' attention registry, so its attention cannot be exchanged"
        )
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters or all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedModel(
            f"{name}.forward takes no position_ids or hands nothing on to its layers; it cannot be batched"
        )
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in model.modules()):
        raise UnsupportedModel(f"{name} numbers its positions in its own way; served are those that count from 0")


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers attend through kvblocks; on leaving, as they did before.

    Raises:
        UnsupportedModel: see `check_model`; or the model attends through kvblocks already.
    """
    check_model(model)
    before = model.config._attn_implementation
    if before == NAME:
        raise UnsupportedModel(f"another generator drives this {type(model).__name__}; close that one first")
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def forward(model: PreTrainedModel, engine: CacheEngine, step: StepBuffers, wanted: Tensor) -> Tensor:
    """One forward pass over the tokens of a prepared step; their K and V are written into the cache on the way.

    Args:
        model: inside `attached`.
        engine: a cache layer for each of the model's.
        step: filled by `BlockManager.prepare`; its copies have been done.
        wanted: int64 [n], the tokens of the step whose logits are asked for.

    Returns:
        logits [n, vocabulary], of the model's dtype.

    Raises:
        UnsupportedModel: a layer does what the cache cannot serve.
    """
    run = _Pass(engine, step)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    output = model(
        input_ids=step.input_ids[None, : step.num_tokens],
        position_ids=step.positions[None, : step.num_tokens],
        use_cache=False,
        kvblocks=run,
        **({"logits_to_keep": wanted} if keeps else {}),
    )
    if sorted(run.attended) != list(range(len(engine))):
        raise UnsupportedModel(
            f"of the {len(engine)} layers of {type(model).__name__}, these attended through kvblocks: "
            f"{sorted(run.attended)}; each must once"
        )
    logits: Tensor = output.logits[0]
    return logits if keeps else logits[wanted]


@dataclass
class _Pass:
    """What the layers need in one forward pass; it reaches them through the keyword arguments of the model's call."""

    engine: CacheEngine
    step: StepBuffers
    attended: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _LocalMask:
    """Stands where a layer of limited reach would have its mask: the window or chunk that the mask would show."""

    size: int


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
            f'attention "{NAME}" takes no padding mask: its batches are ragged; see {__name__}.forward'
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
    kvblocks: _Pass | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query, key, value [1, heads, tokens, dim]; returns [1, tokens, heads, dim]."""
    if kvblocks is None:
        raise UnsupportedModel(
            f'attention "{NAME}" was called without a step: either the model was not run through {__name__}.forward '
            "(for other uses, model.set_attn_implementation brings another attention back), or it hands no keyword "
            f"arguments on to {type(module).__name__}"
        )
    layer: int | None = getattr(module, "layer_idx", None)
    if layer is None or not 0 <= layer < len(kvblocks.engine):
        raise UnsupportedModel(
            f"{type(module).__name__} has layer_idx={layer}; the cache has {len(kvblocks.engine)} layers"
        )
    where = f"layer {layer} ({type(module).__name__})"
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedModel(f"{where} is not causal; cached K and V serve causal attention only")
    if position_bias is not None:
        raise UnsupportedModel(f"{where} adds a position bias to its scores, which paged attention does not")
    if dropout:
        raise UnsupportedModel(f"{where} asks for dropout={dropout}; call model.eval()")
    if attention_mask is not None and not isinstance(attention_mask, _LocalMask):
        raise UnsupportedModel(f"{where} makes a mask of its own, which paged attention does not take")
    window, chunk = _reach(module, layer, sliding_window)
    masked = None if attention_mask is None else attention_mask.size
    if masked != (window if chunk is None else chunk):
        raise UnsupportedModel(f"{where} has window={window} and chunk={chunk}, but its mask would show {masked}")
    cache, step = kvblocks.engine[layer], kvblocks.step
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if keys.shape[1:] != (cache.num_heads, cache.head_dim) or values.shape[1:] != (cache.num_heads, cache.v_head_dim):
        raise UnsupportedModel(
            f"{where} makes K {list(keys.shape[1:])} and V {list(values.shape[1:])} (heads, dim), the cache holds "
            f"{cache.num_heads} heads of {cache.head_dim} and {cache.v_head_dim}; unequal layers are not served"
        )
    kvblocks.attended.append(layer)
    cache.write(keys, values, step.slot_mapping[: len(keys)])
    output = paged_attention(
        query[0].transpose(0, 1),
        cache,
        step,
        scale=scaling,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=s_aux,
    )
    return output[None], None


def _reach(module: nn.Module, layer: int, sliding_window: int | None) -> tuple[int | None, int | None]:
    """Window and chunk of a layer. Transformers hands it the window; that it is chunked stands in the config only."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types and types[layer] == "chunked_attention":
        return None, getattr(config, "attention_chunk_size", None)
    if not types and sliding_window is None and getattr(config, "sliding_window", None) is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} leaves its sliding window to transformers' cache: config.sliding_window is set, "
            "the layer and its mask do not know of it"
        )
    return sliding_window, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
