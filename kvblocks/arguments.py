"""The error of compiled classes and their constructors called with wrong arguments: the compiler's own names no class.

Imports nothing, so that compiled code can use it.
"""

from collections.abc import Mapping

__all__ = ["MISSING", "check_arguments"]

MISSING = object()  # stands for an argument that has no default


def check_arguments(
    name: str,
    needed: Mapping[str, object],
    more: tuple[object, ...],
    unknown: Mapping[str, object],
    positional: int = 0,
) -> None:
    """Raise a TypeError that names the class if arguments are missing, too many, or of unknown names.

    Args:
        name: of the class, or of its constructor.
        needed: arguments without a default, and what was given for them or `MISSING`.
        more: positional arguments beyond those that are allowed.
        unknown: keyword arguments that do not exist, by name.
        positional: how many arguments may come by position.
    """
    missing = [argument for argument, given in needed.items() if given is MISSING]
    wrong = []
    if more:
        wrong.append(f"takes {positional or 'no'} positional arguments, and {positional + len(more)} were given")
    if unknown:
        wrong.append(f"has no argument {' or '.join(map(str, unknown))}")
    if missing:
        wrong.append(f"needs {', '.join(missing)}")
    if wrong:
        raise TypeError(f"{name}() {'; it '.join(wrong)}")
