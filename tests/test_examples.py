"""The examples run, and say what they show. Each compares its own answers with those of a model without a cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import package_folder

FOLDER = Path(__file__).resolve().parent.parent / "examples"
# The model of the others, which shows nothing by itself.
SHARED = {"tiny_model"}
SHOWS = {
    "asynchronous_decode": "as one step at a time: True",
    "beam_search": "without sharing they would hold 64",
    "chat": "of them computed in earlier turns",
    "images": "2 of the images were left out",
    "sizing": "sequences of 8,192 tokens fit beside the weights",
    "smallest_engine": "all as without a cache",
    "tensor_parallel": "block tables on each rank, the same block ids: True",
    "speculative_decoding": "the same tokens as one at a time: True",
    "two_layer_groups": "which attend to 8 tokens, hold 2",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == SHOWS.keys() | SHARED


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(package_folder().parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert SHOWS[name] in done.stdout
    assert not list(tmp_path.iterdir())
