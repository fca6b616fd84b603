from typing import Any, final

__all__ = ["BlockLayout", "first_outside"]

def first_outside(address: int, count: int, low: int, high: int) -> int: ...

@final
class BlockLayout:
    num_blocks: int
    block_size: int
    block_bytes: int
    heads: int
    runs: int
    run_bytes: int
    token_stride: int
    head_stride: int
    run_stride: int
    block_stride: int
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        heads: int,
        runs: int,
        run_bytes: int,
        token_stride: int,
        head_stride: int,
        run_stride: int,
        block_stride: int,
    ) -> None: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def write(self, cache: int, source: int, token_stride: int, head_stride: int, slots: int, count: int) -> None: ...
    def gather(self, cache: int, target: int, table: int, num_tokens: int) -> None: ...
    def copy_blocks(self, cache: int, pairs: int, count: int) -> None: ...
    def zero_blocks(self, cache: int, ids: int, count: int) -> None: ...
