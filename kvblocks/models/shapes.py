"""What a model keeps for each token and for each sequence, layer by layer. No config is read here, no tensor made."""

from dataclasses import dataclass
from typing import Literal

from kvblocks.config import Chunk, Window, tensor_itemsize
from kvblocks.formats import Format

__all__ = ["Kept", "Layer", "ModelCache", "Reach", "State", "Stored", "attention"]

Reach = Window | Chunk | None
Stored = Literal["exact", "transformers"]


@dataclass(frozen=True)
class Kept:
    """A tensor that grows with the sequence: `heads` vectors of `dim` numbers for each token.

    Args:
        name: what it is, for the reader: "K", "V", "latent", "indexer key".
        heads, dim: of one token's entry.
        reach: the tokens that are kept: all, a window's, a chunk's.
        every: one entry for that many tokens (compressed attention); the tokens that do not make an entry yet are
            counted as state.
        dtype: its own where it does not follow the cache's.
        extra_tokens: entries that every sequence has before its first token (learned prompts).
        stored_heads: what transformers' caches keep where that is not `heads`.
        stored_reach: whether transformers' caches keep only what is in reach.
        after: nothing is kept of a sequence that is not longer than this.
        queries: query heads, a multiple of `heads`, which share these in order; None where they are not known.
    """

    name: str
    heads: int
    dim: int
    reach: Reach = None
    every: int = 1
    dtype: str | None = None
    extra_tokens: int = 0
    stored_heads: int | None = None
    stored_reach: bool = True
    after: int = 0
    queries: int | None = None

    def entry_bytes(self, format: Format, heads: int | None = None) -> int:
        """Bytes of one entry, of `heads` heads where some are elsewhere."""
        heads = self.heads if heads is None else heads
        if self.dtype is not None:
            return heads * self.dim * tensor_itemsize(self.dtype)
        return heads * self.stored_in(format).vector_bytes(self.dim)

    def stored_in(self, format: Format) -> Format:
        """The format of its numbers where K and V have formats of their own."""
        return format.values if self.name == "V" and format.values is not None else format

    def entries(self, num_tokens: int, stored: Stored) -> int:
        """Entries kept of a sequence of `num_tokens` tokens."""
        if num_tokens <= self.after:
            return 0
        tokens = num_tokens + self.extra_tokens
        if self.reach is not None:
            if stored == "exact":
                tokens = min(tokens, self.reach.size)
            elif self.stored_reach and self.reach.size > 1:
                # transformers slices [-size + 1:]; with a size of 1 that is [0:], and it keeps everything.
                tokens = min(tokens, self.reach.size - 1)
        return tokens // self.every


@dataclass(frozen=True)
class State:
    """A tensor of a fixed size for each sequence.

    Args:
        name: what it is.
        parts: (units, numbers in a unit): tensor parallelism splits units and never what is in one.
        dtype: its own, or None for the one that the model computes in.
        varies: (kind, rate), where transformers' caches fill the tensor only in part. After n tokens "rest" fills
            `n % rate` parts in `rate` of it; "last" fills nothing before token `rate`, then all of it.
        kernel: width of a convolution, whose `parts` count one column; 0 for other tensors. "exact" counts a column
            less, as each step brings one itself; transformers' caches keep all.
    """

    name: str
    parts: tuple[tuple[int, int], ...]
    dtype: str | None = None
    varies: tuple[Literal["rest", "last"], int] | None = None
    kernel: int = 0

    def kept_parts(self, stored: Stored) -> tuple[tuple[int, int], ...]:
        """(units, numbers in a unit) of all that is kept."""
        columns = (self.kernel - (stored == "exact")) if self.kernel else 1
        return tuple((units, each * columns) for units, each in self.parts)

    def entries(self, num_tokens: int, stored: Stored) -> tuple[int, int]:
        """The share of the state, as a fraction, that is filled after `num_tokens` tokens."""
        if stored == "exact" or self.varies is None:
            return 1, 1
        kind, rate = self.varies
        if kind == "last":
            return int(num_tokens >= rate), 1
        return num_tokens % rate, rate


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Args:
        index: its index in the model.
        kind: its name, as transformers' `layer_types` has it.
        kept: what grows with the sequence.
        states: what does not.
        cross: what it keeps for each token of an encoder, or of an image.
        reads: the layer whose cache it reads instead of keeping its own.
    """

    index: int
    kind: str
    kept: tuple[Kept, ...] = ()
    states: tuple[State, ...] = ()
    cross: tuple[Kept, ...] = ()
    reads: int | None = None


@dataclass(frozen=True)
class ModelCache:
    """Everything that a model keeps.

    Args:
        name: of the model or its type, for the reader.
        layers: all of them, in order.
        num_query_heads: of a layer, to say what tensor parallelism allows; None where it is not known.
        max_seq_len: the longest sequence that the model was made for; None where it is not known.
        dtype: what the model computes in; None where it is not known.
        notes: what a reader should know, one sentence each.
        uncached: why transformers keeps no cache for it, where it keeps none.
        model_type: of its config, by which engines choose what they keep; None for plain numbers and GGUF files.
    """

    name: str
    layers: tuple[Layer, ...]
    num_query_heads: int | None = None
    max_seq_len: int | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    uncached: str | None = None
    model_type: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"{self.name} has no layers")

    @property
    def query_heads(self) -> tuple[int, ...]:
        """Every number of query heads that a layer is known to have."""
        kept = {one.queries for layer in self.layers for one in (*layer.kept, *layer.cross)}
        return tuple(sorted(number for number in {self.num_query_heads, *kept} if number is not None))

    @property
    def has_cross_attention(self) -> bool:
        """Whether a layer keeps something of an encoder or an image."""
        return any(layer.cross for layer in self.layers)


def attention(
    heads: int,
    k_dim: int,
    v_dim: int,
    reach: Reach = None,
    stored_heads: int | None = None,
    queries: int | None = None,
) -> tuple[Kept, Kept]:
    """K and V of one attention layer."""
    return (
        Kept("K", heads, k_dim, reach, stored_heads=stored_heads, queries=queries),
        Kept("V", heads, v_dim, reach, stored_heads=stored_heads, queries=queries),
    )
