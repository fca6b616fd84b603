"""Files of a model on the hub, through huggingface_hub: from its cache, or downloaded, or told quickly that neither is.

Imports huggingface_hub, and what speaks to a network, only where a model is named by a hub id.
"""

import re
from pathlib import Path

__all__ = ["PATIENCE", "HubModel", "hub_model"]

_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", re.ASCII)
PATIENCE = 1.0  # seconds for a connection to be made before the hub counts as out of reach


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
        self.folder: Path | None = None  # of the cache, where what was asked for lies, with what was downloaded before

    def file(self, file: str) -> Path:
        """The path of one of its files, in the cache of huggingface_hub.

        Raises:
            FileNotFoundError: there is no such file, or the hub cannot be reached; one sentence, within two seconds.
        """
        try:
            from huggingface_hub import hf_hub_download
        except ModuleNotFoundError:
            raise FileNotFoundError(
                f'{self.text} is neither a folder nor a file; to look it up on the hub: pip install "kvblocks[plan]"'
            ) from None
        away = _out_of_reach()
        try:
            path = Path(hf_hub_download(self.name, file, revision=self.revision, local_files_only=bool(away)))
        except Exception as error:  # of many kinds, from several libraries; each says what went wrong
            reason = away or " ".join(str(error).split())
            raise FileNotFoundError(
                f"{self.text} is neither a folder nor a file, and {file} is not to be had from the hub: {reason}"
            ) from error
        self.folder = path.parent
        return path

    def has(self, file: str) -> bool:
        """Whether it has such a file.

        Raises:
            FileNotFoundError: the hub cannot be reached, or does not know the model.
        """
        from huggingface_hub import HfApi

        away = _out_of_reach()
        if away:
            raise FileNotFoundError(f"the files of {self.text} are not to be had from the hub: {away}")
        try:
            return bool(HfApi().file_exists(self.name, file, revision=self.revision))
        except Exception as error:  # as above
            reason = " ".join(str(error).split())
            raise FileNotFoundError(f"the files of {self.text} are not to be had from the hub: {reason}") from error

    def tensor_bytes(self, file: str) -> dict[str, int]:
        """Bytes of every tensor in a safetensors file, of which only the header is downloaded.

        Raises:
            FileNotFoundError: there is no such file, or the hub cannot be reached.
        """
        from huggingface_hub import HfApi

        try:
            found = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.revision)
        except Exception as error:  # as above
            reason = " ".join(str(error).split())
            raise FileNotFoundError(f"{file} of {self.text} is not to be had from the hub: {reason}") from error
        return {name: tensor.data_offsets[1] - tensor.data_offsets[0] for name, tensor in found.tensors.items()}


def _out_of_reach() -> str:
    """Why the hub cannot be reached; empty where it can be.

    A name that is not resolved may take much longer than a connection that is refused, so that a thread asks for it.
    """
    import socket
    import threading
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = urlsplit(constants.ENDPOINT)
    host = url.hostname or ""
    proxy = "" if proxy_bypass(host) else getproxies().get(url.scheme, "")
    at = urlsplit(proxy) if proxy else url
    answered: list[str] = []

    def connect() -> None:
        try:
            port = at.port or (443 if at.scheme == "https" else 80)
            socket.create_connection((at.hostname or "", port), timeout=PATIENCE).close()
            answered.append("")
        except OSError as error:
            answered.append(f"{at.hostname} cannot be reached ({error.strerror or error})")

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answered[0] if answered else f"{at.hostname} does not answer"
