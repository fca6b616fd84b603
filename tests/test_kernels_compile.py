"""The kernels compile to machine code for GPUs, as the public calls launch them, and move 16 bytes at a time.

The interpreter runs what no GPU would compile; here the compiler has its say. It needs no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = [80, 90, 100, 120] if os.environ.get("HYPOTHESIS_PROFILE") == "long" else [90]


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "kernel_compiler.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(script), str(request.param)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == {
        "_write",
        "_gather",
        "_blocks",
        "_move",
        "_apply",
        "_attend",
        "_reduce",
    }
    assert all(kernel["machine code"] > 0 for kernel in compiled)


def test_movement_loads_and_stores_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        if kernel["kernel"] in ("_write", "_gather"):
            # Besides: slots and tables, and in layouts where neighbours are tokens, tokens that are scattered.
            assert 16 in kernel["loads"], kernel
            assert 16 in kernel["stores"], kernel
            if kernel["case"].startswith(("NHD", "HND")) or kernel["kernel"] == "_gather":
                assert set(kernel["stores"]) == {16}, kernel
        elif kernel["kernel"] == "_blocks":
            assert set(kernel["stores"]) == {16}, kernel


def test_attention_uses_the_matrix_units_and_fits_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    attention = [kernel for kernel in compiled if kernel["kernel"] == "_attend"]
    assert len(attention) == 5
    for kernel in attention:
        assert kernel["shared"] <= 99 * 1024, kernel  # the least that a device since Ampere has
        if "float32" not in kernel["case"]:
            assert kernel["matrix units"], kernel
            assert 16 in kernel["loads"], kernel
