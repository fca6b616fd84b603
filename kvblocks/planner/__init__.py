"""How much memory a model's cache takes, and what fits: exact, explained, from a config or from numbers.

Imports neither torch nor transformers where the numbers suffice.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

from kvblocks.errors import MissingField, UnknownModel
from kvblocks.formats import Format, dtype_name, format_of
from kvblocks.models.architectures import MODEL_TYPES
from kvblocks.models.grouping import MOST_GROUPS
from kvblocks.models.read import Source, cache_dtype, read, uniform
from kvblocks.models.shapes import ModelCache, Stored
from kvblocks.planner.advice import Change, smallest_changes
from kvblocks.planner.cards import CARDS, card_memory, parse_gpu
from kvblocks.planner.checkpoint import Checkpoint, checkpoint_of
from kvblocks.planner.engines import (
    ENGINES,
    Engine,
    check_engine,
    check_format,
    engine_block_size,
    engine_notes,
    engine_step_tokens,
)
from kvblocks.planner.figures import LONGEST, Settings
from kvblocks.planner.parallel import stage_layers
from kvblocks.planner.plans import Plan
from kvblocks.planner.splits import Split, best_split, fewest_devices, splits
from kvblocks.planner.text import amount, count
from kvblocks.sizes import checked_integer, parse_length, parse_share, parse_size

__all__ = [
    "CARDS",
    "ENGINES",
    "MODEL_TYPES",
    "Change",
    "MissingField",
    "ModelCache",
    "Plan",
    "Split",
    "UnknownModel",
    "plan",
    "smallest_changes",
    "splits",
    "uniform",
]

_BLOCK_SIZE = 16


def plan(
    model: Any,
    *,
    dtype: Any = None,
    memory: Any = None,
    gpu: str | None = None,
    block_size: int | None = None,
    tp: int | None = None,
    pp: int | Sequence[int] = 1,
    mla: Literal["latent", "expanded"] = "latent",
    stored: Stored = "exact",
    seq_len: int | str | None = None,
    concurrency: int | None = None,
    weights: int | str | None = None,
    weights_dtype: Any = None,
    activations: int | str | None = None,
    utilization: float | str = 1.0,
    sequences: int | None = None,
    checkpoints: int | None = None,
    encoder_tokens: int = 0,
    group_size: int | None = None,
    scale_dtype: Any = "float16",
    zero_point: bool = False,
    max_groups: int = MOST_GROUPS,
    step_tokens: int | None = None,
    engine: Engine = "kvblocks",
    swa_full: bool = False,
) -> Plan:
    """How much memory the cache of a model takes, and what fits into the memory there is.

    Args:
        model: a transformers config, its dict, a folder with a config.json, the file, a GGUF file (needs gguf), a hub
            id like "org/name" or "org/name@revision" (only its config.json is downloaded), or numbers:
            `{"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}`, see `uniform`.
        dtype: of K and V: a `torch.dtype`, its name, "fp8", the packed "int4" and "int2", or as engines call them:
            "fp8_e4m3", "fp8_e5m2", "q8_0", "q4_0"; "q8_0,q4_0" is K in the first and V in the second. None for the
            config's (float16 for llama.cpp), and bfloat16, with a note, where it names none; "auto" for the one that a
            quantized checkpoint asks for (`kv_cache_scheme`), else as None.
        memory: bytes of one device, a size like "80GiB" ("80G" is the same, "80GB" is 80 * 1000**3), or a device whose
            free memory counts ("cuda:1", "cpu", or a `torch.device`).
        gpu: instead of memory: a card and how many there are, "h100:8"; see `CARDS`. Without a number, as many as hold
            what is asked for.
        block_size: tokens in a block; None for 16, or the fewest more that the model's layers allow.
        tp: devices over which heads are split. Each has equally many query heads, in order, and the K and V heads that
            these read; where those do not divide, some are kept several times, and the plan says so. None for 1; with
            `gpu`, for the size with which the cards hold the most sequences, in as many copies of the model as fit.
        pp: pipeline stages, or the layers of each.
        mla: what layers with latent attention keep: the latent and the rotated key, or K and V of all heads.
        stored: "exact", or "transformers" for what transformers' caches keep; it changes `cache_bytes` alone.
        seq_len, concurrency: what has to fit: `concurrency` sequences of `seq_len` tokens (32768, or "32k").
        weights: bytes or a size of all weights; "auto" reads the safetensors headers or their index beside the config,
            on the hub too, and where there are none builds the model without memory to count them (needs torch and
            transformers), by its `quantization_config` where it has one. None counts none.
        weights_dtype: count the weights as the config describes them, in this dtype; None for the checkpoint's own.
        activations: bytes or a size set aside on each device.
        utilization: the share of the memory that is used, above 0 and at most 1 (0.9, or "90%").
        sequences: how many run at once and have their state set aside before blocks are counted. None for
            `concurrency`; where that is None too, for as many of `seq_len` tokens (by default the model's longest,
            32,768 at most) as fit.
        checkpoints: copies of states set aside besides, from which later prompts can go on. None for one for each
            sequence, its newest; add one for each prefix that many prompts share. A model that keeps no state, or
            nothing for a token, has none.
        encoder_tokens: tokens of an encoder or an image, of which cross-attention keeps K and V in every sequence.
        group_size: numbers of one head that share a scale, in 8-bit and packed dtypes; None where scales are not kept
            per token.
        scale_dtype, zero_point: the dtype of a group's scale, and whether it has a zero point too.
        max_groups: block tables of a sequence, at most; layers of each reach need at least one.
        step_tokens: tokens that one step writes for a sequence at most, which windowed layers hold besides the window;
            None for 1, and with an engine for its own default (8192 for vLLM's --max-num-batched-tokens, 512 for
            llama.cpp's --ubatch-size).
        engine: whose pages, paddings and packings are counted: "kvblocks", "vllm", "sglang" or "llama.cpp". Each rule
            that the model meets is a note of `explain()` with the engine's file and function. It does not change
            `cache_bytes` but for packed formats and llama.cpp's float32 state.
        swa_full: llama.cpp's --swa-full: windowed layers keep every token.

    Returns:
        A frozen `Plan`. Its `fits` says whether what is asked for fits; where it does not, `explain()` what is missing.

    Raises:
        UnknownModel: an architecture or a field that is not known, or a field that is missing (a ValueError).
        TypeError, ValueError: an argument of the wrong type or out of bounds, named with what is allowed.
        FileNotFoundError: no such config.

    Example:
        >>> llama = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
        >>> fits = plan(llama, dtype="bfloat16", memory="10GiB")
        >>> fits.bytes_per_token, fits.num_blocks, fits.max_tokens
        (131072, 5120, 81920)
    """
    used = _share(utilization)
    source = read(model)
    numbers = _checked_numbers(
        block_size=block_size,
        tp=tp,
        step_tokens=step_tokens,
        seq_len=_length(seq_len),
        concurrency=concurrency,
        sequences=sequences,
    )
    for name, value, allowed in (
        ("engine", engine, ENGINES),
        ("mla", mla, ("latent", "expanded")),
        ("stored", stored, ("exact", "transformers")),
    ):
        _one_of(name, value, allowed)
    _check_engine_arguments(engine, swa_full, stored)
    card, cards, memory = _cards(gpu, memory)
    shape, other = _shapes(source, mla, stored)
    check_engine(engine, shape)

    dtype, shape_dtype, notes = _dtypes(dtype, engine, source, shape)
    shape = replace(shape, dtype=shape_dtype)
    weights_bytes, weights_notes = _weights(weights, weights_dtype, source, shape)
    kept_in = format_of(shape_dtype if dtype is None else dtype, group_size, scale_dtype, zero_point)
    check_format(engine, kept_in)
    steps = numbers["step_tokens"] or engine_step_tokens(engine)
    notes += weights_notes
    notes += engine_notes(engine, shape, kept_in, swa_full=swa_full, step_tokens=steps)
    shape = replace(shape, notes=(*shape.notes, *notes))
    stages = stage_layers(shape, pp)
    devices = (numbers["tp"] or 1) * len(stages)
    if cards is not None and devices > cards:
        raise ValueError(f"tp={tp or 1} and pp={len(stages)} need {devices} cards; gpu={gpu!r} has {cards}")
    made = Plan(
        Settings(
            model=shape,
            format=kept_in,
            state_dtype=_state_dtype(shape, kept_in.name if kept_in.is_float and dtype is not None else None),
            other_mla=None if other is None else replace(other, dtype=shape_dtype, notes=shape.notes),
            memory=_memory(memory, used),
            utilization=used,
            block_size=_block_size(numbers["block_size"], engine, shape),
            gpu=card,
            gpus=cards,
            copies=1 if cards is None else cards // devices,
            tp=numbers["tp"] or 1,
            stages=stages,
            mla=mla,
            stored=stored,
            weights=weights_bytes,
            activations=_size("activations", activations) or 0,
            seq_len=numbers["seq_len"],
            concurrency=numbers["concurrency"],
            sequences=numbers["sequences"],
            checkpoints=None if checkpoints is None else checked_integer("checkpoints", checkpoints, 0, LONGEST),
            encoder_tokens=checked_integer("encoder_tokens", encoder_tokens, 0, LONGEST),
            max_groups=checked_integer("max_groups", max_groups, 1, LONGEST),
            step_tokens=steps,
            engine=engine,
            swa_full=swa_full,
        )
    )
    return made if card is None or tp is not None else _split(made)


# --- the arguments


def _checked_numbers(**numbers: Any) -> dict[str, int | None]:
    """The integers among the arguments, which may be left out, each at least 1 where it is given."""
    return {
        name: None if value is None else checked_integer(name, value, 1, LONGEST) for name, value in numbers.items()
    }


def _check_engine_arguments(engine: Engine, swa_full: bool, stored: Stored) -> None:
    """Raises TypeError or ValueError for what an engine does not have."""
    if not isinstance(swa_full, bool):
        raise TypeError(f"swa_full={swa_full!r:.60} is of type {type(swa_full).__name__}; give a bool")
    if swa_full and engine != "llama.cpp":
        raise ValueError(f"engine={engine!r}: only llama.cpp has --swa-full (swa_full)")
    if engine != "kvblocks" and stored != "exact":
        raise ValueError(f"stored={stored!r:.60} counts transformers' caches, and engine={engine!r}; give one of them")


def _cards(gpu: str | None, memory: Any) -> tuple[str | None, int | None, Any]:
    """The card, how many there are (None for as many as are needed), and the memory of one."""
    if gpu is None:
        return None, None, memory
    card, cards = parse_gpu(gpu)
    if memory is not None:
        raise ValueError(f"memory={memory!r:.60} and gpu={gpu!r}: the card says its memory; give one of them")
    return card, cards, card_memory(card)


def _block_size(given: int | None, engine: Engine, shape: ModelCache) -> int:
    """Tokens in a block: as given, the engine's own, or 16 or the fewest more that the model's layers allow."""
    entries = [kept for layer in shape.layers for kept in layer.kept]
    size = given or engine_block_size(engine, shape) or math.lcm(_BLOCK_SIZE, *(kept.every for kept in entries))
    for kept in entries:
        if size % kept.every:
            raise ValueError(
                f"block_size={size} is no multiple of {kept.every}, the tokens that share an entry of the "
                f"{kept.name} of {shape.name}"
            )
    return size


# --- the model


def _shapes(source: Source, mla: str, stored: Stored) -> tuple[ModelCache, ModelCache | None]:
    """What the model keeps with `mla`, and with the other value of it where that is something else.

    Raises:
        ValueError: transformers' caches are asked for, and keep nothing, or not what `mla` says.
    """
    shape = source.read(mla)
    if stored == "transformers" and shape.uncached is not None:
        raise ValueError(f"stored='transformers': {shape.uncached}")
    keeps_latents = any(kept.name == "latent" for layer in shape.layers for kept in layer.kept)
    other = source.read("expanded" if keeps_latents else "latent")
    if other == shape:
        return shape, None
    if stored == "transformers" and mla == "expanded":
        raise ValueError(
            f"stored='transformers' with mla='expanded': transformers' cache of {shape.name} keeps the latent and the "
            f"rotated key; give mla='latent' for its bytes, or stored='exact' for those of expanded heads"
        )
    return shape, other


def _dtypes(dtype: Any, engine: Engine, source: Source, shape: ModelCache) -> tuple[Any, str | None, list[str]]:
    """The dtype of K and V that is asked for (None for the model's), the model's, and what a reader should know.

    "auto" is what the checkpoint asks for. Where nobody names a dtype the model's is bfloat16.
    """
    notes = []
    asks = None if source.config is None else cache_dtype(source.config)
    if isinstance(dtype, str) and dtype == "auto":
        dtype = asks
    elif dtype is None and asks is not None:
        notes.append(f"the checkpoint asks for K and V in {asks} (kv_cache_scheme); dtype='auto' counts them so")
    if dtype is None and engine == "llama.cpp":
        dtype = "float16"  # whatever the model computes in
    if dtype is not None or shape.dtype is not None:
        return dtype, shape.dtype, notes
    notes.append("no dtype is named: K and V are taken to be bfloat16; give dtype where they are not")
    return None, "bfloat16", notes


def _state_dtype(shape: ModelCache, asked: str | None) -> str | None:
    """Of state without a dtype of its own: K and V's, where that is one to compute in, else the model's."""
    name = asked or shape.dtype
    if name is None:
        if any(state.dtype is None for layer in shape.layers for state in layer.states):
            raise ValueError(
                f"the state of {shape.name} has the model's dtype, which its config does not name; set its dtype"
            )
        return None
    return dtype_name(name)


def _share(utilization: float | str) -> Fraction:
    """The share as it is written: 0.9 is 9/10, not the float next to it."""
    if isinstance(utilization, str) and "%" in utilization:
        try:
            share = parse_share(utilization)
        except ValueError as error:
            raise ValueError(f"utilization={error}") from None
    elif isinstance(utilization, bool) or not isinstance(utilization, int | float):
        raise TypeError(
            f"utilization={utilization!r:.60} is of type {type(utilization).__name__}; give a number up to 1, or '90%'"
        )
    elif not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization} is outside 0 (not included) to 1")
    else:
        share = Fraction(repr(float(utilization)))
    if not 0 < share <= 1:
        raise ValueError(f"utilization={utilization!r} is outside 0% (not included) to 100%")
    return share


def _length(value: Any) -> Any:
    """The tokens that a text like "32k" stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_length(value)
    except ValueError as error:
        raise ValueError(f"seq_len={error}") from None


def _memory(memory: Any, used: Fraction) -> int | None:
    if f"{type(memory).__module__}.{type(memory).__qualname__}" == "torch.device":
        memory = str(memory)
    size = _free_memory(memory) if isinstance(memory, str) and _is_device(memory) else _size("memory", memory)
    return None if size is None else int(size * used)


def _is_device(text: str) -> bool:
    return text.partition(":")[0] in ("cpu", "cuda")


def _free_memory(device: str) -> int:
    if device.partition(":")[0] == "cpu":
        if device not in ("cpu", "cpu:0"):
            raise ValueError(f"memory={device!r:.60}: there is one CPU; give 'cpu'")
        from kvblocks.memory import available_memory

        return available_memory()
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"memory={device!r:.60}: torch finds no CUDA device here; give a size like '80GiB'")
    try:
        free, _ = torch.cuda.mem_get_info(torch.device(device))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"memory={device!r:.60}: {error}") from None
    return free


