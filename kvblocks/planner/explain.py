"""A plan in sentences: every figure with its line of arithmetic. All figures are those of `Figures`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvblocks.config import Chunk, tensor_itemsize
from kvblocks.formats import Format
from kvblocks.models.grouping import BlockGroup
from kvblocks.models.shapes import Kept, Layer, Reach
from kvblocks.planner.advice import smallest_changes
from kvblocks.planner.figures import LONGEST, Figures, Stage
from kvblocks.planner.splits import best_split, splits
from kvblocks.planner.text import amount, count

__all__ = ["Line", "explain", "lines", "notes", "reach_text", "title", "to_dict", "verdict"]


@dataclass(frozen=True)
class Line:
    """One figure.

    Args:
        name: of the figure.
        arithmetic: that leads to it, or a remark; empty for a figure that is given.
        value: the figure in words.
    """

    name: str
    arithmetic: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}: {self.arithmetic} = {self.value}" if self.arithmetic else f"{self.name}: {self.value}"


def explain(plan: Figures) -> str:
    """The plan, a figure to a line, then remarks, then what is missing and what would help."""
    found = [title(plan), *map(str, lines(plan)), *notes(plan), *verdict(plan)]
    return "\n".join(found)


def title(plan: Figures) -> str:
    """The model, and how it is stored."""
    settings = plan.settings
    parts = [count(len(plan.model.layers), "layer"), f"K and V in {_format_text(plan)}", f"blocks of {plan.block_size}"]
    if settings.engine != "kvblocks":
        parts.append(f"as {settings.engine} keeps it")
    if settings.tp > 1:
        parts.append(f"tp={settings.tp}")
    if len(settings.stages) > 1:
        parts.append(f"pp={len(settings.stages)}")
    if settings.gpu is not None:
        parts.append(f"{settings.gpus or settings.tp * len(settings.stages)} × {settings.gpu}")
    return f"{plan.model.name}: {', '.join(parts)}"


def _format_text(plan: Figures) -> str:
    format = plan.settings.format
    if format.values is not None:
        return plan.dtype
    if format.group_size is None:
        return format.name
    zero = " and zero point" if format.zero_point else ""
    return f"{format.name} with a {format.scale_dtype} scale{zero} for each {format.group_size}"


# --- arithmetic


def lines(plan: Figures) -> list[Line]:
    """Every figure of the plan."""
    stage = plan.stage
    found: list[Line] = []
    if stage.token_bytes:
        found.append(Line("per token", _terms(stage, stage.layers), f"{stage.token_bytes:,} B"))
        found += [_group_line(stage, group) for group in stage.layout.groups]
        if len(stage.layout.groups) > 1:
            found.append(
                Line(
                    "per block",
                    f"{_of_groups(stage)} of {len(stage.layout.groups)} groups",
                    f"{amount(stage.block_bytes)} per block",
                )
            )
        length = plan.settings.reference_len
        found.append(
            Line(
                "waste",
                f"at {length:,} tokens, padding and part-filled blocks",
                f"{plan.waste():.2%} (every layer keeping every token: {plan.uniform_waste():.2%})",
            )
        )
    if stage.state_bytes:
        found.append(Line("state per sequence", _state_terms(stage), f"{stage.state_bytes:,} B"))
    if plan.num_states:
        found.append(Line("states", _slot_terms(plan), count(plan.num_states, "slot")))
    found += _memory_lines(plan)
    found += _answers(plan)
    if plan.settings.gpu is not None:
        found += _split_lines(plan)
    return found


def _split_lines(plan: Figures) -> list[Line]:
    """Every size of tensor parallelism in a line, and which is best."""
    settings, found = plan.settings, splits(plan)
    best = best_split(found)
    made = []
    for split in found:
        cards = count(split.tp * len(settings.stages), "card")
        copies = f"{count(split.copies, 'copy', 'copies')} on " if settings.gpus and split.sequences else ""
        blocks = split.plan.num_blocks
        room = f"{blocks:,} blocks" if blocks else "room for no block" if split.plan.block_bytes else "state alone"
        room = f"room for {split.plan.max_tokens:,} tokens" if blocks is None else room
        held = f"{split.sequences:,} sequences of {settings.reference_len:,} at once"
        marked = f"{held}, the best" if split is best and split.holds else held
        what = (
            f"{copies}{cards}{' each' if copies else ''}, with {amount(split.plan.weights_bytes)} of weights and {room}"
        )
        made.append(Line(f"tp={split.tp}", what, marked))
    return made


def _of_groups(stage: Stage) -> str:
    if not stage.layout.pooled:
        return "all"
    return "each" if stage.settings.engine == "vllm" else "the largest"


def _group_line(stage: Stage, group: BlockGroup) -> Line:
    size = stage.block_size
    chosen = {layer.index for layer in group.layers}
    layers = [layer for layer in stage.layers if layer.index in chosen]
    terms = _terms(stage, layers, reach=group.reach, only=True)
    what = f"{terms} × {size} tokens" if " + " not in _outside(terms) else f"({terms}) × {size} tokens"
    alone = len(stage.layout.groups) == 1
    name = "per block" if alone else f"block of {count(len(group.layers), 'layer')}, {reach_text(group.reach)}"
    return Line(name, what, f"{amount(group.block_bytes)}{' per block' if alone else ''}")


def _outside(terms: str) -> str:
    """What stands outside parentheses."""
    depth, kept = 0, []
    for letter in terms:
        depth += (letter == "(") - (letter == ")")
        if not depth:
            kept.append(letter)
    return "".join(kept)


def _terms(stage: Stage, layers: Iterable[Layer], *, reach: Reach = None, only: bool = False) -> str:
    """`32 layers × 8 heads × (128 + 128) × 2 B`, one such for each kind of layer."""
    numbers: dict[tuple[Any, ...], int] = {}
    for layer in layers:
        kept = [one for one in layer.kept if not only or one.reach == reach]
        for same in _alike(kept):
            here = stage.settings.heads(same[0].heads, same[0].queries)[0]
            sizes = tuple((one.dim, one.stored_in(stage.settings.format)) for one in same)
            key = (here, same[0].dtype, same[0].every, sizes)
            numbers[key] = numbers.get(key, 0) + 1
    return " + ".join(_term(number, *key) for key, number in numbers.items())


def _alike(kept: Sequence[Kept]) -> list[list[Kept]]:
    """Tensors of one layer that have one number of heads, together."""
    found: dict[tuple[Any, ...], list[Kept]] = {}
    for one in kept:
        found.setdefault((one.heads, one.queries, one.dtype, one.every), []).append(one)
    return list(found.values())


def _term(number: int, here: int, dtype: str | None, every: int, sizes: tuple[tuple[int, Format], ...]) -> str:
    dims, (_, format) = [dim for dim, _ in sizes], sizes[0]
    if dtype is not None:
        numbers = f"{_sum(dims)} × {tensor_itemsize(dtype)} B"
    elif format.bits % 8 == 0 and format.group_size is None and format.values is None:
        numbers = f"{_sum(dims)} × {format.bits // 8} B"
    else:
        numbers = f"{_sum([own.vector_bytes(dim) for dim, own in sizes])} B"
    rate = f" / {every} tokens" if every > 1 else ""
    return f"{count(number, 'layer')} × {count(here, 'head')} × {numbers}{rate}"


def _sum(dims: Sequence[int]) -> str:
    return f"({' + '.join(map(str, dims))})" if len(dims) > 1 else str(dims[0])


def _state_terms(stage: Stage) -> str:
    settings = stage.settings
    numbers: dict[tuple[str, int, int], int] = {}
    for layer in stage.layers:
        for state in layer.states:
            size = sum(settings.heads(units)[0] * each for units, each in state.kept_parts("exact"))
            key = (state.name, size, tensor_itemsize(state.dtype or settings.state_dtype or ""))
            numbers[key] = numbers.get(key, 0) + 1
    terms = [
        f"{count(number, 'layer')} × {size:,} × {each} B ({name})" for (name, size, each), number in numbers.items()
    ]
    if stage.cross_bytes:
        crossing = [Layer(layer.index, layer.kind, layer.cross) for layer in stage.layers]
        terms.append(f"({_terms(stage, crossing)}) × {settings.encoder_tokens:,} encoder tokens")
    return " + ".join(terms)


def _slot_terms(plan: Figures) -> str:
    """`8 sequences + 8 checkpoints`, with a word on where the number of sequences comes from."""
    settings, terms = plan.settings, count(plan.running or 0, "sequence")
    if settings.running is None:
        terms += f" of {settings.usual_len:,} tokens, as many as fit"
    return f"{terms} + {count(plan.checkpoints or 0, 'checkpoint')}"


def _fixed_terms(plan: Figures, stage: Stage, running: int) -> list[str]:
    """What is set aside for so many sequences on a stage, whatever their length."""
    terms = [f"{count(running, 'sequence')} × {stage.state_bytes:,} B state"] if running and stage.state_bytes else []
    checkpoints = stage.checkpoints(running)
    return terms + ([f"{count(checkpoints, 'checkpoint')} × {stage.slot_bytes:,} B"] if checkpoints else [])


def _memory_lines(plan: Figures) -> list[Line]:
    settings, stage = plan.settings, plan.stage
    found = []
    if settings.weights:
        devices = settings.tp * len(settings.stages)
        share = f"{amount(settings.weights)} / {devices} devices" if devices > 1 else ""
        found.append(Line("weights", share, amount(stage.weights)))
    if settings.memory is None:
        return found
    taken = [amount(settings.memory)]
    taken += [f"{amount(stage.weights)} weights"] if settings.weights else []
    taken += [f"{amount(settings.activations)} activations"] if settings.activations else []
    running = plan.running or 0
    taken += _fixed_terms(plan, stage, running)
    room = (stage.room or 0) - stage.fixed_bytes(running)
    found.append(Line("memory for the cache", " - ".join(taken) if len(taken) > 1 else "", amount(room)))
    paged = [one for one in plan.stages if one.block_bytes]
    if paged and plan.num_blocks is not None:
        tight = min(
            paged, key=lambda one: one.num_blocks(running) or 0
        )  # the stage that has the fewest, which may be another
        room = (tight.room or 0) - tight.fixed_bytes(running)
        whole = f"{room:,} B / {tight.block_bytes:,} B, whole blocks"
        whole += f" of stage {plan.stages.index(tight)}" if tight.block_bytes != stage.block_bytes else ""
        found.append(Line("blocks", whole, f"{plan.num_blocks:,}"))
    return found


def _answers(plan: Figures) -> list[Line]:
    settings, stage = plan.settings, plan.stage
    sequences, length = settings.each, settings.seq_len
    found = []
    if length is not None:
        each = plan.sequence_bytes(length)
        blocks = plan.blocks_for(length)
        state = f" + {stage.state_bytes:,} B state" if stage.state_bytes else ""
        terms = f"{count(blocks, 'block')} × {stage.block_bytes:,} B{state}"
        if not stage.layout.pooled and len(stage.layout.groups) > 1:
            terms = f"each group's own blocks{state}"
        found.append(
            Line(
                f"sequence of {length:,}",
                terms,
                f"{amount(each)}{_past(plan, length)}",
            )
        )
        if sequences is not None:
            needed = plan.memory_for(sequences, length)
            besides = [amount(stage.weights) + " weights"] if stage.weights else []
            besides += [amount(settings.activations) + " activations"] if settings.activations else []
            idle = max(0, (settings.sequences or 0) - sequences)
            besides += [f"{count(idle, 'more sequence')} × {stage.state_bytes:,} B state"] if idle else []
            checkpoints = stage.checkpoints(sequences + idle)
            besides += [f"{count(checkpoints, 'checkpoint')} × {stage.slot_bytes:,} B"] if checkpoints else []
            terms = " + ".join([f"{count(sequences, 'sequence')} × {amount(each)}", *besides])
            found.append(Line("memory needed", terms, amount(needed)))
    if settings.memory is None:
        return found
    found.append(Line("longest sequence", "alone in the cache", _length_text(plan, plan.max_seq_len(1))))
    if length is not None:
        found.append(Line(f"sequences of {length:,} at once", "", f"{plan.max_concurrency(length):,}"))
    if sequences is not None and sequences > 1:
        found.append(Line(f"longest of {sequences:,} sequences", "", _length_text(plan, plan.max_seq_len(sequences))))
    return found


def _length_text(plan: Figures, length: int) -> str:
    return "no bound: the cache stops growing" if length == LONGEST else count(length, "token") + _past(plan, length)


def _past(plan: Figures, length: int) -> str:
    """A remark beside a figure at a length that the model was not made for."""
    longest = plan.model.max_seq_len
    if longest is None or length <= longest:
        return ""
    return f" (the model was made for {count(longest, 'token')})"


def reach_text(reach: Reach) -> str:
    """How far a group attends, in words."""
    if reach is None:
        return "full attention"
    return f"{'chunks' if isinstance(reach, Chunk) else 'a window'} of {reach.size:,}"


# --- remarks


def notes(plan: Figures) -> list[str]:
    """What a reader should know besides."""
    settings, stage = plan.settings, plan.stage
    found = [f"note: {note}" for note in settings.model.notes]
    if settings.seq_len is not None and (remark := _past(plan, settings.seq_len)):
        found.append(f"note: {settings.model.name}: {settings.seq_len:,} tokens{remark}")
    copies: dict[str, set[str]] = {}
    for layer in stage.layers:
        for kept in (*layer.kept, *layer.cross):
            share, copied = settings.heads(kept.heads, kept.queries)
            if copied == kept.heads:
                continue
            if share * settings.tp == copied and copied % kept.heads == 0:
                where = "each device"
                how = f"cannot be split that far; a head is kept {copied // kept.heads} times"
            else:
                where = "the fullest device"
                how = f"do not split evenly; a head is kept wherever its queries are, {copied} in all"
            copies.setdefault(how, set()).add(f"{kept.name} ({count(kept.heads, 'head')}, {share} on {where})")
    for how, names in sorted(copies.items()):
        found.append(f"note: tp={settings.tp}: {', '.join(sorted(names))} {how}")
    shared = [layer for layer in settings.model.layers if layer.reads is not None]
    if shared:
        found.append(f"note: {count(len(shared), 'layer')} read what another layer keeps, and keep nothing")
    if settings.model.has_cross_attention and not settings.encoder_tokens:
        found.append("note: without what cross-attention keeps of an encoder or an image; give encoder_tokens")
    found += _card_notes(plan)
    if settings.weights and settings.tp * len(settings.stages) > 1:
        found.append("note: weights are counted as if they split evenly over all devices")
    format = settings.format
    if format.bits < 16 and format.group_size is None:
        found.append(f"note: no scales of {format.name} are counted, as where one serves a whole tensor")
    if len(settings.stages) > 1:
        index = plan.stages.index(stage)
        found.append(
            f"note: figures are of pipeline stage {index}, layers {stage.layers[0].index} to {stage.layers[-1].index}, "
            f"which takes the most"
        )
    if stage.state_bytes and settings.memory is not None and not plan.running:
        found.append("note: no state is set aside before blocks are counted; give sequences to do so")
    return found


def _card_notes(plan: Figures) -> list[str]:
    settings = plan.settings
    if settings.gpu is None:
        return []
    devices = settings.tp * len(settings.stages)
    if not any(split.sequences for split in splits(plan)):
        found = [f"note: no size of tensor parallelism holds a sequence of {settings.reference_len:,} tokens"]
    elif settings.copies > 1:
        split = f"{settings.copies} copies of the model on {count(devices, 'card')} each; figures are of one copy"
        if settings.concurrency is not None:
            split += f", which holds {settings.each:,} of the {settings.concurrency:,} sequences"
        found = [f"note: {split}"]
    elif settings.gpus is None and plan.fits:
        cards = count(devices, settings.gpu + " card")
        found = [f"note: {cards} needed, the fewest of 1, 2, 4 and whole nodes of 8 that hold what is asked for"]
    else:
        found = []
    if not settings.weights:
        found.append("note: no weights are counted, which decide how many cards are needed; give weights")
    return found


def verdict(plan: Figures) -> list[str]:
    """Nothing where the plan fits, else what is missing and the three smallest changes that would make it fit."""
    if plan.fits:
        return []
    sequences, length = plan.target
    found = [
        f"does not fit: {count(sequences, 'sequence')} of {count(length, 'token')} "
        f"{'needs' if sequences == 1 else 'need'} {plan.memory_for(sequences, length):,} B, "
        f"there are {plan.memory or 0:,} B{_share_text(plan)}; "
        f"{plan.missing_bytes:,} B ({amount(plan.missing_bytes)}) are missing"
    ]
    if plan.settings.sequences is not None and sequences > plan.settings.sequences:
        found.append(f"does not fit: state is set aside for {count(plan.settings.sequences, 'sequence')} only")
    changes = smallest_changes(plan)
    if changes:
        found.append("it would fit with one of these:")
        found += [f"  {i}. {change.what}" for i, change in enumerate(changes, 1)]
    return found


def _share_text(plan: Figures) -> str:
    used = plan.settings.utilization
    if used == 1:
        return ""
    return (
        f" with utilization={float(used):g}, which leaves {amount(int((plan.memory or 0) * (1 - used) / used))} unused"
    )


def to_dict(plan: Figures) -> dict[str, Any]:
    """All figures, as JSON takes them; bytes are integers, and what was not asked for is None."""
    settings, stage = plan.settings, plan.stage
    asked = settings.memory is not None
    length, sequences = settings.seq_len, settings.each
    found = splits(plan) if settings.gpu is not None else ()
    best = best_split(found) if found else None
    return {
        "model": plan.model.name,
        "dtype": plan.dtype,
        "group_size": settings.format.group_size,
        "block_size": plan.block_size,
        "tp": settings.tp,
        "pp": list(settings.stages),
        "mla": settings.mla,
        "stored": settings.stored,
        "engine": settings.engine,
        "bytes_per_token": plan.bytes_per_token,
        "block_bytes": plan.block_bytes,
        "state_bytes": plan.state_bytes,
        "sequences": plan.running,
        "checkpoints": plan.checkpoints,
        "num_states": plan.num_states,
        "groups": [
            {
                "reach": reach_text(group.reach),
                "window": None if group.reach is None else group.reach.size,
                "layers": [layer.index for layer in group.layers],
                "block_bytes": group.block_bytes,
            }
            for group in stage.layout.groups
        ],
        "waste": plan.waste(),
        "uniform_waste": plan.uniform_waste(),
        "memory": settings.memory,
        "weights_bytes": stage.weights,
        "activation_bytes": settings.activations,
        "num_blocks": plan.num_blocks,
        "max_tokens": plan.max_tokens,
        "seq_len": length,
        "concurrency": settings.concurrency,
        "gpu": settings.gpu,
        "gpus": settings.gpus or (settings.tp * len(settings.stages) if settings.gpu else None),
        "copies": settings.copies,
        "splits": [
            {
                "tp": split.tp,
                "copies": split.copies,
                "num_blocks": split.plan.num_blocks,
                "sequences": split.sequences,
                "fits": split.plan.fits,
                "best": split is best and split.holds,
            }
            for split in found
        ],
        "sequence_bytes": plan.sequence_bytes(length) if length is not None else None,
        "cache_bytes": plan.cache_bytes(length) if length is not None else None,
        "memory_needed": plan.memory_for(sequences, length) if length is not None and sequences is not None else None,
        "max_concurrency": plan.max_concurrency(length) if asked and length is not None else None,
        "max_seq_len": plan.max_seq_len(sequences or 1) if asked else None,
        "fits": plan.fits,
        "missing_bytes": plan.missing_bytes,
        "changes": [
            {"what": change.what, "setting": change.setting, "value": change.value} for change in smallest_changes(plan)
        ],
        "lines": [{"name": line.name, "arithmetic": line.arithmetic, "value": line.value} for line in lines(plan)],
        "notes": [note.removeprefix("note: ") for note in notes(plan)],
        "verdict": verdict(plan),
    }
