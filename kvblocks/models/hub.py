"""Files of a model on the hub, through huggingface_hub: from its cache or downloaded, or a quick error.

Imports huggingface_hub, and what speaks to a network, only where a model is named by a hub id.
"""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["PATIENCE", "HubModel", "hub_model"]

_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", re.ASCII)
# Seconds in which the hub answers a first question, its name looked up and the connection made, or is out of reach.
# HF_HUB_ETAG_TIMEOUT, where it is set, is how long huggingface_hub waits for the same answer.
PATIENCE = 1.0
_SLOWEST = 60.0  # seconds for one file of a hub that answers: a config, an index or a header, a few megabytes at most
_Made = TypeVar("_Made")


def hub_model(text: str) -> "HubModel | None":
    """The model that "organization/name" or "organization/name@revision" names; None where the text is no such id."""
    match = _HUB_ID.fullmatch(text)
    return None if match is None or text.startswith(".") else HubModel(text, match[1], match[2])


class HubModel:
    """A model on the hub.

    Args:
        text: as the caller names it, for errors.
        name: its id.
        revision: a branch, a tag or a commit; None for the newest.
    """

    def __init__(self, text: str, name: str, revision: str | None) -> None:
        self.text = text
        self.name = name
        self.revision = revision
        self.folder: Path | None = None  # in the cache, with the files that were asked for

    def file(self, file: str) -> Path:
        """The path of one of its files, in the cache of huggingface_hub.

        Raises:
            FileNotFoundError: there is no such file, or the hub does not answer in time (see `PATIENCE`).
        """
        try:
            from huggingface_hub import hf_hub_download, try_to_load_from_cache
            from huggingface_hub.errors import LocalEntryNotFoundError
        except ModuleNotFoundError:
            raise FileNotFoundError(
                f'{self.text} is neither a folder nor a file; to look it up on the hub: pip install "kvblocks[plan]"'
            ) from None
        missing = f"{self.text} is neither a folder nor a file, and {file} is not to be had from the hub"
        away = self._out_of_reach(file)
        if away:
            path = try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(path, str):
                raise FileNotFoundError(f"{missing}: {away}")
        else:
            try:
                path = _within(_SLOWEST, lambda: str(hf_hub_download(self.name, file, revision=self.revision)))
            except Exception as error:  # of many kinds, from several libraries; each says what went wrong
                # "Is your network down?", says huggingface_hub of whatever a server answered; what caused it says more.
                told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
                raise FileNotFoundError(f"{missing}: {_one_line(told or error)}") from error
        self.folder = Path(path).parent
        return Path(path)

    def has(self, file: str) -> bool:
        """Whether it has such a file.

        Raises:
            FileNotFoundError: the hub cannot be reached, or does not know the model.
        """
        from huggingface_hub import HfApi

        away = self._out_of_reach(file)
        if away:
            raise FileNotFoundError(f"the files of {self.text} are not to be had from the hub: {away}")
        try:
            return _within(_SLOWEST, lambda: bool(HfApi().file_exists(self.name, file, revision=self.revision)))
        except Exception as error:  # as above
            raise FileNotFoundError(
                f"the files of {self.text} are not to be had from the hub: {_one_line(error)}"
            ) from error

    def tensor_bytes(self, file: str) -> dict[str, int]:
        """Bytes of every tensor in a safetensors file, of which only the header is downloaded.

        Raises:
            FileNotFoundError: there is no such file, or the hub cannot be reached.
        """
        from huggingface_hub import HfApi

        try:
            found = _within(
                _SLOWEST,
                lambda: HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.revision),
            )
        except Exception as error:  # as above
            raise FileNotFoundError(
                f"{file} of {self.text} is not to be had from the hub: {_one_line(error)}"
            ) from error
        return {name: tensor.data_offsets[1] - tensor.data_offsets[0] for name, tensor in found.tensors.items()}

    def _out_of_reach(self, file: str) -> str:
        """Why the hub cannot be reached; empty where it answers what it knows of a file, be it that there is none."""
        from urllib.parse import urlsplit

        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        patience = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
        host = urlsplit(constants.ENDPOINT).hostname
        url = hf_hub_url(self.name, file, revision=self.revision)
        try:
            _within(patience, lambda: get_hf_file_metadata(url, timeout=patience))
        except HfHubHTTPError:
            return ""
        except TimeoutError:
            return f"{host} does not answer within {patience:g} s (HF_HUB_ETAG_TIMEOUT sets how long to wait)"
        except Exception as error:  # a name that is not known, a connection that is refused: as above
            return f"{host} cannot be reached ({_one_line(error)})"
        return ""


def _within(seconds: float, call: Callable[[], _Made]) -> _Made:
    """What a call returns or raises.

    It runs in a thread of its own, because the limits that libraries take bound each step of a request, and neither the
    look-up of a name nor the sum.

    Raises:
        TimeoutError: it takes longer than `seconds`. The thread ends when its call does, or with the process.
    """
    made: list[_Made] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError(f"it takes longer than {seconds:g} s")
    return made[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
