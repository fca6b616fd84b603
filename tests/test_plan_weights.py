"""Weights as a checkpoint holds them: from the headers of safetensors files and their index, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_plan_hub import LLAMA, safetensors

from kvblocks import plan

QUANTIZED = LLAMA | {"quantization_config": {"quant_method": "fp8"}, "num_nextn_predict_layers": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QUANTIZED))
    return tmp_path


def test_headers_of_files_that_safetensors_writes(folder: Path) -> None:
    tensors = {"model.layers.0.a": torch.zeros(7, 5, dtype=torch.float8_e4m3fn), "model.layers.4.b": torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    planned = plan(folder, weights="auto", memory="1GiB")
    assert planned.weights_bytes == 35 + 12
    assert (
        "weights are those of the checkpoint, by safetensors headers; 12 B of them are of layers for multi-token"
        in (planned.explain())
    )
    assert plan(folder / "config.json", weights="auto").weights_bytes == 35 + 12
    assert plan(folder, weights="auto", tp=2).weights_bytes == 24


def test_an_index_with_and_without_its_files(folder: Path) -> None:
    index = {"metadata": {"total_size": 999}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    planned = plan(folder, weights="auto")
    assert planned.weights_bytes == 999
    assert "by model.safetensors.index.json; with 1 layer for multi-token prediction, where it holds them" in (
        planned.explain()
    )
    (folder / "one.safetensors").write_bytes(safetensors({"a": 100}))
    (folder / "two.safetensors").write_bytes(safetensors({"b": 11, "visual.layers.9.c": 4}))
    (folder / "other.safetensors").write_bytes(safetensors({"c": 5000}))
    whole = plan(folder, weights="auto")
    assert whole.weights_bytes == 115
    assert "multi-token prediction" not in whole.explain()
    (folder / "two.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ValueError, match=r"gives no metadata\.total_size, and two\.safetensors is not beside it"):
        plan(folder, weights="auto")


def test_the_same_weights_under_two_names_are_counted_once(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors({"a": 100}))
    (folder / "consolidated.safetensors").write_bytes(safetensors({"b": 100}))
    assert plan(folder, weights="auto").weights_bytes == 100
    (folder / "model.safetensors").unlink()
    assert plan(folder, weights="auto").weights_bytes == 100


def test_an_adapter_beside_the_weights_is_not_counted(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors({"a": 100}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"b": 7}))
    assert plan(folder, weights="auto").weights_bytes == 100


def test_a_dtype_with_scales_counts_them() -> None:
    whole = plan(LLAMA, weights="auto", weights_dtype="int8").weights_bytes
    assert plan(LLAMA, weights="auto", weights_dtype="q8_0").weights_bytes == whole + -(-whole // 32) * 2
    assert plan(LLAMA, weights="auto", weights_dtype="q4_1").weights_bytes == -(-whole // 2) + -(-whole // 32) * 4
    with pytest.raises(ValueError, match="weights_dtype='q8_0,q4_0' names two dtypes; give one"):
        plan(LLAMA, weights="auto", weights_dtype="q8_0,q4_0")
    with pytest.raises(TypeError, match="weights_dtype='nvfp4' is not one to count weights in; give a torch"):
        plan(LLAMA, weights="auto", weights_dtype="nvfp4")


def test_without_a_checkpoint_a_quantized_config_is_estimated(folder: Path) -> None:
    estimated = plan(folder, weights="auto")
    assert "note: weights are estimated from quantization_config (fp8)\n" in estimated.explain()
    assert "note: weights are counted without 1 layer for multi-token prediction" in estimated.explain()
    (folder / "model.safetensors").write_bytes(safetensors({"a": 100}))
    assert plan(folder, weights="auto").weights_bytes == 100
    (folder / "config.json").rename(folder / "other.json")  # which need not be the config of what lies beside it
    assert plan(folder / "other.json", weights="auto").weights_bytes == estimated.weights_bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file: a header of 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is the pointer of Git LFS to the file; run git lfs pull"),
        (b"\xff" * 8 + b"{}", "is no safetensors file: a header of 18446744073709551615 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "holds a list where an object must be"),
        ((2).to_bytes(8, "little") + b"{,", "does not hold JSON where it must"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "'a' has data_offsets=None"),
        ((30).to_bytes(8, "little") + b'{"a": {"data_offsets": [9, 3]}}'[:30] + b"}", "does not hold JSON"),
        ((31).to_bytes(8, "little") + b'{"a": {"data_offsets": [9, 3]}}', r"'a' has data_offsets=\[9, 3\]"),
        ((32).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 10]}}', "is cut off: it has 40 of the 50 bytes"),
        ((5000).to_bytes(8, "little") + b"[" * 5000, "does not hold JSON where it must"),
    ],
)
def test_files_that_are_none(content: bytes, message: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        plan(folder, weights="auto")


def test_an_index_names_files_beside_it(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other/model.safetensors"}}')
    with pytest.raises(ValueError, match=r"names the file '\.\./other/model\.safetensors', which is not beside it"):
        plan(folder, weights="auto")


def test_headers_need_neither_torch_nor_transformers(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors({"a": 100}))
    code = """
import sys
from kvblocks import plan
assert plan(sys.argv[1], weights="auto").weights_bytes == 100
heavy: set = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done: Any = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