def _size(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        size = parse_size(value, name)
        if value.strip().isdecimal() and 0 < size < 2**20:
            raise ValueError(
                f"{name}={value!r} has no unit; give {value.strip()}GiB where these are GiB, or {value.strip()}B where "
                f"they are bytes"
            )
        return size
    return checked_integer(name, value, 0, 2**63 - 1)


def _weights(weights: int | str | None, dtype: Any, source: Source, shape: ModelCache) -> tuple[int, list[str]]:
    """Bytes of all weights, and what a reader should know about them, a sentence each."""
    if weights != "auto":
        if dtype is not None:
            raise ValueError(
                f"weights_dtype={dtype!r:.60} is for weights='auto'"
                + ("" if weights is None else f"; weights={weights!r:.60} says the bytes itself")
            )
        return _size("weights", weights) or 0, []
    from kvblocks.planner.quantized import quantization_of
    from kvblocks.planner.weights import prediction_layers, quantized_weight_bytes, weight_bytes

    if source.config is None and source.origin is None:
        raise ValueError("weights='auto' needs a config; plain numbers do not say what a model's weights are")
    if dtype is None:
        stored = None if source.origin is None else checkpoint_of(source.origin, len(shape.layers))
        if stored is not None:
            ahead = 0 if source.config is None else prediction_layers(source.config)
            return stored.total, [_checkpoint_note(stored, ahead)]
    if source.config is None:
        raise ValueError(f"weights_dtype={dtype!r:.60}: a GGUF file's weights are as they are stored; leave it out")
    notes = []
    asked = quantization_of(source.config) if dtype is None else None
    if dtype is None and shape.dtype is None:
        notes.append("no dtype is named: weights are taken to be bfloat16; give weights_dtype where they are not")
    format = _weights_format(dtype) if dtype is not None else format_of(shape.dtype or "bfloat16")
    if asked is None:
        counted = weight_bytes(source.config, format)
    else:
        counted, note = quantized_weight_bytes(source.config, asked[0], len(shape.layers), format, text_only=asked[1])
        notes.append(note)
    ahead = prediction_layers(source.config)
    if ahead:
        notes.append(f"weights are counted without {count(ahead, 'layer')} for multi-token prediction")
    return counted, notes


def _weights_format(dtype: Any) -> Format:
    """The format that weights are asked for in, which is one."""
    try:
        format = format_of(dtype)
    except TypeError as error:
        known = str(error).partition("; ")[2]
        raise TypeError(f"weights_dtype={dtype!r:.60} is not one to count weights in; {known}") from None
    if format.values is not None:
        raise ValueError(f"weights_dtype={dtype!r:.60} names two dtypes; give one")
    return format


def _checkpoint_note(stored: Checkpoint, ahead: int) -> str:
    """What a reader should know of weights that were read; `ahead` layers for multi-token prediction may be in them."""
    note = f"weights are those of the checkpoint, by {stored.source}"
    if stored.ahead:
        return f"{note}; {amount(stored.ahead)} of them are of layers for multi-token prediction"
    if stored.ahead is None and ahead:
        return f"{note}; with {count(ahead, 'layer')} for multi-token prediction, where it holds them"
    return note


# --- several cards


def _split(plan: Plan) -> Plan:
    """The plan over its cards: the split that holds the most, or where no number of cards is given the fewest."""
    if plan.settings.gpus is not None:
        best = best_split(splits(plan))
        return plan.replaced(tp=best.tp, copies=best.copies)
    fewest = fewest_devices(plan) if len(plan.settings.stages) == 1 else None
    return plan if fewest is None else plan.replaced(tp=fewest.settings.tp, stages=fewest.settings.stages)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r:.60} is not one of {', '.join(allowed)}")
