from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex, TypeAlias

import torch
from typing_extensions import disjoint_base

__all__ = ["CacheConfig", "Chunk", "Group", "Window", "itemsize"]

_DType: TypeAlias = torch.dtype | str

def itemsize(dtype: _DType) -> int: ...

@dataclass(frozen=True)
class Window:
    size: int
    def __post_init__(self) -> None: ...

@dataclass(frozen=True)
class Chunk:
    size: int
    def __post_init__(self) -> None: ...

@dataclass(frozen=True)
class Group:
    reach: Window | Chunk | None
    layers: tuple[int, ...]
    def __post_init__(self) -> None: ...

@disjoint_base
class CacheConfig:
    def __new__(
        cls,
        *,
        num_layers: SupportsIndex,
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_gpu_blocks: SupportsIndex,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
    ) -> Self: ...
    @classmethod
    def for_capacity(
        cls,
        *,
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_layers: SupportsIndex,
        max_seq_len: SupportsIndex,
        max_batch_size: SupportsIndex,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
    ) -> Self: ...
    @classmethod
    def for_memory(
        cls,
        *,
        num_kv_heads: SupportsIndex,
        head_dim: SupportsIndex,
        num_layers: SupportsIndex,
        memory_bytes: SupportsIndex | str,
        dtype: _DType,
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layer_shapes: Iterable[Iterable[SupportsIndex]] | None = None,
    ) -> Self: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_gpu_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...
    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def layer_shapes(self) -> tuple[tuple[int, int, int], ...]: ...
    @property
    def layers_per_group(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    def token_bytes(self, dtype: _DType) -> int: ...
    def block_bytes(self, dtype: _DType) -> int: ...
    def memory_bytes(self, dtype: _DType) -> int: ...
    def num_blocks_for(self, num_tokens: SupportsIndex) -> int: ...
    def replace(self, **fields: Any) -> Self: ...
    def __replace__(self, /, **fields: Any) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
