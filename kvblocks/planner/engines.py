"""What serving engines keep otherwise than kvblocks: their pages, paddings, packings and pools, each with its source.

A source is a file and a function of the engine's own repository. Imports no torch and no engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvblocks.config import Chunk, Window
from kvblocks.formats import LLAMA_CPP, Format
from kvblocks.models.grouping import BlockGroup, Layout, PagedLayer
from kvblocks.models.shapes import Kept, Layer, ModelCache, Reach

__all__ = [
    "ENGINES",
    "Engine",
    "check_engine",
    "check_format",
    "engine_block_size",
    "engine_layers",
    "engine_layout",
    "engine_notes",
    "engine_step_tokens",
    "hybrid_block_size",
]

Engine = Literal["kvblocks", "vllm", "sglang", "llama.cpp"]
ENGINES: tuple[Engine, ...] = ("kvblocks", "vllm", "sglang", "llama.cpp")

_CELLS = 256  # of which llama.cpp allocates multiples
_SPARSE_PAGE = 64  # tokens in a page of latent attention, and of an indexer's keys
_PACKED_LATENT = (512, 64)  # the latent and the rotated key that vLLM and SGLang pack: 512 fp8, 4 scales, 64 bfloat16
_PACKED_BYTES = 512 + 4 * 4 + 64 * 2
_INDEX_GROUP = 128  # numbers of an index key that share a float32 scale
_SWA_POOL = (4, 5)  # SGLang's swa_full_tokens_ratio: slots of the windowed pool for each of the full one, 0.8
# Types whose windowed layers SGLang gives a pool of their own; of all others it keeps every token.
_SWA_TYPES = frozenset(
    ["gemma4_text", "gemma4_unified_text", "gpt_oss", "llama4_text", "mimo_v2_flash", "step3p5", "step3p7"]
)


def check_engine(engine: Engine, model: ModelCache) -> None:
    """Raises ValueError where an engine keeps a model in a way that is not known here."""
    if engine == "kvblocks":
        return
    for layer in model.layers:
        if any(kept.every > 1 for kept in layer.kept) or len({kept.reach for kept in layer.kept}) > 1:
            raise ValueError(
                f"engine={engine!r}: how it keeps the compressed entries of {model.name} is not known here; see what "
                f"the engine's own log says at its start, or give engine='kvblocks' for what the model itself keeps"
            )


def check_format(engine: Engine, format: Format) -> None:
    """Raises ValueError for K and V in a format that an engine does not have."""
    for one in (format, format.values or format):
        if engine == "llama.cpp" and one.name not in LLAMA_CPP:
            raise ValueError(
                f"dtype={one.name!r}: llama.cpp has K and V in {', '.join(LLAMA_CPP)} (--cache-type-k, "
                f"--cache-type-v); give one of them"
            )
        if engine in ("vllm", "sglang") and one.name in LLAMA_CPP and not one.is_float:
            raise ValueError(f"dtype={one.name!r} is llama.cpp's, and engine={engine!r} has none such; give fp8")


def engine_block_size(engine: Engine, model: ModelCache) -> int | None:
    """Tokens in a block where the engine has a size of its own; None where it takes kvblocks' 16."""
    if engine == "llama.cpp":
        return _CELLS
    if engine == "kvblocks":
        return None
    if _indexed(model.layers) or (engine == "vllm" and _latent(model.layers)):
        return _SPARSE_PAGE
    return 1 if engine == "sglang" else None


def engine_step_tokens(engine: Engine) -> int:
    """Tokens that one step writes for a sequence at most, by the engine's default."""
    return {"kvblocks": 1, "vllm": 8192, "sglang": 1, "llama.cpp": 512}[engine]


