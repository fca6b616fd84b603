"""Every block manager that is compared, behind one interface: the same prompts in, the calls that its engine makes.

A contender gets what helps it: prompts in its own container, one call for a whole prompt, its heap frozen from the
garbage collector. Each adapter imports its package only when it is made; `available` says which can be, and why others
cannot.
"""

import inspect
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CONTENDERS", "OURS", "Contender", "Tokens", "available", "versions"]

OURS = "kvblocks"
Tokens = npt.NDArray[np.int32]


class Contender:
    """One block manager with a prefix cache. Prompts count as computed when `admit` returns.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        max_seqs, max_tokens: sequences at once, and tokens of the longest.
        prefix_caching: whether computed blocks are kept for others.
    """

    name: str
    package: str | None = None  # what it is a version of

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        raise NotImplementedError

    def prompt(self, tokens: Tokens) -> Any:
        """The tokens in the container this manager takes. Never timed."""
        return tokens.tolist()

    def arrive(self, prompt: Any) -> Any:
        """A request, with whatever is computed of it before it is looked up (hashes)."""
        return prompt

    def lookup(self, request: Any) -> int:
        """Tokens that are cached."""
        raise NotImplementedError

    def admit(self, request: Any) -> tuple[Any, int] | None:
        """A key, and the tokens that were cached; None when the pool has no room now."""
        raise NotImplementedError

    def reserve(self, request: Any) -> tuple[Any, int] | None:
        """Blocks for the prompt, which is not computed yet."""
        return self.admit(request)

    def batch(self, keys: Sequence[Any]) -> Any:
        """What `step` takes. Never timed."""
        return keys

    def step(self, batch: Any, tokens: Tokens) -> None:
        """One decode step: a token for each, its slot, and what is full published."""
        raise NotImplementedError

    def free(self, keys: Sequence[Any]) -> None:
        raise NotImplementedError


