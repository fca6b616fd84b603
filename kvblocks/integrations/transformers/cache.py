"""PagedCache: a transformers cache whose K and V lie in the blocks of a pool.

Here is what transformers and users call. The rows of a batch are kept in `rows`; `layer` moves K and V in and out.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from kvblocks.checks import checked_device
from kvblocks.config import Group, Window, itemsize
from kvblocks.engine import CacheEngine
from kvblocks.integrations.transformers.blocks import Blocks, Sizes
from kvblocks.integrations.transformers.images import images_of, positions_of, runs_of, without_images
from kvblocks.integrations.transformers.layer import CacheState, PagedLayer, StateLayer, cache_layers
from kvblocks.integrations.transformers.layers import (
    ModelLayer,
    cache_groups,
    check_prompts,
    counts_padding,
    goes_on_by_one,
    keeps_offsets,
    kv_shape,
    model_class,
    model_layers,
    placeholder_tokens,
    text_config,
    unscaled_length,
)
from kvblocks.integrations.transformers.passes import Prompt
from kvblocks.integrations.transformers.pool import Pool, check_pool
from kvblocks.integrations.transformers.rows import Rows
from kvblocks.manager import BlockManager
from kvblocks.sizes import checked_bytes, checked_size
from kvblocks.tiers.names import PRIVATE_SALT

__all__ = ["PagedCache"]

_LARGEST_TOKEN = (1 << 30) - 1  # ids above stand for tokens whose own are not known


class PagedCache(Cache):
    """A cache for `model.generate(..., cache=...)` and for `model(...)` that keeps K and V in blocks.

    It takes the place of `DynamicCache`: left padding, sampling, beams, several return sequences, assisted generation.
    Beams share the blocks of what they have in common, and `begin` finds what earlier prompts have computed already.

    Index keys of sparse attention lie in the blocks beside K and V. States of convolutions, linear attention and Mamba
    are kept for each row by transformers' own layers; recurrent ones cannot be cropped. A prefix is of use where its
    states are there too. So the pool has slots, which `memory` counts, for checkpoints: the states at multiples of
    `manager.state_every` tokens of a prompt, where a pass over it ended there. `kvblocks.generate` leaves them by
    itself, `model.generate` with `prefill_chunk_size=cache.manager.state_every`.

    Args:
        config: the model's.
        memory: for K and V, index keys and checkpoints, in bytes or like "64MiB", "1.5GB" (the default: "64MiB").
        num_blocks: blocks in the pool, instead of `memory`.
        block_size: tokens in a block.
        dtype, device: of K and V; by default those of the first K and V that come.
        manager, engine: those of another cache of the same model, to share its blocks; the sizes are theirs then.
        pool: a `Pool` of the model, that of another cache or of a `Generation` too, instead of all these.

    Attributes:
        pool: whose blocks it holds: the one that was given, else its own, which may be handed to other caches and to
            `kvblocks.generate`.

    Raises:
        UnsupportedModel: the model keeps what no cache here holds, has no K and V, or is an encoder-decoder.
        TypeError, ValueError: an argument that cannot be.

    A pass that the pool has no blocks for raises `NoFreeBlocks` from inside the model, and leaves the cache as it was.
    One that fails elsewhere in the model leaves it half written; `abort` takes that back. Of a model with states
    always call it then: they are written in place, and nothing shows that the last layer failed halfway. K and V are
    allocated when the first come, or when `engine` is asked for. No gradient flows through them.

    Blocks go back to the pool with `close`, at the end of a `with` block, or when the cache is collected. A deep copy
    is a `fork`.

    Example:
        >>> cache = PagedCache(model.config, memory="1GiB")
        >>> cache.begin(ids, mask)  # what earlier prompts have in common with these is not computed again
        >>> model.generate(ids, attention_mask=mask, cache=cache)

    Thread-safety: one thread at a time drives the caches that share blocks.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        memory: int | str | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        manager: BlockManager | None = None,
        engine: CacheEngine | None = None,
        pool: Pool | None = None,
    ) -> None:
        described = model_layers(config)
        writing = sum(layer.writes for layer in described)
        if pool is not None:
            if manager is not None or engine is not None:
                raise ValueError("pool has a manager and an engine of its own; give no others")
            check_pool(pool).check(config)
            if any(given is not None for given in (memory, num_blocks, dtype, device)) or block_size != 16:
                raise ValueError("the sizes, dtype and device are those of the pool; give no others")
        elif (manager is None) != (engine is None):
            raise ValueError("manager and engine belong together: give both of another cache, or neither")
        elif manager is not None and engine is not None:
            if any(given is not None for given in (memory, num_blocks, dtype, device)) or block_size != 16:
                raise ValueError("the sizes, dtype and device are those of manager and engine; give no others")
            pool = Pool.over(config, Blocks.of(manager, engine))
        else:
            groups = cache_groups(config, chunks=False)
            sizes = _sizes(config, described, groups, memory, num_blocks, block_size, dtype, device)
            pool = Pool.over(config, Blocks(sizes))
        if pool.blocks.is_allocated:
            if (held := len(pool.engine.get_all_caches())) != writing:
                raise ValueError(f"engine has {held} layers, and {writing} of the model's cache K and V")
            _check_groups(described, pool.engine)
        self._fill(config, described, Rows(pool.blocks), pool)

    def _fill(self, config: PreTrainedConfig, described: Sequence[ModelLayer], rows: Rows, pool: Pool) -> None:
        self.pool = pool
        state = CacheState(config, rows, described)
        self._state = state
        self._finalizer = weakref.finalize(self, rows.clear)
        layers, rows.states = cache_layers(config, state, described)
        rows.goes_on = not goes_on_by_one(model_class(config))
        rows.parts = frozenset(
            (layer.index, part)
            for layer in described
            for part, kept in (("update", layer.writes), ("index", layer.index_dim), ("state", layer.states))
            if kept
        )
        super().__init__(layers=layers)

    # What is there

    @property
    def manager(self) -> BlockManager:
        """Whose sequences the rows are."""
        return self.pool.manager

    @property
    def engine(self) -> CacheEngine:
        """Where K and V lie: one layer for each of the model's that writes any."""
        return self.pool.engine

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 where nothing is held."""
        return len(self._state.rows.rows) * self._state.rows.factor

    @property
    def num_held_blocks(self) -> int:
        """Blocks that the rows hold, each counted once."""
        return self._state.rows.held_blocks()

    def __repr__(self) -> str:
        return (
            f"PagedCache(rows={self.num_rows}, columns={self._state.rows.columns}, "
            f"held_blocks={self.num_held_blocks}, layers={self._state.num_layers})"
        )

    # Prompts

    def begin(
        self,
        input_ids: Tensor | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]],
        attention_mask: Tensor | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]] | None = None,
        *,
        salt: bytes = b"",
        extra: Sequence[Sequence[tuple[int, bytes]]] | None = None,
        reuse: bool = True,
    ) -> int:
        """Tell the ids of the prompts that come next, and drop what the cache holds.

        `update` never sees an id, so this is how the cache knows which tokens have been computed before, and which
        rows of a batch are the same prompt. Afterwards `get_seq_length()` columns are there, of every row the first;
        the model is run over the rest, as `generate` does by itself. Rows that were expanded (beams, return sequences)
        count once; but of a model that keeps states, which are of rows, every row is told.

        Args:
            input_ids: [rows, columns].
            attention_mask: [rows, columns] of 0 and 1, padding on the left; none without it.
            salt: what else decides the K and V: an adapter, a tenant. Where the pool was made of the model, or has been
                handed to `kvblocks.generate` with it, its adapters are told apart without.
            extra: for each row the (column, bytes) of what is not in the ids, in order: the hash of an image, say.
            reuse: False computes every column anew, as assisted generation in transformers does whatever is there.

        Returns:
            The number of columns that need not be computed.

        Of a model that keeps states all rows must be found up to the same column: each at a checkpoint, or as all that
        they hold since the last `begin` and `tell`. Checkpoints are at multiples of `manager.state_every` tokens of a
        row, padding not counted. So the paddings of rows must be equal or differ by multiples of it, and each row must
        have tokens before that column. A last pass that `begin` follows at once counts as unfinished, and leaves no
        checkpoint; `tell` in between keeps it.

        Models of Mamba 1 (Jamba, Zamba) find nothing. Their layers go on from a state by one token in a pass only, as
        transformers' scan over several tokens takes no state to begin from, and `model.generate` computes the rest of a
        prompt in one pass. `kvblocks.generate` goes on from checkpoints of these models too.

        Positions must count from 0 at each row's first token, as `generate` numbers them. A model that takes none, and
        may count padding, reuses only what had as much of it.

        The next pass must be over these prompts, with this mask. It hands the cache K and V, never ids: others of as
        many rows and columns are not noticed, and what `begin` found is taken for theirs. `tell` compares the ids.

        Raises:
            UnsupportedModel: the model's K and V depend on more than the prompt, or its positions on what ran before.
            ValueError, TypeError: ids, mask or extra that do not fit; a row with placeholders of images and no extra
                that says which; the cache is as before.
            NoFreeBlocks: the pool cannot hold the prompts; the cache is empty then.
        """
        rows = self._state.rows
        prompts = self._prompts(input_ids, attention_mask, salt, extra)
        rows.begin(prompts, reuse=reuse, positions=self._positions(prompts, input_ids))
        return rows.columns

    def begin_inputs(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], *, salt: bytes = b"", reuse: bool = True
    ) -> dict[str, Any]:
        """`begin` for what a processor made of texts and images; returns what to hand to `model.generate`.

        An image that was found is not computed again, so its pixels are left out. One of which only a part was found is
        computed whole. Images are told apart by their pixels. For models with M-RoPE (Qwen2-VL and those after it)
        `position_ids` are added, as these models keep the offset of their positions outside the cache.

        Args:
            model: the model of the cache.
            inputs: `input_ids` [rows, columns], `attention_mask`, `pixel_values`, and the model's own of
                `image_grid_thw`, `token_type_ids`, `mm_token_type_ids`; as tensors.
            salt, reuse: as for `begin`.

        Raises:
            ValueError: an input that is not taken, or placeholders and pixels that do not fit; or as for `begin`.
            UnsupportedModel, TypeError, NoFreeBlocks: as for `begin`.

        Example:
            >>> inputs = processor(text=texts, images=images, return_tensors="pt")
            >>> model.generate(**cache.begin_inputs(model, inputs), cache=cache)
        """
        config = self._state.config
        if model.config is not config:
            raise ValueError(f"the cache was made for another model than this {type(model).__name__}; give its own")
        given = dict(inputs)
        for name, value in given.items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}; give tensors: return_tensors='pt'")
        if given.get("input_ids") is None:
            raise ValueError(f"inputs has {', '.join(sorted(given))}; input_ids must be among them")
        ids = given["input_ids"]
        mask = given["attention_mask"] = (
            given["attention_mask"] if given.get("attention_mask") is not None else torch.ones_like(ids)
        )
        images = images_of(config, _matrix("input_ids", ids), given)
        extra: list[list[tuple[int, bytes]]] = [[] for _ in range(len(ids))]
        for image in images:
            extra[image.row].append((image.first, image.digest))
        given_positions = keeps_offsets(config)
        prompts = self._prompts(ids, mask, salt, extra, positions_given=given_positions)
        for number, prompt in enumerate(prompts):
            own = [(image.first - prompt.pad, image.end - prompt.pad) for image in images if image.row == number]
            prompts[number] = replace(prompt, whole=own)
        if given_positions:
            given["position_ids"] = positions_of(model, given, ids, mask)
        positions = given["position_ids"][1:] if given_positions else self._positions(prompts, ids)
        rows = self._state.rows
        rows.begin(prompts, reuse=reuse, positions=positions)
        return without_images(given, images, rows.columns)

    def tell(self, sequences: Tensor | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]]) -> None:
        """Tell the ids of all that is held: what `generate` returned, padding and prompt included.

        The next `begin` then goes on from the answers too, as in a chat.

        Raises:
            ValueError: not as many rows or columns as are held, other ids than `begin` was told, no `begin` before, or
                rows that beams have shared.
        """
        rows = self._state.settled("tell")
        ids = _matrix("sequences", sequences)
        if ids.shape[1] < rows.columns:
            raise ValueError(f"sequences has {ids.shape[1]} columns, the cache holds {rows.columns}")
        if self._crosses(rows.columns):
            raise ValueError("the model's positions change with length, so these tokens are of use to no other prompt")
        _check_ids("sequences", ids)
        if len(ids) != len(rows.rows):
            raise ValueError(f"sequences has {len(ids)} rows, the cache holds {self.num_rows}")
        rows.tell([line[row.pad : rows.columns] for line, row in zip(ids, rows.rows, strict=True)])

    def _positions(self, prompts: Sequence[Prompt], ids: Any) -> Tensor | None:
        """Those of all columns of text, int64 [3, rows, columns]; None where no layer goes by them."""
        if not self._state.rows.states.has_positions:
            return None
        device = self.engine.device if self.pool.blocks.is_allocated else getattr(ids, "device", "cpu")
        pads = torch.tensor([[prompt.pad] for prompt in prompts], device=device)
        columns = torch.arange(prompts[0].pad + len(prompts[0].ids), device=device)
        return (columns - pads).clamp(min=0).expand(3, -1, -1)

    def _prompts(
        self, input_ids: Any, attention_mask: Any, salt: bytes, extra: Any, *, positions_given: bool = False
    ) -> list[Prompt]:
        ids = _matrix("input_ids", input_ids)
        if not isinstance(salt, bytes):
            raise TypeError(f"salt is a {type(salt).__name__}; give bytes")
        salt = self.pool.adapters() + salt
        mask = np.ones_like(ids) if attention_mask is None else _matrix("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
        held = mask != 0
        for number, line in enumerate(held):
            if not line[-1] or (np.diff(line.astype(np.int8)) < 0).any():
                raise ValueError(f"row {number} of attention_mask has a 0 to the right of a 1; pad on the left")
        _check_ids("input_ids", ids[held])
        pads = [int(line.argmax()) for line in held]
        check_prompts(self._state.config, padded=any(pads), positions_given=positions_given)
        shifts = counts_padding(self._state.config)
        if self._crosses(ids.shape[1]):
            salt, shifts = PRIVATE_SALT + np.random.default_rng().bytes(16), False  # nobody shares it
        more = [()] * len(ids) if extra is None else list(extra)
        if len(more) != len(ids):
            raise ValueError(f"extra is for {len(more)} rows, input_ids has {len(ids)}")
        placeholders = placeholder_tokens(self._state.config)
        for number, (left, pairs) in enumerate(zip(pads, more, strict=True)):
            _check_extra(number, pairs, left, ids.shape[1])
            if not pairs and (found := placeholders.keys() & set(ids[number, left:].tolist())):
                raise ValueError(
                    f"row {number} of input_ids holds {min(found)}, the config's {placeholders[min(found)]}, which is "
                    "the same for every image; give extra with the hash of this one"
                )
        return [
            Prompt(
                line[left:],
                left,
                b"padded by %d: " % left + salt if shifts and left else salt,
                [(column - left, value) for column, value in pairs],
                runs_of(self._state.config, line[left:]),
            )
            for line, left, pairs in zip(ids, pads, more, strict=True)
        ]

    def _crosses(self, columns: int) -> bool:
        """Whether rotary frequencies are others than those of shorter sequences."""
        limit = unscaled_length(self._state.config)
        return limit is not None and columns > limit

    # What transformers asks for

    def activate_past_recording(self) -> None:
        """From here on a pass may be cut by the next `crop`, also where windows have moved on."""
        for layer in self.layers:
            if isinstance(layer, PagedLayer | StateLayer):
                layer.record_past = True

    def reset_prefix_cache(self) -> None:
        """For new weights: hold nothing, and let no cache of the pool find what was computed so far."""
        self.manager.reset_prefix_cache()
        self._state.rows.clear()

    def reset(self) -> None:
        """Hold nothing."""
        self._state.rows.clear()

    def abort(self) -> None:
        """Take back a pass that failed inside the model: as if it had never begun.

        Where nothing failed there is nothing to take back. Only of a model with states a pass is open until the next
        one begins, or something else is done with the cache; until then it is taken back.
        """
        self._state.rows.abort()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns.

        Raises:
            ValueError: the number is positive, there are not as many columns, or windows or states have moved on.
        """
        rows = self._state.settled("crop")
        columns = rows.columns + tokens_to_remove
        if tokens_to_remove > 0 or columns < 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be 0 to {-rows.columns}: minus the number of columns to drop"
            )
        if tokens_to_remove:
            rows.crop(columns)
        else:
            rows.states.crop(columns, 0)
            rows.settle()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is; both share every block."""
        self._state.select("reorder_cache", beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, one after the other, that share every block."""
        self._state.select("batch_repeat_interleave", [row for row in range(self.num_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices`, in that order; a mask of booleans is taken too."""
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._state.select("batch_select_indices", chosen.tolist())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a convolution [rows, ...], for the pass that asks to write; None where there is none yet."""
        self._enter(layer_idx, f"state get_conv_state {state_idx}")
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state [rows, ...], for the pass that asks to write; None where there is none yet."""
        self._enter(layer_idx, f"state get_recurrent_state {state_idx}")
        state: Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Go on with a convolution; returns its state before, and these new columns."""
        self._enter(layer_idx, f"state update_conv_state {state_idx}")
        states: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return states

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Put a recurrent state in place of the one before."""
        self._enter(layer_idx, f"state update_recurrent_state {state_idx}")
        states: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return states

    def _enter(self, layer_idx: int, call: str) -> None:
        if isinstance(layer := self.layers[layer_idx], StateLayer):
            layer.enter(call)

    # Copies and leaving

    def fork(self) -> "PagedCache":
        """Another cache that holds the same and shares every block; the two go on apart."""
        made = PagedCache.__new__(PagedCache)
        rows = self._state.settled("fork")
        made._fill(self._state.config, model_layers(self._state.config), rows.fork(), self.pool)
        made._state.rows.states.hold(*rows.states.held())
        return made

    def __copy__(self) -> "PagedCache":
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PagedCache cannot be pickled: its K and V lie in blocks that others may share")

    def close(self) -> None:
        """Give all blocks back. The cache is empty then, and may be used again."""
        self._state.rows.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_groups(described: Sequence[ModelLayer], engine: CacheEngine) -> None:
    """Stop layers whose blocks would be given back while they still read them."""
    for layer in described:
        if not layer.writes or layer.storage is None:
            continue
        reach = engine.config.groups[engine.group_of(layer.storage)].reach
        if reach is None or (isinstance(reach, Window) and layer.window is not None and layer.window <= reach.size):
            continue
        raise ValueError(
            f"layer {layer.index} attends to {layer.window or 'all'} tokens, and its group keeps {reach}; "
            "give manager and engine of a PagedCache of the same model (chunked layers are kept as windows here)"
        )


def _sizes(
    config: PreTrainedConfig,
    described: Sequence[ModelLayer],
    groups: tuple[Group, ...],
    memory: int | str | None,
    num_blocks: int | None,
    block_size: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> Sizes:
    if memory is not None and num_blocks is not None:
        raise ValueError(f"memory={memory!r} and num_blocks={num_blocks} both say how large the pool is; give one")
    num_bytes = None
    if num_blocks is None:
        num_bytes = checked_bytes("memory", "64MiB" if memory is None else memory)
    text = text_config(config)
    likely = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    if dtype is not None:
        itemsize(dtype)
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    return Sizes(
        lambda: kv_shape(config),
        sum(layer.writes for layer in described),
        tuple(layer.index_dim for layer in described if layer.writes),
        num_bytes,
        None if num_blocks is None else checked_size("num_blocks", num_blocks),
        checked_size("block_size", block_size),
        dtype,
        None if device is None else checked_device(device),
        likely if isinstance(likely, torch.dtype) else torch.get_default_dtype(),
        groups,
        any(layer.states for layer in described),
    )


def _matrix(name: str, given: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {list(array.shape)}; give [rows, columns], at least one of each")
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} is of {array.dtype}; give integers")
    return array.astype(np.int64)


def _check_extra(number: int, pairs: Any, left: int, columns: int) -> None:
    before = left - 1
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], int) or not isinstance(pair[1], bytes):
            raise TypeError(f"extra of row {number} holds {pair!r}; give (column, bytes) pairs")
        if not before < pair[0] < columns:
            raise ValueError(
                f"extra of row {number} names column {pair[0]}; the next must be above {before} and below {columns}"
            )
        before = pair[0]


def _check_ids(name: str, ids: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    if ids.size and (ids.min() < 0 or ids.max() > _LARGEST_TOKEN):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name} holds {bad}; ids are 0 to {_LARGEST_TOKEN}")