def engine_layers(
    engine: Engine, layers: Sequence[Layer], model: ModelCache, format: Format, *, swa_full: bool
) -> tuple[Layer, ...]:
    """The layers as the engine keeps them, with K and V in `format`."""
    if engine == "kvblocks":
        return tuple(layers)
    if engine == "llama.cpp":
        return tuple(_in_cells(layer, swa_full=swa_full) for layer in layers)
    packs = _indexed(model.layers)
    drops = engine == "sglang" and model.model_type not in _SWA_TYPES
    made = []
    for layer in layers:
        kept = _packed(layer.kept, format) if packs else layer.kept
        if drops:
            kept = tuple(replace(one, reach=None) for one in kept)
        made.append(replace(layer, kept=kept))
    return tuple(made)


def _in_cells(layer: Layer, *, swa_full: bool) -> Layer:
    """llama.cpp keeps state in float32, and windows in full where it is told to."""
    kept = tuple(replace(one, reach=None) for one in layer.kept) if swa_full else layer.kept
    return replace(layer, kept=kept, states=tuple(replace(state, dtype="float32") for state in layer.states))


def _packed(kept: Sequence[Kept], format: Format) -> tuple[Kept, ...]:
    """A latent as fp8 with its scales and the rotated key beside it, and an index key in fp8 with its scales."""
    made = []
    latent = next((one for one in kept if one.name == "latent"), None)
    rope = next((one for one in kept if one.name == "rope key"), None)
    fp8 = format.name.startswith("float8")
    if latent is not None and rope is not None and fp8 and (latent.dim, rope.dim) == _PACKED_LATENT:
        made.append(Kept("packed latent", 1, _PACKED_BYTES, latent.reach, dtype="uint8"))
        kept = [one for one in kept if one not in (latent, rope)]
    for one in kept:
        if one.name == "indexer key" and one.dim % _INDEX_GROUP == 0:
            made.append(
                replace(one, name="packed indexer key", dim=one.dim + one.dim // _INDEX_GROUP * 4, dtype="uint8")
            )
        else:
            made.append(one)
    return tuple(made)


def _indexed(layers: Sequence[Layer]) -> bool:
    """Whether latent attention picks its tokens by an indexer."""
    names = {kept.name for layer in layers for kept in layer.kept}
    return "latent" in names and "indexer key" in names


def _latent(layers: Sequence[Layer]) -> bool:
    return any(kept.name == "latent" for layer in layers for kept in layer.kept)


# --- layouts


@dataclass(frozen=True)
class _VllmLayout(Layout):
    """vLLM's: groups of equally many layers over one pool, and for each group of states a block a sequence.

    Args:
        pages: by group, how many of its tokens' blocks make one block of the pool.
        states: groups of layers that keep a state.
        size: bytes of one block of the pool, layers that are padding included.
    """

    pages: tuple[int, ...] = ()
    states: int = 0
    size: int = 0

    @property
    def block_bytes(self) -> int:
        return self.size

    def blocks_of(self, group: BlockGroup, num_tokens: int) -> int:
        size = self.block_size * self.pages[self.groups.index(group)]
        if group.reach is None:
            return math.ceil(num_tokens / size)
        held = min(group.reach.size - isinstance(group.reach, Window) + self.step_tokens, num_tokens)
        return min(math.ceil(held / size) + isinstance(group.reach, Window), math.ceil(num_tokens / size))

    def blocks(self, num_tokens: int) -> int:
        return super().blocks(num_tokens) + (self.states if num_tokens else 0)


@dataclass(frozen=True)
class _Apart(Layout):
    """Memory that layer groups do not share: a block of tokens takes one of each."""

    pooled = False

    @property
    def block_bytes(self) -> int:
        return sum(group.block_bytes for group in self.groups)


@dataclass(frozen=True)
class _CellLayout(_Apart):
    """llama.cpp's: every sequence has cells of its own, in each layer as many as that one reaches."""

    def blocks_of(self, group: BlockGroup, num_tokens: int) -> int:
        everything = math.ceil(num_tokens / self.block_size)
        if group.reach is None:
            return everything
        return min(everything, math.ceil((group.reach.size + self.step_tokens) / self.block_size))

    def held_bytes(self, num_tokens: int) -> int:
        return sum(group.block_bytes * self.blocks_of(group, num_tokens) for group in self.groups)


@dataclass(frozen=True)
class _TwoPools(_Apart):
    """SGLang's: a pool of full layers, and one of windowed layers that has 0.8 of its slots."""

    def held_bytes(self, num_tokens: int) -> int:
        return self.bytes_for(1, num_tokens)

    def bytes_for(self, count: int, num_tokens: int) -> int:
        numerator, denominator = _SWA_POOL
        full = windowed = needed = 0
        for group in self.groups:
            blocks = count * self.blocks_of(group, num_tokens)
            if group.reach is None:
                full, needed = group.block_bytes, max(needed, blocks)
            else:
                windowed += group.block_bytes
                needed = max(needed, math.ceil(blocks * denominator / numerator))
        return needed * full + math.ceil(needed * numerator / denominator) * windowed


def engine_layout(
    engine: Engine, paged: Sequence[PagedLayer], states: Sequence[int], block_size: int, step_tokens: int
) -> Layout:
    """How an engine lays out what the layers of one device put into blocks.

    Args:
        paged: what every layer puts into a block of `block_size` tokens.
        states: bytes of the state of each layer that keeps one.

    Raises:
        ValueError: page sizes that do not divide the largest: how vLLM unifies those is not known here.
    """
    by_reach: dict[tuple[Reach, int], list[PagedLayer]] = {}
    far: list[Reach] = sorted({layer.reach for layer in paged}, key=lambda reach: reach.size if reach else math.inf)
    for layer in sorted(paged, key=lambda layer: (-far.index(layer.reach), layer.index)):
        # vLLM tells pages of different sizes apart, where layers reach differently far or keep a state.
        alike = layer.block_bytes if engine == "vllm" and (len(far) > 1 or states) else 0
        by_reach.setdefault((layer.reach, alike), []).append(layer)
    if engine != "vllm":
        groups = tuple(BlockGroup(reach, tuple(same)) for (reach, _), same in by_reach.items())
        if engine == "llama.cpp":
            return _CellLayout(groups, block_size, step_tokens)
        pools = _TwoPools if len(groups) > 1 and any(group.reach is None for group in groups) else Layout
        return pools(groups, block_size, step_tokens)
    if len(far) <= 1 and not states:
        group = BlockGroup(far[0], tuple(paged)) if paged else None
        return _VllmLayout(
            () if group is None else (group,),
            block_size,
            step_tokens,
            (1,),
            0,
            0 if group is None else group.block_bytes,
        )
    page = max((size for _, size in by_reach), default=0)
    for _, size in by_reach:
        if page % size:
            raise ValueError(
                f"engine='vllm': layers with pages of {page} and {size} bytes; how it unifies those is not known here"
            )
    counts = [len(same) for same in by_reach.values()] + ([len(states)] if states else [])
    most = max(counts)
    each = most if most < 1.5 * min(counts) else min(counts)
    made: list[BlockGroup] = []
    pages: list[int] = []
    for (reach, size), same in by_reach.items():
        number = math.ceil(len(same) / each)
        made += [BlockGroup(reach, tuple(same[i::number])) for i in range(number)]
        pages += [page // size] * number
    return _VllmLayout(tuple(made), block_size, step_tokens, tuple(pages), math.ceil(len(states) / each), each * page)


def hybrid_block_size(paged: Sequence[PagedLayer], states: Sequence[int], block_size: int) -> int:
    """vLLM's block size for models with state: the least multiple of `block_size` whose page holds the largest state.

    Args:
        paged: what layers put into a block of `block_size` tokens.
        states: bytes of the state of each layer that keeps one.
    """
    if not states or not paged:
        return block_size
    return block_size * max(1, math.ceil(max(states) / max(layer.block_bytes for layer in paged)))


# --- sources


def engine_notes(engine: Engine, model: ModelCache, format: Format, *, swa_full: bool, step_tokens: int) -> list[str]:
    """Where the engine's figures come from: a sentence for each of its rules that this model meets, with the source."""
    if engine == "kvblocks":
        return []
    layers = model.layers
    windows = any(isinstance(kept.reach, Window | Chunk) for layer in layers for kept in layer.kept)
    states = any(layer.states for layer in layers)
    found = []
    if engine == "llama.cpp":
        found.append(
            f"llama.cpp: a sequence has cells of its own, a multiple of {_CELLS} (src/llama-context.cpp, llama_context)"
        )
        if format.group_size is not None:
            found.append(
                "llama.cpp: 32 numbers share a float16 scale (ggml/src/ggml-common.h, block_q8_0 and its like)"
            )
        if windows and swa_full:
            found.append("llama.cpp: --swa-full keeps every token in windowed layers (src/llama-kv-cache-iswa.cpp)")
        elif windows:
            found.append(
                f"llama.cpp: a windowed layer has cells for its window and a batch of {step_tokens} (--ubatch-size), "
                f"padded to {_CELLS} (src/llama-kv-cache-iswa.cpp, llama_kv_cache_iswa)"
            )
        if states:
            found.append("llama.cpp: state is kept in float32 (src/llama-model.cpp, create_memory)")
        return found
    if _indexed(layers):
        source = (
            "vllm/v1/kv_cache_interface.py, MLAAttentionSpec; DeepseekV32IndexerCache"
            if engine == "vllm"
            else "python/sglang/srt/mem_cache/memory_pool.py, MLATokenToKVPool and NSATokenToKVPool"
        )
        name = "vLLM" if engine == "vllm" else "SGLang"
        what = "an index key is 128 fp8 and a float32 scale, 132 bytes, whatever K and V are in"
        if format.name.startswith("float8"):
            what = (
                "a token's latent is 512 fp8, 4 float32 scales and a bfloat16 rotary key, 656 bytes; its index key 128 "
                "fp8 and a float32 scale, 132 bytes"
            )
        found.append(f"{name}: {what}; pages of {_SPARSE_PAGE} ({source})")
    elif engine == "vllm" and _latent(layers):
        found.append(
            f"vLLM: pages of {_SPARSE_PAGE} tokens by default for latent attention, as its kernels ask for "
            f"(FLASHMLA, FLASHINFER_MLA; vllm/platforms/cuda.py, CudaPlatformBase.check_and_update_config)"
        )
    elif engine == "sglang":
        found.append(
            "SGLang: pages of 1 token by default (--page-size; python/sglang/srt/server_args.py, _handle_page_size)"
        )
    if engine == "vllm":
        if windows:
            found.append(
                f"vLLM: a windowed layer holds its window, a step of {step_tokens} (--max-num-batched-tokens) and a "
                f"block more (vllm/v1/kv_cache_interface.py, SlidingWindowSpec.max_memory_usage_bytes)"
            )
        if windows or states:
            found.append(
                "vLLM: all groups have equally many layers, some of them padding, and pages of one size "
                "(vllm/v1/core/kv_cache_utils.py, _get_kv_cache_groups_uniform_page_size)"
            )
        if states and any(layer.kept for layer in layers):
            found.append(
                "vLLM: blocks are raised until a page of attention holds the largest state, and each state is padded "
                "to a page, one a sequence (--mamba-cache-mode none; align takes two; vllm/platforms/interface.py, "
                "_align_hybrid_block_size)"
            )
        return found
    if windows and model.model_type in _SWA_TYPES:
        found.append(
            "SGLang: windowed layers have a pool of their own with 0.8 of the slots (--swa-full-tokens-ratio; "
            "python/sglang/srt/mem_cache/memory_pool.py, SWAKVPool)"
        )
    elif windows:
        found.append(
            "SGLang: windowed layers keep every token, as this type is not among those with a pool for them "
            "(python/sglang/srt/configs/model_config.py, is_hybrid_swa_model)"
        )
    if states:
        found.append(
            "SGLang: state is counted by the sequence; the engine sets a share of memory aside for it "
            "(--mamba-full-memory-ratio; python/sglang/srt/mem_cache/memory_pool.py, MambaPool)"
        )
    return found