class KVBlocks(Contender):
    """Also fills every array of the step, in `admit` as in `step`."""

    name = OURS
    package = "kvblocks"

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        from kvblocks.errors import NoFreeBlocks
        from kvblocks.manager import BlockManager
        from kvblocks.replay import host_step

        self.no_room = NoFreeBlocks
        self.manager = BlockManager(num_blocks, block_size, max_seqs=max(max_seqs, 64), prefix_caching=prefix_caching)
        self.chunk = 8192
        self.arrays = host_step(max_seqs, max(self.chunk, max_seqs), -(-max_tokens // block_size) + 1)

    def prompt(self, tokens: Tokens) -> Tokens:
        return tokens

    def lookup(self, request: Tokens) -> int:
        return self.manager.match(request)

    def reserve(self, request: Tokens) -> tuple[int, int] | None:
        try:
            return self.manager.admit(request)
        except self.no_room:
            return None

    def admit(self, request: Tokens) -> tuple[int, int] | None:
        admitted = self.reserve(request)
        if admitted is None:
            return None
        (seq, cached), manager = admitted, self.manager
        left = len(request) - cached
        while left:
            chunk = min(left, self.chunk)
            manager.commit(manager.prepare(seq, chunk, self.arrays))
            left -= chunk
        return seq, cached

    def batch(self, keys: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array(keys, np.int64)

    def step(self, batch: npt.NDArray[np.int64], tokens: Tokens) -> None:
        self.manager.append(batch, tokens)
        self.manager.commit(self.manager.prepare(batch, 1, self.arrays))

    def free(self, keys: Sequence[int]) -> None:
        self.manager.free(keys)


class PlainPython(Contender):
    """What a careful person writes in an afternoon: dicts, lists, and numpy rows for tokens and block tables.

    Blocks are found by a chained 64-bit hash that is trusted; cached blocks are evicted in the order they came free.
    """

    name = "plain Python"

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        self.block_size, self.caching = block_size, prefix_caching
        self.unused = list(range(num_blocks - 1, -1, -1))
        self.refs = [0] * num_blocks
        self.key: list[int | None] = [None] * num_blocks
        self.found: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.blocks: list[list[int]] = [[] for _ in range(max_seqs)]
        self.last = [0] * max_seqs  # hash of the newest full block
        self.rows = list(range(max_seqs))
        self.tokens = np.zeros((max_seqs, max_tokens), np.int32)
        self.table = np.zeros((max_seqs, -(-max_tokens // block_size) + 1), np.int32)
        self.lengths = np.zeros(max_seqs, np.int64)
        self.query_start_loc = np.arange(max_seqs + 1, dtype=np.int32)

    def prompt(self, tokens: Tokens) -> Tokens:
        return tokens

    def arrive(self, prompt: Tokens) -> tuple[Tokens, list[int]]:
        if not self.caching:
            return prompt, []
        data, width, parent, hashes = prompt.tobytes(), 4 * self.block_size, 0, []
        for i in range(0, len(data) - width + 1, width):
            parent = hash((parent, data[i : i + width]))
            hashes.append(parent)
        return prompt, hashes

    def hits(self, request: tuple[Tokens, list[int]]) -> list[int]:
        prompt, hashes = request
        blocks, find = [], self.found.get
        for h in hashes[: (len(prompt) - 1) // self.block_size]:
            block = find(h)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def lookup(self, request: tuple[Tokens, list[int]]) -> int:
        return len(self.hits(request)) * self.block_size

    def take(self, count: int) -> list[int] | None:
        unused, idle, key = self.unused, self.idle, self.key
        if count > len(unused) + len(idle):
            return None
        while len(unused) < count:
            block, _ = idle.popitem(last=False)
            del self.found[key[block]]  # type: ignore[arg-type]
            key[block] = None
            unused.append(block)
        taken = unused[len(unused) - count :]
        del unused[len(unused) - count :]
        for block in taken:
            self.refs[block] = 1
        return taken

    def admit(self, request: tuple[Tokens, list[int]]) -> tuple[int, int] | None:
        prompt, hashes = request
        blocks, refs = self.hits(request), self.refs
        num_hits = len(blocks)
        for block in blocks:
            if not refs[block]:
                del self.idle[block]
            refs[block] += 1
        new = self.take(-(-len(prompt) // self.block_size) - num_hits)
        if new is None:
            self.release(blocks)
            return None
        blocks += new
        row, found, key = self.rows.pop(), self.found, self.key
        for h, block in zip(hashes[num_hits:], new, strict=False):
            if h not in found:
                found[h], key[block] = block, h
        self.blocks[row], self.last[row] = blocks, hashes[-1] if hashes else 0
        self.tokens[row, : len(prompt)] = prompt
        self.table[row, : len(blocks)] = blocks
        self.lengths[row] = len(prompt)
        return row, num_hits * self.block_size

    def batch(self, keys: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array(keys, np.int64)

    def step(self, batch: npt.NDArray[np.int64], tokens: Tokens) -> None:
        size, positions = self.block_size, self.lengths[batch]
        self.tokens[batch, positions] = tokens
        offsets = positions % size
        for row in batch[offsets == 0].tolist():
            new = self.take(1)
            if new is None:
                raise RuntimeError("no free blocks")
            self.table[row, len(self.blocks[row])] = new[0]
            self.blocks[row] += new
        self.lengths[batch] = self.seq_lens = positions + 1
        self.slot_mapping = self.table[batch, positions // size].astype(np.int64) * size + offsets
        self.input_ids, self.positions = tokens.astype(np.int64), positions
        if self.caching:
            for row in batch[offsets == size - 1].tolist():
                end, block = int(self.lengths[row]), self.blocks[row][-1]
                self.last[row] = h = hash((self.last[row], self.tokens[row, end - size : end].tobytes()))
                if h not in self.found:
                    self.found[h], self.key[block] = block, h

    def release(self, blocks: list[int]) -> None:
        refs, key, unused, idle = self.refs, self.key, self.unused, self.idle
        for block in reversed(blocks):
            refs[block] -= 1
            if not refs[block]:
                if key[block] is None:
                    unused.append(block)
                else:
                    idle[block] = None

    def free(self, keys: Sequence[int]) -> None:
        for row in keys:
            self.release(self.blocks[row])
            self.rows.append(row)


class VLLM(Contender):
    """`KVCacheManager` as its scheduler calls it, one `allocate_slots` a prompt; `Request` makes the hashes."""

    name = "vLLM"
    package = "vllm"

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        hash_function = get_hash_fn_by_name("sha256")  # its default
        init_none_hash(hash_function)
        self.request, self.count = Request, 0
        self.hasher = get_request_block_hasher(block_size, hash_function) if prefix_caching else None
        self.params = SamplingParams(max_tokens=max_tokens)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=16, dtype=torch.float16)
        # One block is its null block.
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=max_tokens,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=prefix_caching,
        )

    def arrive(self, prompt: list[int]) -> Any:
        self.count += 1
        return self.request(str(self.count), prompt, self.params, None, block_hasher=self.hasher)

    def lookup(self, request: Any) -> int:
        return int(self.manager.get_computed_blocks(request)[1])

    def admit(self, request: Any) -> tuple[Any, int] | None:
        blocks, cached, *_ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, request.num_tokens - cached, cached, blocks) is None:
            return None
        request.num_computed_tokens = request.num_tokens
        return request, cached

    def batch(self, keys: Sequence[Any]) -> list[Any]:
        return list(keys)

    def step(self, batch: list[Any], tokens: Tokens) -> None:
        allocate = self.manager.allocate_slots
        for request, token in zip(batch, tokens.tolist(), strict=True):
            request.append_output_token_ids(token)
            if allocate(request, 1) is None:
                raise RuntimeError("no free blocks")
            request.num_computed_tokens += 1

    def free(self, keys: Sequence[Any]) -> None:
        for request in keys:
            self.manager.free(request)


class SGLang(Contender):
    """A radix cache, the token allocator and the table of slots, with the calls of its scheduler in their order."""

    name = "SGLang"
    package = "sglang"
    page_size = 16
    rust = False

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        import torch

        torch.set_num_threads(1)  # its tensors are small: threads would only wait for each other
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

        self.torch, self.key = torch, RadixKey
        self.evicting, self.inserting, self.matching = EvictParams, InsertParams, MatchPrefixParams
        size, page = num_blocks * block_size, self.page_size
        if page == 1:
            self.allocator = TokenToKVPoolAllocator(size, torch.float16, "cpu", None, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(size, page, torch.float16, "cpu", None, False)
            self.allocator.use_triton_kernels = False  # they need a GPU; the same in torch instead
        self.rows = ReqToTokenPool(max_seqs, max_tokens + page, "cpu", False)
        params = CacheInitParams(not prefix_caching, self.rows, self.allocator, page)
        if self.rust:
            from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
            from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

            params.tree_components = (ComponentType.FULL,)
            params.tree_core_backend = "rust"
            self.tree = UnifiedRadixCache(params)
            if "Rust" not in type(self.tree.tree_core).__name__:
                raise ImportError(f"its Rust tree is not usable here: got {type(self.tree.tree_core).__name__}")
        else:
            self.tree = RadixCache(params)

    def prompt(self, tokens: Tokens) -> Any:
        return array("q", tokens.astype(np.int64).tobytes())

    def match(self, tokens: Any) -> Any:
        return self.tree.match_prefix(self.matching(key=self.key(tokens[:-1])))

    def lookup(self, request: Any) -> int:
        return int(self.match(request).device_prefix_len)

    def room(self, num_tokens: int) -> None:
        self.allocator.evict_to_free_tokens(self.tree, num_tokens)

    def admit(self, request: Any) -> tuple[Any, int] | None:
        n = len(request)
        found = self.match(request)
        cached = found.device_prefix_len
        lock = self.tree.lock(found.last_device_node)
        need = n - cached + (self.page_size if self.page_size > 1 else 0)
        if need > self.allocator.available_size() + self.tree.evictable_size():
            self.tree.unlock(lock)
            return None
        self.room(need)
        (row,) = self.rows.alloc_rows(1)
        slots = self.rows.req_to_token[row]
        if cached:
            prefix = self.tree.path_device_indices(found.last_device_node)
            slots[:cached] = prefix
        # A hit ends at a page, so whole pages do, for far less than `alloc_extend` takes on a CPU.
        slots[cached:n] = self.allocator.alloc(-(-(n - cached) // self.page_size) * self.page_size)[: n - cached]
        sequence = SimpleNamespace(row=row, slots=slots, tokens=request[:], lock=lock, kept=cached)
        if not self.tree.disable:
            self.publish(sequence)
        return sequence, cached

    def publish(self, sequence: Any) -> None:
        """What its `checkpoint` does: insert, give back duplicates, take over the tree's slots, move the lock."""
        # A copy, as its engine makes one: with pages of one token the tree keeps what it is handed.
        key = self.key(sequence.tokens[:]).page_aligned(self.page_size)
        values = sequence.slots[: len(key)].to(self.torch.int64, copy=True)
        result = self.tree.insert(self.inserting(key=key, value=values, prev_prefix_len=sequence.kept))
        if self.rust:
            node = result.last_device_node
        else:
            self.allocator.free_segment(
                sequence.slots[sequence.kept : result.prefix_len].to(self.torch.int64), start_pos=sequence.kept
            )
            node = self.tree.match_prefix(self.matching(key=key)).last_device_node
        indices = self.tree.path_device_indices(node)
        sequence.slots[sequence.kept : len(indices)] = indices[sequence.kept :]
        sequence.kept = len(indices)
        self.tree.unlock(sequence.lock)
        sequence.lock = self.tree.lock(node)

    def batch(self, keys: Sequence[Any]) -> Any:
        lengths = self.torch.tensor([len(sequence.tokens) for sequence in keys])
        return keys, self.torch.tensor([sequence.row for sequence in keys]), lengths

    def step(self, batch: Any, tokens: Tokens) -> None:
        sequences, rows, lengths = batch
        self.room(len(sequences) * self.page_size)
        if self.page_size == 1:
            new = self.allocator.alloc(len(sequences))
        else:
            last = self.rows.req_to_token[rows, lengths - 1].to(self.torch.int64)
            longer = lengths + 1
            new = self.allocator.alloc_decode(longer, longer, last)
        if new is None:
            raise RuntimeError("no free slots")
        self.rows.write((rows, lengths), new.to(self.torch.int32))
        lengths += 1
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)

    def free(self, keys: Sequence[Any]) -> None:
        self.allocator.free_group_begin()
        for sequence in keys:
            if not self.tree.disable:
                self.publish(sequence)
            tail = sequence.slots[sequence.kept : len(sequence.tokens)].to(self.torch.int64)
            self.allocator.free_segment(tail, start_pos=sequence.kept)
            self.tree.unlock(sequence.lock)
            self.rows.free_slots.append(sequence.row)
        self.allocator.free_group_end()


class SGLangTokens(SGLang):
    """Pages of one token, its default."""

    name = "SGLang, page 1"
    page_size = 1


class SGLangRust(SGLang):
    name = "SGLang, Rust tree"
    rust = True


class Transformers(Contender):
    """The paged cache of its continuous batching, with the calls of its scheduler."""

    name = "transformers"
    package = "transformers"

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        import torch
        from transformers import LlamaConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
        from transformers.generation.continuous_batching.distributed import DistributedHelper
        from transformers.generation.continuous_batching.requests import RequestState

        config = LlamaConfig(
            hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=8
        )
        batching = ContinuousBatchingConfig(
            num_blocks=num_blocks,
            page_size=block_size,
            max_batch_tokens=1,  # only sizes buffers of the model
            max_memory_percent=0.9,
            allow_block_sharing=prefix_caching,
        )
        helper = DistributedHelper(None, None)
        self.cache = PagedAttentionCache(config, batching, "meta", helper, torch.float16)  # K and V without memory
        self.state, self.count = RequestState, 0

    def arrive(self, prompt: list[int]) -> Any:
        self.count += 1
        return self.state(request_id=str(self.count), initial_tokens=prompt)

    def lookup(self, request: Any) -> int:
        (allocator,) = self.cache.cache_allocators.values()
        return len(allocator.match_prefix_blocks(request.initial_tokens)) * allocator.tokens_per_page

    def store(self, request: Any, num_tokens: int) -> bool:
        if self.cache.can_store_request_tokens(request, num_tokens):
            return True
        # It has no order of eviction: under pressure its scheduler drops all that is cached.
        self.cache.evict_cached_blocks()
        self.cache.pool.try_to_free_sectors()
        return bool(self.cache.can_store_request_tokens(request, num_tokens))

    def compute(self, request: Any, num_tokens: int) -> None:
        complete = self.cache.count_new_complete_blocks(request, num_tokens)
        request.position_offset += num_tokens
        self.cache.mark_complete_blocks(request, complete)

    def admit(self, request: Any) -> tuple[Any, int] | None:
        cached = self.cache.search_prefix_match(request.request_id, request.initial_tokens)
        request.position_offset = cached
        left = len(request.initial_tokens) - cached
        if not self.store(request, left):
            self.cache.free_blocks(request.request_id)
            return None
        self.compute(request, left)
        return request, cached

    def batch(self, keys: Sequence[Any]) -> list[Any]:
        return list(keys)

    def step(self, batch: list[Any], tokens: Tokens) -> None:
        for request, token in zip(batch, tokens.tolist(), strict=True):
            request.generated_tokens.append(token)
            if not self.store(request, 1):
                raise RuntimeError("no free blocks")
            self.compute(request, 1)

    def free(self, keys: Sequence[Any]) -> None:
        for request in keys:
            self.cache.free_blocks(request.request_id)


class NanoVLLM(Contender):
    """Its block manager, which cannot be told not to hash."""

    name = "nano-vllm"
    package = "nano-vllm"

    def __init__(
        self, num_blocks: int, block_size: int, *, max_seqs: int, max_tokens: int, prefix_caching: bool = True
    ) -> None:
        from nanovllm.engine.block_manager import BlockManager
        from nanovllm.engine.sequence import Sequence as NanoSequence

        NanoSequence.block_size = block_size
        self.manager, self.sequence = BlockManager(num_blocks, block_size), NanoSequence
        # Newer versions hand what `can_allocate` found to `allocate`.
        self.two_steps = len(inspect.signature(self.manager.allocate).parameters) > 1

    def arrive(self, prompt: list[int]) -> Any:
        return self.sequence(prompt)

    def lookup(self, request: Any) -> int:
        """It has no lookup alone; the same loop as in `allocate`."""
        manager, h = self.manager, -1
        for i in range((len(request) - 1) // manager.block_size):
            tokens = request.block(i)
            h = manager.compute_hash(tokens, h)
            block = manager.hash_to_block_id.get(h, -1)
            if block == -1 or manager.blocks[block].token_ids != tokens:
                return int(i * manager.block_size)
        return int(len(request) // manager.block_size * manager.block_size)

    def admit(self, request: Any) -> tuple[Any, int] | None:
        can = self.manager.can_allocate(request)
        if self.two_steps:
            if can < 0:
                return None
            self.manager.allocate(request, can)
        else:
            if not can:
                return None
            self.manager.allocate(request)
        return request, request.num_cached_tokens

    def step(self, batch: Sequence[Any], tokens: Tokens) -> None:
        manager = self.manager
        for sequence, token in zip(batch, tokens.tolist(), strict=True):
            sequence.append_token(token)
            if not manager.can_append(sequence):
                raise RuntimeError("no free blocks")
            manager.may_append(sequence)

    def free(self, keys: Sequence[Any]) -> None:
        for sequence in keys:
            self.manager.deallocate(sequence)


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (KVBlocks, PlainPython, VLLM, SGLangTokens, SGLang, SGLangRust, Transformers, NanoVLLM)
}


def available(names: Iterable[str] | None = None, say: Callable[[str], None] = print) -> dict[str, type[Contender]]:
    """The contenders that can be made here, in order; of the others the reason is said."""
    found = {}
    for name in CONTENDERS if names is None else names:
        if name not in CONTENDERS:
            raise ValueError(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
        try:
            CONTENDERS[name](64, 16, max_seqs=2, max_tokens=256)
        except Exception as error:  # packages that need a GPU fail to import in many ways
            say(f"without {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        found[name] = CONTENDERS[name]
    return found


def versions() -> list[str]:
    """Packages whose versions a report states."""
    packages = {contender.package for contender in CONTENDERS.values() if contender.package}
    installed = {name for name in packages if _installed(name)}
    return sorted(installed | {"numpy", "torch"})


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
