"""What the commands share: packages that are extras, and files that plots are written to.

Imports rich and matplotlib only to ask them.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kvblocks.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "need", "save_plot"]


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
