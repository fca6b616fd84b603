"""`Figures`: what a model's cache takes, and what fits. All figures are of one device, the fullest of its stage.

Knows no config and no file: `kvblocks.models.read` makes the `ModelCache`, `kvblocks.planner.explain` the sentences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Literal, Self

from kvblocks.config import CacheConfig, Group, LayerTensor, tensor_itemsize
from kvblocks.formats import Format, dtype_name, format_of, narrower
from kvblocks.models.grouping import (
    MOST_GROUPS,
    BlockGroup,
    Layout,
    PagedLayer,
    model_groups,
    paged_layers,
    uniform_bytes,
)
from kvblocks.models.shapes import Kept, Layer, ModelCache, Stored
from kvblocks.planner.engines import Engine, engine_layers, engine_layout, hybrid_block_size
from kvblocks.planner.parallel import check_tp
from kvblocks.sizes import checked_integer

__all__ = ["LONGEST", "Figures", "Settings", "Stage"]

LONGEST = 2**31 - 1  # tokens of a sequence, and blocks of a pool
_NAMES = {"K": "key", "V": "value"}  # as attention knows them
_groups = lru_cache(maxsize=64)(model_groups)  # which depend on the layers alone, and advice tries many splits of them


@dataclass(frozen=True)
class Settings:
    """Everything that a plan follows from.

    Args:
        model: what the model keeps.
        format: of K and V.
        state_dtype: dtype of the state that follows the model's own dtype; None where the model has no such state.
        other_mla: what the model would keep with the other value of `mla`; None where `mla` changes nothing.
        memory: bytes of one device that may be used; None for a plan without a memory.
        utilization: the share of the device's memory that `memory` is.
        block_size: tokens in a block.
        tp: devices over which heads are split.
        stages: layers of each pipeline stage.
        mla: "latent" or "expanded".
        stored: whose caches `cache_bytes` counts, "exact" or "transformers".
        weights: bytes of all of the model's weights; 0 where they are not counted.
        activations: bytes set aside on each device.
        seq_len, concurrency: what has to fit: `concurrency` sequences of `seq_len` tokens, over all copies.
        gpu: name of the card whose memory `memory` is; None where no card was named.
        gpus: number of cards; None for as many as the split takes.
        copies: copies of the model, each on its own devices; figures are those of one copy.
        sequences: sequences that run at once, whose state is set aside before blocks are counted; None for those that
            are asked for.
        checkpoints: states that are set aside beside those, for prefixes; None for one a sequence.
        encoder_tokens: tokens of an encoder or an image whose K and V cross-attention keeps.
        max_groups: layer groups at most; each has its own block table.
        step_tokens: tokens that one step writes for a sequence, at most.
        engine: whose pages, paddings and packings are counted.
        swa_full: whether llama.cpp keeps every token in windowed layers.

    Raises:
        ValueError: query heads that `tp` devices cannot share evenly.
    """

    model: ModelCache
    format: Format
    state_dtype: str | None
    other_mla: ModelCache | None = None
    memory: int | None = None
    utilization: Fraction = Fraction(1)
    block_size: int = 16
    tp: int = 1
    stages: tuple[int, ...] = ()
    mla: str = "latent"
    stored: Stored = "exact"
    weights: int = 0
    activations: int = 0
    seq_len: int | None = None
    concurrency: int | None = None
    gpu: str | None = None
    gpus: int | None = None
    copies: int = 1
    sequences: int | None = None
    checkpoints: int | None = None
    encoder_tokens: int = 0
    max_groups: int = MOST_GROUPS
    step_tokens: int = 1
    engine: Engine = "kvblocks"
    swa_full: bool = False

    def __post_init__(self) -> None:
        check_tp(self.model, self.tp)

    @property
    def reference_len(self) -> int:
        """The tokens of a sequence by default: those that are asked for, else the model's longest, else 32k."""
        return self.seq_len or self.model.max_seq_len or 32768

    @property
    def each(self) -> int | None:
        """Sequences that are asked for of one copy of the model."""
        return None if self.concurrency is None else math.ceil(self.concurrency / self.copies)

    @property
    def running(self) -> int | None:
        """Sequences that run at once, as far as that is asked for."""
        return self.each if self.sequences is None else self.sequences

    @property
    def usual_len(self) -> int:
        """The tokens of the sequences that run, where it is not said how many do: as asked for, else up to 32k."""
        return self.seq_len or min(self.reference_len, 32768)

    def heads(self, heads: int, queries: int | None = None) -> tuple[int, int]:
        """How many of `heads` K and V heads the fullest device keeps, and all devices together, each copy counted.

        All devices have equally many of the `queries` query heads, in order, and keep each head that one of theirs
        reads. Where `queries` is None, all devices keep equally many.
        """
        shares = math.gcd(heads, self.tp)
        if queries is None:
            return heads // shares, heads // shares * self.tp
        here, sharing = queries // self.tp, queries // heads
        # Devices start at multiples of `here`. The worst device starts just before the last queries of a KV head.
        left = math.gcd(here, sharing)
        return 1 + math.ceil((here - left) / sharing), heads + self.tp - shares


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, on the fullest of its devices.

    Args:
        settings: of the plan.
        layers: of the model that it runs.
    """

    settings: Settings
    layers: tuple[Layer, ...]

    def entry_bytes(self, kept: Kept, *, stored: bool = False) -> int:
        """Bytes of one entry on the fullest device; `stored` for the heads that transformers' caches keep."""
        heads = kept.heads
        if stored and kept.stored_heads is not None:
            heads = kept.stored_heads
        return kept.entry_bytes(self.settings.format, self.settings.heads(heads, kept.queries)[0])

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in reach of every layer; a compressed entry is divided among the tokens it stands for."""
        rates = math.lcm(*(kept.every for layer in self.layers for kept in layer.kept))
        whole = sum(self.entry_bytes(kept) * (rates // kept.every) for layer in self.layers for kept in layer.kept)
        return math.ceil(whole / rates)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of state of one sequence, whatever its length, cross-attention included."""
        in_pages = self.settings.engine == "vllm" and bool(self.paged)
        return self.cross_bytes + (0 if in_pages else sum(self.layer_states))

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot of the states of all layers; 0 where layers have none, or an engine has no slots."""
        return sum(self.layer_states) if self.settings.engine == "kvblocks" else 0

    def checkpoints(self, running: int) -> int:
        """Checkpoints that are set aside beside the states of so many sequences.

        One hangs on the block that ends where it stands: without blocks there are none.
        """
        if not self.slot_bytes or not self.paged:
            return 0
        return running if self.settings.checkpoints is None else self.settings.checkpoints

    def fixed_bytes(self, running: int) -> int:
        """Bytes set aside for so many sequences whatever their length: their state, and checkpoints."""
        return running * self.state_bytes + self.checkpoints(running) * self.slot_bytes

    @cached_property
    def layer_states(self) -> tuple[int, ...]:
        """Bytes of the state of each layer that keeps one."""
        sizes = (self._state([layer], LONGEST, "exact") for layer in self.layers)
        return tuple(size for size in sizes if size)

    @cached_property
    def cached_layers(self) -> tuple[Layer, ...]:
        """The layers that keep something in blocks or in a slot of states, those of a `CacheConfig`."""
        return tuple(layer for layer in self.layers if layer.kept or self._state([layer], LONGEST, "exact"))

    @cached_property
    def cross_bytes(self) -> int:
        """Bytes that cross-attention keeps of one sequence's encoder or image."""
        entries = sum(self.entry_bytes(kept) for layer in self.layers for kept in layer.cross)
        return entries * self.settings.encoder_tokens

    def _state(self, layers: Sequence[Layer], num_tokens: int, stored: Stored) -> int:
        total = 0
        for layer in layers:
            for state in layer.states:
                dtype = state.dtype or self.settings.state_dtype
                if dtype is None:
                    raise ValueError(f"{state.name} follows the model's dtype, which is not known")
                numbers = sum(self.settings.heads(units)[0] * each for units, each in state.kept_parts(stored))
                part, whole = state.entries(num_tokens, stored)
                total += numbers * part // whole * tensor_itemsize(dtype)
        return total

    def cache_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of `num_tokens` tokens, unpadded, as `settings.stored` keeps it."""
        if not num_tokens:
            return 0
        stored = self.settings.stored
        kept = sum(
            self.entry_bytes(kept, stored=stored == "transformers") * kept.entries(num_tokens, stored)
            for layer in self.layers
            for kept in layer.kept
        )
        return kept + self._state(self.layers, num_tokens, stored) + self.cross_bytes

    @cached_property
    def paged(self) -> tuple[PagedLayer, ...]:
        """What every layer puts into blocks, one entry for each of its reaches."""
        return paged_layers(self.layers, self.block_size, self.entry_bytes)

    @cached_property
    def block_size(self) -> int:
        """Tokens in a block: as it is set, or for vLLM as many more as its hybrids need."""
        size = self.settings.block_size
        if self.settings.engine != "vllm":
            return size
        return hybrid_block_size(paged_layers(self.layers, size, self.entry_bytes), self.layer_states, size)

    @cached_property
    def layout(self) -> Layout:
        """The stage's layers in the groups that the model gives them."""
        s = self.settings
        if s.engine != "kvblocks":
            states = self.layer_states if s.engine == "vllm" and self.paged else ()
            return engine_layout(s.engine, self.paged, states, self.block_size, s.step_tokens)
        stored = {(layer.reach, layer.index): layer for layer in self.paged}
        groups = tuple(
            BlockGroup(reach, tuple(stored[reach, index] for index in indices))
            for reach, indices in _groups(self.layers, s.model.max_seq_len, s.max_groups)
        )
        return Layout(groups, s.block_size, s.step_tokens)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool."""
        return self.layout.block_bytes

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence in whole blocks, with its state."""
        if not num_tokens:
            return 0
        return self.paged_bytes(1, num_tokens) + self.state_bytes

    def paged_bytes(self, count: int, num_tokens: int) -> int:
        """Bytes of `count` sequences in whole blocks, without their state."""
        return self.layout.bytes_for(count, num_tokens + self.extra_tokens)

    @cached_property
    def extra_tokens(self) -> int:
        """Entries that every sequence has before its first token."""
        return max((kept.extra_tokens for layer in self.layers for kept in layer.kept), default=0)

    @property
    def room(self) -> int | None:
        """Bytes for blocks and state; negative where weights alone do not fit."""
        s = self.settings
        if s.memory is None:
            return None
        return s.memory - self.weights - s.activations

    @property
    def weights(self) -> int:
        """Bytes of the weights on one device, as if they split evenly."""
        return math.ceil(self.settings.weights / (self.settings.tp * len(self.settings.stages)))

    def num_blocks(self, running: int) -> int | None:
        """Blocks that fit beside what is set aside for so many sequences, or that those asked for take.

        None where neither a memory nor a number of sequences and tokens is given, and for several pools.
        """
        s = self.settings
        if not self.layout.pooled and len(self.layout.groups) > 1:
            return None
        room = self.room
        if room is None:
            if s.seq_len is None or s.each is None:
                return None
            return self.layout.blocks(s.seq_len + self.extra_tokens) * s.each
        if not self.block_bytes:
            return 0
        return max(0, min(LONGEST, (room - self.fixed_bytes(running)) // self.block_bytes))

    def fits(self, concurrency: int, seq_len: int) -> bool:
        """Whether so many sequences of so many tokens fit; True where no memory is given."""
        if self.room is None:
            return True
        blocks = concurrency * self.layout.blocks(seq_len + self.extra_tokens)
        if blocks > LONGEST:
            return False
        state = self.fixed_bytes(max(concurrency, self.settings.sequences or 0))
        within = self.settings.sequences is None or concurrency <= self.settings.sequences
        return within and self.paged_bytes(concurrency, seq_len) + state <= self.room


@dataclass(frozen=True)
class Figures:
    """What a model's cache takes on one device, and what fits there, in numbers. `Plan` puts them into words.

    With pipeline stages, figures are of the stage that takes the most, and what fits is what fits on every stage.
    """

    settings: Settings = field(repr=False)

    def __repr__(self) -> str:
        figures = (
            f"bytes_per_token={self.bytes_per_token}, block_bytes={self.block_bytes}, num_blocks={self.num_blocks}"
        )
        return f"<Plan of {self.model.name} in {self.dtype}: {figures}>"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """One device of each pipeline stage."""
        found, start = [], 0
        for number in self.settings.stages:
            s = self.settings
            layers = s.model.layers[start : start + number]
            found.append(Stage(s, engine_layers(s.engine, layers, s.model, s.format, swa_full=s.swa_full)))
            start += number
        return tuple(found)

    @cached_property
    def stage(self) -> Stage:
        """The one that takes the most memory for a sequence."""
        length = self.settings.reference_len
        return max(self.stages, key=lambda stage: (stage.sequence_bytes(length), stage.token_bytes))

    @property
    def model(self) -> ModelCache:
        """What the model keeps."""
        return self.settings.model

    @property
    def dtype(self) -> str:
        """The dtype of K and V, as it was asked for; "q8_0,q4_0" where V has one of its own."""
        format = self.settings.format
        return format.name if format.values is None else f"{format.name},{format.values.name}"

    @property
    def block_size(self) -> int:
        """Tokens in a block, of the stage that takes the most."""
        return self.stage.block_size

    @property
    def memory(self) -> int | None:
        """Bytes of one device that the plan may use; None where it was not asked about."""
        return self.settings.memory

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's weights on one device; 0 where they were not asked for."""
        return self.stage.weights

    @property
    def activation_bytes(self) -> int:
        """Bytes set aside on each device."""
        return self.settings.activations

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers, while it is in reach of every one."""
        return self.stage.token_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool: what the largest group needs. 0 where nothing grows with the sequence."""
        return self.stage.block_bytes

    @property
    def state_bytes(self) -> int:
        """Fixed bytes of each sequence: convolution and recurrent state, and what cross-attention keeps."""
        return self.stage.state_bytes

    @cached_property
    def running(self) -> int | None:
        """Sequences whose state is set aside before blocks are counted: as many as `sequences` or `concurrency` says.

        Where neither was given, as many of `seq_len` tokens (by default the model's longest, 32,768 at most) as fit
        together with their checkpoints, at least one; None without a memory. 0 where the model keeps no state or no
        blocks, and for other engines.
        """
        s = self.settings
        if s.running is not None:
            return s.running
        if s.engine != "kvblocks" or not any(stage.state_bytes and stage.paged for stage in self.stages):
            return 0
        return None if s.memory is None else max(1, self.max_concurrency(s.usual_len))

    @property
    def checkpoints(self) -> int | None:
        """States that are set aside beside those of `running` sequences, from which prefix hits go on.

        0 where the model keeps no state or no blocks; None where `running` is.
        """
        return None if self.running is None else max(stage.checkpoints(self.running) for stage in self.stages)

    @property
    def num_states(self) -> int | None:
        """Slots for states that engine and manager need: one for each of `running` sequences, and the checkpoints.

        This is for a known load. A `kvblocks.Pool` is made for any, and takes up to a quarter of its memory for slots
        unless it is given this number: `Pool(model, num_states=plan.num_states)`.

        0 where the model keeps no state or no blocks; None where `running` is.
        """
        if not any(stage.slot_bytes and stage.paged for stage in self.stages):
            return 0
        return None if self.running is None else self.running + (self.checkpoints or 0)

    def cache_bytes(self, num_tokens: int) -> int:
        """Bytes of one sequence of `num_tokens` tokens: exact, unpadded, state included.

        A window of w counts the w tokens that a query reaches, a chunk the tokens of a whole chunk. With
        `stored="transformers"` it is what its caches keep: w - 1 for a window, and a chunk as a window.

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**31-1.
        """
        return self.stage.cache_bytes(_tokens("num_tokens", num_tokens, 0))

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes that a sequence of `num_tokens` tokens takes in whole blocks, state included.

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**31-1.
        """
        return self.stage.sequence_bytes(_tokens("num_tokens", num_tokens, 0))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` tokens takes, in all groups together.

        Raises:
            TypeError, ValueError: `num_tokens` is not an integer in 0..2**31-1.
        """
        tokens = _tokens("num_tokens", num_tokens, 0)
        return self.stage.layout.blocks(tokens + self.stage.extra_tokens) if tokens else 0

    @property
    def num_blocks(self) -> int | None:
        """Blocks that fit into the memory, or that the sequences asked for take; None where neither was given."""
        counts = [stage.num_blocks(self.running or 0) for stage in self.stages if stage.paged]
        if not counts:
            return 0
        return None if None in counts else min(count for count in counts if count is not None)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers that share a block table, by their ids in the model."""
        return tuple(
            Group(group.reach, tuple(layer.index for layer in group.layers)) for group in self.stage.layout.groups
        )

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that fit at once, in one sequence: 2**31-1 where nothing grows, None without a memory."""
        return None if self.settings.memory is None else self.max_seq_len(1)

    def max_concurrency(self, seq_len: int) -> int:
        """Sequences of `seq_len` tokens that fit at once, 2**31-1 at most.

        Raises:
            TypeError, ValueError: `seq_len` is not an integer in 1..2**31-1, or no memory was given.
        """
        length = _tokens("seq_len", seq_len, 1)
        self._need_memory()
        return _most(lambda count: all(stage.fits(count, length) for stage in self.stages))

    def max_seq_len(self, concurrency: int = 1) -> int:
        """The longest that `concurrency` sequences can be at once: 2**31-1 where nothing grows, 0 where none fits.

        Raises:
            TypeError, ValueError: `concurrency` is not an integer in 1..2**31-1, or no memory was given.
        """
        count = _tokens("concurrency", concurrency, 1)
        self._need_memory()
        return _most(lambda length: all(stage.fits(count, length) for stage in self.stages))

    def memory_for(self, concurrency: int, seq_len: int) -> int:
        """Bytes that each device needs for so many sequences of so many tokens, weights and activations included.

        Raises:
            TypeError, ValueError: not integers in 1..2**31-1.
        """
        count, length = _tokens("concurrency", concurrency, 1), _tokens("seq_len", seq_len, 1)
        running = max(count, self.settings.sequences or 0)
        return max(
            stage.weights + self.settings.activations + stage.paged_bytes(count, length) + stage.fixed_bytes(running)
            for stage in self.stages
        )

    def dtype_for(self, concurrency: int, seq_len: int) -> str | None:
        """The widest dtype, from the plan's own down, with which so many sequences fit; None where none does.

        Raises:
            TypeError, ValueError: not integers in 1..2**31-1, or no memory was given.
        """
        count, length = _tokens("concurrency", concurrency, 1), _tokens("seq_len", seq_len, 1)
        self._need_memory()
        for candidate in [self.settings.format, *narrower(self.settings.format, self.settings.engine)]:
            plan = self.with_format(candidate)
            if all(stage.fits(count, length) for stage in plan.stages):
                return candidate.name
        return None

    @property
    def target(self) -> tuple[int, int]:
        """Sequences and tokens that one copy has to hold: what was asked for, at least one sequence of one token."""
        return self.settings.each or 1, self.settings.seq_len or 1

    @property
    def fits(self) -> bool:
        """Whether what was asked for fits into the memory; True where none was given."""
        return all(stage.fits(*self.target) for stage in self.stages)

    @property
    def missing_bytes(self) -> int:
        """Bytes that each device lacks for what was asked for; 0 where it fits."""
        if self.settings.memory is None or self.fits:
            return 0
        return max(0, self.memory_for(*self.target) - self.settings.memory)

    def waste(self, seq_len: int | None = None) -> float:
        """The share of a sequence's blocks, 0 to 1, that holds nothing it needs, at `seq_len` tokens.

        By default at the length that was asked for, else at the longest that the model was made for, else at 32,768.

        Raises:
            TypeError, ValueError: `seq_len` is not an integer in 1..2**31-1.
        """
        return self._waste(seq_len, lambda stage, length: stage.layout.held_bytes(length))

    def uniform_waste(self, seq_len: int | None = None) -> float:
        """What `waste` would be if every layer kept every token, and each took as many bytes as the largest."""
        return self._waste(seq_len, lambda stage, length: uniform_bytes(stage.paged, self.block_size, length))

    def _waste(self, seq_len: int | None, held: Callable[[Stage, int], int]) -> float:
        length = self.settings.reference_len if seq_len is None else _tokens("seq_len", seq_len, 1)
        stage = self.stage
        taken = held(stage, length + stage.extra_tokens)
        if not taken:
            return 0.0
        needed = sum(
            stage.entry_bytes(kept) * kept.entries(length, "exact") for layer in stage.layers for kept in layer.kept
        )
        return 1 - needed / taken

    @property
    def storage_dtype(self) -> str:
        """The dtype by which `cache_config().memory_bytes` counts: the plan's, or "uint8" for packed numbers."""
        return self.settings.format.name if self.settings.format.is_dtype else "uint8"

    @property
    def cache_layers(self) -> tuple[int | None, ...]:
        """For each layer of the model the one of `cache_config()` that it uses; None where it uses none.

        Raises:
            ValueError: the plan has several pipeline stages.
        """
        if len(self.stages) > 1:
            raise ValueError("a plan with several pipeline stages has a cache for each: see stages")
        ids = {layer.index: i for i, layer in enumerate(self.stage.cached_layers)}
        return tuple(ids.get(layer.index if layer.reads is None else layer.reads) for layer in self.model.layers)

    def cache_config(self, stage: int = 0) -> CacheConfig:
        """The config for a `CacheEngine` on one device of a pipeline stage; give it `num_states=plan.num_states`.

        The engine's `memory_bytes` is `num_blocks * block_bytes` and `num_states` times the stage's `slot_bytes`, to
        the byte, made with the dtype `storage_dtype`; with pipeline stages whose layers are grouped differently blocks
        are the stage's own (`stages`). Its layers are those of the model that keep something for every token, or a
        state, in order: `cache_layers` says which is which. K and V are "key" and "value", other tensors (a latent, its
        rotated key, an indexer's keys) have the names that the plan gives them. Packed numbers and their scales are
        bytes: then dims count them. A state is [heads, numbers of a head], that of a convolution [channels, columns],
        in its own dtype. What cross-attention keeps is not among them.

        Raises:
            ValueError: another engine's plan, nothing to page, no number of blocks or none that fits, or a tensor that
                a block cannot hold.
            IndexError: no such stage.
        """
        if self.settings.engine != "kvblocks":
            raise ValueError(f"engine={self.settings.engine!r}: a CacheEngine keeps what engine='kvblocks' counts")
        chosen = self.stages[stage]
        layers = chosen.cached_layers
        if not chosen.paged:
            raise ValueError(f"{self.model.name} keeps nothing that grows with the sequence; there is nothing to page")
        # One manager runs stages that are grouped alike; others have blocks of their own, and as many as they need.
        alike = len({tuple(g.reach for g in s.layout.groups) for s in self.stages if s.paged}) == 1
        blocks = self.num_blocks if alike else chosen.num_blocks(self.running or 0)
        if blocks is None:
            raise ValueError("how many blocks? Give plan(...) a memory, or a concurrency and a seq_len")
        if blocks < 1:
            raise ValueError(f"not one block fits: {self.missing_bytes} bytes are missing; see explain()")
        ids = {layer.index: i for i, layer in enumerate(layers)}
        groups = tuple(
            Group(group.reach, tuple(ids[layer.index] for layer in group.layers)) for group in chosen.layout.groups
        )
        return CacheConfig(
            layers=[[*self._tensors(layer), *self._states(layer)] for layer in layers],
            num_gpu_blocks=blocks,
            block_size=self.block_size,
            groups=groups,
        )

    def _tensors(self, layer: Layer) -> list[LayerTensor]:
        """What a layer keeps for a token, on one device."""
        format, found = self.settings.format, []
        for kept in layer.kept:
            if kept.every != 1 or kept.extra_tokens or kept.reach != layer.kept[0].reach:
                which = "keeps tensors of different reach"
                if kept.every != 1:
                    which = f"has one entry of its {kept.name} for {kept.every} tokens"
                elif kept.extra_tokens:
                    which = f"has {kept.extra_tokens} entries of its {kept.name} before the first token"
                raise ValueError(
                    f"layer {layer.index} of {self.model.name} {which}; a block holds one entry for each of its tokens"
                )
            own = format.is_dtype or kept.dtype is not None
            dim = kept.dim if own else kept.stored_in(format).vector_bytes(kept.dim)
            heads = self.settings.heads(kept.heads, kept.queries)[0]
            found.append(self._tensor(layer, _NAMES.get(kept.name, kept.name), (heads, dim), kept.dtype, "token"))
        return found

    def _states(self, layer: Layer) -> list[LayerTensor]:
        """What a layer keeps for a sequence, on one device."""
        found = []
        for state in layer.states:
            parts = [(self.settings.heads(units)[0], each) for units, each in state.kept_parts("exact")]
            shape = parts[0] if len(parts) == 1 else (sum(units * each for units, each in parts),)
            if state.kernel:
                columns = state.kernel - 1
                shape = (sum(units * each for units, each in parts) // max(1, columns), columns)
            if math.prod(shape):
                dtype = state.dtype or self.settings.state_dtype
                found.append(self._tensor(layer, state.name, shape, dtype, "sequence"))
        return found

    def _tensor(
        self, layer: Layer, name: str, shape: tuple[int, ...], dtype: str | None, per: Literal["token", "sequence"]
    ) -> LayerTensor:
        try:
            return LayerTensor(name, shape, dtype, per)
        except TypeError as error:
            raise ValueError(f"layer {layer.index} of {self.model.name} keeps {name}: {error}") from None

    def with_dtype(self, dtype: Any, group_size: int | None = None) -> Self:
        """The plan with K and V in another dtype; int4 and int2 with a scale for each 32 numbers by default.

        Raises:
            TypeError, ValueError: not a dtype that a cache can hold, or a group size that it cannot have.
        """
        format = format_of(dtype)
        if group_size is not None or not format.bits >= 8:
            format = format_of(dtype, 32 if group_size is None else group_size)
        return self.with_format(format)

    def with_format(self, format: Format) -> Self:
        """The plan with K and V in another format, and what follows it in the dtype that `plan` would give it."""
        name = format.name if format.is_float else self.model.dtype
        return self.replaced(format=format, state_dtype=self.settings.state_dtype if name is None else dtype_name(name))

    def replaced(self, **changes: Any) -> Self:
        """The plan with some of its `settings` changed."""
        return type(self)(replace(self.settings, **changes))

    def _need_memory(self) -> None:
        if self.settings.memory is None:
            raise ValueError("what fits depends on the memory: give plan(..., memory=...)")


def _tokens(name: str, value: Any, low: int) -> int:
    return checked_integer(name, value, low, LONGEST)


def _most(holds: Callable[[int], bool]) -> int:
    """The largest number up to LONGEST for which `holds`, which holds for all below it; 0 where it does for none."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
