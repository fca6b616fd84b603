"""What the commands share: packages that are extras, files that plots are written to, and files that hold a secret.

Imports rich and matplotlib only to ask them.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kvblocks.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "need", "read_secret", "save_plot"]


def need(command: str, package: str, what: str) -> None:
    """Raises UsageError where a package that `kvblocks {command}` needs for `what` is missing."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"`kvblocks {command}` needs {package} for {what}; it is not installed; "
            f'run: pip install "kvblocks[{command}]"'
        )


def check_plot(command: str, file: str) -> None:
    """Before the work, not after it: whether a plot can be written there, else UsageError."""
    need(command, "matplotlib", "--plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    path = Path(file)
    if path.suffix[1:].lower() not in known:
        raise UsageError(f"--plot {file}: the name must end in .png or another of: {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no folder {path.parent}")


def save_plot(figure: "Figure", file: str) -> None:
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from None


def read_secret(file: str | None) -> bytes | None:
    """What is in the file of `--secret-file`, None without one; raises UsageError where it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"--secret-file {file} cannot be read: {error.strerror or error}") from None
