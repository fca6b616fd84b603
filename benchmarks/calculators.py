"""Other calculators of a KV cache's size, each asked for the bytes of one sequence of a local config.

They need versions of packages that may not agree, so each runs in a Python of its own: `python -m venv DIR` and
`DIR/bin/pip install hf-mem` (or kvfit, or ridgepoint), then name `DIR/bin/python`. All three read their configs from
the hub; here each gets the dict that it would have read, through the function that it counts with. This file is also
what runs there: it reads {"calculator", "questions"} as JSON and prints an answer, or the reason for none, to each.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CALCULATORS", "Question", "ask"]


@dataclass(frozen=True)
class Question:
    """How many bytes one sequence takes.

    Args:
        config: of the model.
        tokens: of the sequence.
        number_bytes: of a number of K and V: 2, or 1 for fp8.
        packed: whether a latent and its index key are meant as engines pack them, where a calculator can say so.
    """

    config: dict[str, Any]
    tokens: int
    number_bytes: int
    packed: bool = False


def ask(calculator: str, python: str, questions: Sequence[Question]) -> tuple[str, list[float | str]]:
    """The calculator's version, and its answers: bytes, or why there is none.

    Raises:
        ModuleNotFoundError: it is not installed for that Python.
    """
    asked = json.dumps({"calculator": calculator, "questions": [asdict(question) for question in questions]})
    done = subprocess.run([python, __file__], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModuleNotFoundError(done.stderr.strip().rpartition("\n")[2])
    found = json.loads(done.stdout.splitlines()[-1])  # whatever else it prints comes before
    return found["version"], found["answers"]


def _hf_mem(config: dict[str, Any], tokens: int, number_bytes: int, packed: bool) -> float:
    from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size

    seen = any("ForConditionalGeneration" in name for name in config.get("architectures") or [])
    text = config["text_config"] if seen and "text_config" in config else config
    dtype = {1: "F8_E4M3", 2: "BF16"}[number_bytes]
    return float(compute_safetensors_kv_cache_size(text, dtype, tokens))


def _kvfit(config: dict[str, Any], tokens: int, number_bytes: int, packed: bool) -> float:
    from kvfit.architectures import estimate_cache

    found = estimate_cache(config, context_tokens=tokens, kv_bytes=float(number_bytes))
    if packed:
        from kvfit.cache_layout import apply_cache_layout

        found = apply_cache_layout(found, config, profile="sglang-dsa-scaled", kv_dtype="fp8")
    return float(found.total_bytes)


def _ridgepoint(config: dict[str, Any], tokens: int, number_bytes: int, packed: bool) -> float:
    from ridgepoint import fit, hf

    def local(repo: str, name: str, revision: str) -> dict[str, Any]:
        if name != "config.json":
            raise FileNotFoundError(name)
        return config

    hf._download_json = local
    hf._safetensors_numel = lambda *_: 1_000_000_000  # of the weights, which do not count here
    dtype = {1: "fp8", 2: "bf16"}[number_bytes]
    found = fit("local/config", "h100-80gb", count=8, kv_cache_dtype=dtype, ctx=tokens, as_json=True)
    return float(json.loads(found)["capacity"]["bytes_per_seq"])


CALCULATORS: dict[str, Callable[..., float]] = {
    "hf-mem": _hf_mem,
    "kvfit": _kvfit,
    "ridgepoint": _ridgepoint,
}


def _main() -> None:
    from importlib.metadata import version

    asked = json.load(sys.stdin)
    answers: list[float | str] = []
    found = version(asked["calculator"])
    for question in asked["questions"]:
        try:
            answers.append(CALCULATORS[asked["calculator"]](**question))
        except Exception as error:  # whatever another program raises is its answer
            answers.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print("\n" + json.dumps({"version": found, "answers": answers}))


if __name__ == "__main__":
    _main()
