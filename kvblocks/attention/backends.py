"""Which kernel attends on a CUDA device, and calling it: torch's `varlen_attn` where its backend pages, else our own.

Nothing here waits for the device, so all of it can be captured in a CUDA graph. Arguments were checked by
`kvblocks.attention.call`. Imports torch, the arguments, and the kernels.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvblocks.attention.arguments import Arguments, Kernel
from kvblocks.kernels import kernels
from kvblocks.storage.cache import PagedKVCache

__all__ = ["kernel_for", "on_triton", "on_varlen"]

_log = logging.getLogger("kvblocks")

# FlashAttention 3 loads pages of a multiple of its tile (64 tokens or more) whole, slots that nobody has written
# included; smaller ones token by token, and zeros past a sequence's length.
_VARLEN_BLOCK_SIZES = range(1, 64)
_VARLEN_HEAD_DIMS = range(8, 257, 8)
# What torch calls the backend that takes a block table, and the compute capability that it needs. FA4 pages too, but
# takes other head dims, and what it does with slots that nobody has written is not known.
_PAGING = {"FA3": 9}


def kernel_for(args: Arguments) -> Kernel | None:
    """Which kernel does it, the fastest first; None leaves it to plain torch. Each choice is logged once."""
    reasons: list[str] = []
    step = args.step
    if any(lens.device != args.cache.device for lens in (step.seq_lens, step.query_start_loc)):
        _say("plain torch, which waits for the device", "the step's lengths are not on it")
        return None
    for name, refuses, run in (("varlen_attn", varlen_refuses, on_varlen), ("Triton", kernel_refuses, on_triton)):
        reason = refuses(args)
        if reason is None:
            _say(f"torch's {name}" if run is on_varlen else "kvblocks' Triton kernel", "; ".join(reasons))
            return run
        reasons.append(f"not {name}: {reason}")
    _say("plain torch, which waits for the device", "; ".join(reasons))
    return None


@functools.cache
def _say(what: str, why: str) -> None:
    _log.info("paged attention runs on %s%s", what, f" ({why})" if why else "")


def varlen_refuses(args: Arguments) -> str | None:
    """Why torch's `varlen_attn` cannot take this call; None where it can."""
    found = _varlen()
    if found is None:
        return f"torch {torch.__version__} has none that takes a block table"
    cache, backend = args.cache, found[1]()
    if backend not in _PAGING:
        return f"the active backend, {backend or 'FA2'}, takes no block table"
    if torch.cuda.get_device_capability(cache.device)[0] != _PAGING[backend]:
        return f"{backend} pages on compute capability {_PAGING[backend]} only"
    if cache.layout != "NHD":
        return f"layout {cache.layout} is not NHD"
    if cache.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes no {cache.dtype}"
    if cache.head_dim != cache.v_head_dim or cache.head_dim not in _VARLEN_HEAD_DIMS:
        return f"head dims {cache.head_dim} and {cache.v_head_dim} are not one multiple of 8 up to 256"
    if cache.block_size not in _VARLEN_BLOCK_SIZES:
        return f"blocks of {cache.block_size} tokens are loaded whole, unwritten slots too"
    if args.window is not None and (cache.group is None or cache.reach is not None):
        return "it loads what lies in front of a window, where a group's table is padding and names no block"
    for name in ("chunk", "softcap", "sinks"):
        if getattr(args, name) is not None:
            return f"it knows no {name}"
    return None


def kernel_refuses(args: Arguments) -> str | None:
    """Why our Triton kernel cannot take this call; None where it can."""
    module, cache = kernels("attention"), args.cache
    if module is None:
        return "Triton is not installed"
    if cache.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes no {cache.dtype}"
    if max(cache.head_dim, cache.v_head_dim) > module.MAX_HEAD_DIM:
        return f"head dims {cache.head_dim} and {cache.v_head_dim} pass {module.MAX_HEAD_DIM}"
    queries_per_kv = args.query.shape[1] // cache.num_heads
    if queries_per_kv > module.MAX_QUERIES_PER_KV:
        return f"{queries_per_kv} query heads for one of K and V pass {module.MAX_QUERIES_PER_KV}"
    nbytes = module.query_bytes(queries_per_kv, max(cache.head_dim, cache.v_head_dim), cache.dtype.itemsize)
    if nbytes > module.MAX_QUERY_BYTES:
        return (
            f"{queries_per_kv} query heads for one of K and V take {nbytes} bytes, which pass {module.MAX_QUERY_BYTES}"
        )
    return None


def on_varlen(args: Arguments) -> Tensor:
    """Torch's `varlen_attn`, for a call that `varlen_refuses` lets pass."""
    found = _varlen()
    if found is None:
        raise RuntimeError("torch has no varlen_attn that takes a block table")
    query, cache, step = args.query, args.cache, args.step
    out = query.new_zeros(*query.shape[:2], cache.v_head_dim)
    found[0](
        out,
        query,
        cache.key_cache,
        cache.value_cache,
        step.query_start_loc[: step.num_seqs + 1],
        None,
        step.max_query_len,
        args.longest,
        scale=args.scale,
        window_size=(-1 if args.window is None else args.window - 1, 0),
        enable_gqa=query.shape[1] != cache.num_heads,
        seqused_k=step.seq_lens[: step.num_seqs],
        block_table=args.table[: step.num_seqs],
    )
    return out


def on_triton(args: Arguments, *, splits: int | None = None) -> Tensor:
    """Our Triton kernel; `splits` as for `kvblocks.kernels.attention.attend`."""
    module = kernels("attention")
    if module is None:
        raise RuntimeError("Triton is not installed, so its kernels cannot attend; `pip install triton`")
    query, cache, step = args.query, args.cache, args.step
    capacity = args.table.shape[1] * cache.block_size
    out: Tensor = module.attend(
        query if query.stride(2) == 1 else query.contiguous(),
        (cache.key_cache, cache.value_cache),
        _forms(cache),
        args.table if args.table.stride(1) == 1 else args.table.contiguous(),
        step.seq_lens.contiguous(),
        step.query_start_loc.contiguous(),
        num_seqs=step.num_seqs,
        max_query_len=step.max_query_len,
        max_seq_len=capacity,  # not the step's: a capture must launch what the pass before it compiled and loaded
        scale=args.scale,
        window=args.window if (args.window or capacity) < capacity else None,
        chunk=args.chunk if (args.chunk or capacity) < capacity else None,
        softcap=args.softcap,
        sinks=None if args.sinks is None else args.sinks.contiguous(),
        splits=splits,
    )
    return out


_known: "WeakKeyDictionary[PagedKVCache, tuple[Any, Any]]" = WeakKeyDictionary()


def _forms(cache: PagedKVCache) -> tuple[Any, Any]:
    """How K and V lie in memory, in elements, as the kernel's constants."""
    found = _known.get(cache)
    if found is None:
        module = kernels("attention")
        assert module is not None
        keys, values = (module.Form.of(layout, cache.dtype.itemsize) for layout in cache.block_layouts)
        found = _known[cache] = (keys, values)
    return found


@functools.cache
def _varlen() -> tuple[Callable[..., Any], Callable[[], str | None]] | None:
    """torch's `varlen_attn_out` and what names its backend, where there is one that takes a block table."""
    try:
        from torch.nn.attention import current_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn_out
    except ImportError:
        return None
    if "block_table" not in inspect.signature(varlen_attn_out).parameters:
        return None
    return varlen_attn_out, current_flash_attention_impl
