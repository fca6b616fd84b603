"""Compile, for a GPU that need not be there, what the public calls launch on CUDA; print what came out as JSON.

Run as `python kernel_compiler.py 90`: the compute capability, in tens. Triton's driver is replaced by one that knows
only that; the launches go all the way to the machine code, with the specializations that real ones would have.
"""

import json
import re
import sys
from typing import Any

import torch
from kernel_helpers import moved_by
from test_attention import Case
from test_attention_cuda import arguments_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvblocks.attention.backends import on_triton
from kvblocks.kernels import kernels
from kvblocks.sizes import LAYOUTS
from kvblocks.storage.movers import WithTriton

CAPABILITY = int(sys.argv[1])
compiled: list[dict[str, Any]] = []
label = ""


class NoDriver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    compiled.append(
        {
            "kernel": self.__name__,
            "case": label,
            "loads": widths(ptx, r"ld\.global(?:\.\w+)*")
            + [int(n, 16) for n in re.findall(r"cp\.async[^;]*?, 0x(\w+)", ptx)],
            "stores": widths(ptx, r"st\.global(?:\.\w+)*"),
            "shared": kernel.metadata.shared,
            "machine code": len(kernel.asm["cubin"]),
            "matrix units": len(re.findall(r"\bmma\.sync|mma_async|tcgen05\.mma", ptx)),
        }
    )


def widths(ptx: str, pattern: str) -> list[int]:
    """Bytes that each access of a thread moves."""
    found = []
    for access in re.findall(pattern, ptx):
        vector = re.search(r"\.v(\d)", access)
        found.append(int(access.rsplit("b", 1)[1]) // 8 * (int(vector[1]) if vector else 1))
    return found


def main() -> None:
    global label
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for layout in LAYOUTS:
            label = f"{layout} {str(dtype).removeprefix('torch.')}"
            cache = moved_by(WithTriton, 64, 8, 128, 16, dtype, "cpu", layout=layout)
            rows = torch.zeros(40, 8, 128).to(dtype)
            cache.write(rows, rows, torch.arange(40))
            cache.gather(torch.arange(4), 60)
    label = "blocks"
    cache.copy_blocks([[2, 3], [0, 1]])
    cache.zero_blocks([2])
    slots = kernels("slots")
    assert slots is not None
    chunks = slots.Chunks.of([(0, 4096, 4096)], [4096], torch.device("cpu"))
    slots.move_blocks(chunks, 4096, 8192, torch.zeros(3, 4, dtype=torch.int32))
    steps = kernels("steps")
    assert steps is not None
    steps.apply_patches(torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), 8, 1, 8)
    for rows_of, splits in (([(40, 1), (9, 1)], 4), ([(80, 80), (9, 1)], 1)):
        for options in ({}, {"window": 20, "softcap": 3.0}):
            label = f"{'decode' if splits > 1 else 'prefill'} {sorted(options)}"
            case = Case(
                rows_of, 16, groups=4, head_dim=128, v_head_dim=128, dtype=torch.bfloat16, options=dict(options)
            )
            on_triton(arguments_of(case.build()), splits=splits)
    label = "prefill float32"
    on_triton(arguments_of(Case([(80, 80)], 16, head_dim=80, v_head_dim=64, with_sinks=True).build()), splits=1)
    print(json.dumps(compiled))


if __name__ == "__main__":
    driver.set_active(NoDriver())
    launch = JITFunction.run
    JITFunction.run = compile_only
    main()
