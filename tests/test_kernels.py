"""Finding the kernels: what happens where Triton is not installed, and which mover a device gets."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvblocks.kernels import kernels
from kvblocks.storage import movers
from kvblocks.storage.cache import PagedKVCache


def two_sides(device: str, gap: int = 0) -> Any:
    """K and V that say where they are, and whether something lies between their blocks."""
    blocks = SimpleNamespace(block_bytes=64, block_stride=64 + gap)
    return [SimpleNamespace(tensor=SimpleNamespace(device=torch.device(device)), blocks=blocks)] * 2


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    yield
    kernels.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_plain_torch_moves_blocks_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movers, "WithTorch", lambda sides: "torch")
    sides = two_sides("cuda:0")
    with caplog.at_level(logging.WARNING, logger="kvblocks"):
        chosen: list[Any] = [movers.mover(sides), movers.mover(sides)]
    assert chosen == ["torch", "torch"]
    [record] = caplog.records
    assert record.getMessage().startswith(
        "Triton is not installed, so plain torch operations take the place of kvblocks.kernels.movement: "
    )
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        movers.WithTriton([])


def test_each_device_has_its_mover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "WithTriton", lambda sides: "triton")
    monkeypatch.setattr(movers, "WithTorch", lambda sides: "torch")

    def chosen(device: str, gap: int = 0) -> Any:
        return movers.mover(two_sides(device, gap))

    assert chosen("cuda:1") == "triton"
    assert chosen("cuda:1", gap=16) == "torch"  # the kernels know no gaps between blocks
    assert chosen("mps") == "torch"
    assert isinstance(chosen("cpu"), movers.InMemory)


@pytest.mark.usefixtures("without_triton")
def test_on_the_cpu_nothing_asks_for_triton(caplog: pytest.LogCaptureFixture) -> None:
    cache = PagedKVCache(4, 1, 8, 4, "float32", "cpu")
    cache.write(torch.ones(1, 1, 8), torch.ones(1, 1, 8), [3])
    assert cache.key_cache.sum() == 8
    assert not caplog.records
