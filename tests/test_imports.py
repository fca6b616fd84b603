"""Which module may import which: read off the source, without running it."""

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import package_folder

from kvblocks import errors

# From the ground up. A module imports only what lies on its own floor or below; `kvblocks` itself, which hands out
# names when they are first used, stands above all but what runs it.
FLOORS = [
    {"arguments", "checks", "errors", "sizes", "formats", "memory", "config", "manager", "movement", "cpu_attention"},
    {"kernels", "models", "storage"},
    {"step"},
    {"attention", "engine", "moves"},
    {"planner", "tiers"},
    {"integrations"},
    {"demo", "generation", "replay", "smollm2"},
    {"cli"},
    {"__init__", "__main__"},
]


def modules() -> dict[str, Path]:
    """Every Python module of the package by its name, an `__init__` by that of its folder."""
    folder = package_folder()
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(["kvblocks", *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """What a file imports from kvblocks, wherever in it, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """Each module's imports among these. Who imports a module runs its packages too, which are left out here."""
    known = modules()
    compiled = {path.stem for path in package_folder().glob("*.pyi")}
    names = known.keys() | {f"kvblocks.{name}" for name in compiled}
    edges = {}
    for name, path in known.items():
        found = {other for other in imports(path) if other in names and other != name}
        # `from kvblocks.storage import cache` names the module; its package is no import of its own then.
        edges[name] = {other for other in found if not any(f"{other}." in f"{more}." for more in found - {other})}
    return edges


def floor(name: str) -> int:
    first = [*name.split("."), "__init__"][1]
    [height] = [height for height, members in enumerate(FLOORS) if first in members]
    return height


def test_every_module_has_a_floor() -> None:
    assert all(floor(name) >= 0 for name in graph())


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_imports_upward(name: str) -> None:
    # What hands out the package's version is the package itself.
    above = {other for other in graph()[name] - {"kvblocks"} if floor(other) > floor(name)}
    assert not above


def test_no_modules_import_each_other() -> None:
    edges = {name: others - {"kvblocks"} for name, others in graph().items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_error_is_in_one_module() -> None:
    """An error is a class whose base is one: Python's, or one of `errors`."""
    bases = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    bases |= set(errors.__all__)
    found = {
        name: node.name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in bases for base in node.bases)
    }
    assert found.keys() == {"kvblocks.errors"}
    assert all(issubclass(getattr(errors, name), errors.KVBlocksError) for name in errors.__all__)
