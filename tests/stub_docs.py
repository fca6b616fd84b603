"""The docstrings of compiled modules in their stubs, where editors look for them.

`python tests/stub_docs.py` writes them into `kvblocks/*.pyi` from the modules as they are built; `test_package.py`
tells when that has not been done.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["documented", "with_docstrings"]

Documented = ast.ClassDef | ast.FunctionDef


def documented(text: str, module: Any) -> Iterator[tuple[str, Documented, str]]:
    """Name, place in the stub, and docstring at run time, of each class and function that has one of its own."""
    pending = [("", node, module) for node in ast.parse(text).body]
    for prefix, node, owner in pending:
        if not isinstance(node, Documented):
            continue
        found = vars(owner).get(node.name)
        found = getattr(found, "__func__", found)
        special = node.name.startswith("__")
        if found is not None and not special and found.__doc__:
            yield prefix + node.name, node, inspect.cleandoc(found.__doc__)
        if isinstance(node, ast.ClassDef) and found is not None:
            pending += [(f"{prefix}{node.name}.", member, found) for member in node.body]


def with_docstrings(text: str, module: Any) -> str:
    """The text of a stub in which classes and functions have the docstrings of `module`."""
    lines = text.splitlines()
    for _, node, docstring in sorted(documented(text, module), key=lambda item: -item[1].lineno):
        indent = " " * (node.col_offset + 4)
        quoted = [f"{indent}{line}" if line else "" for line in f'"""{docstring}'.splitlines()]
        if len(quoted) > 1:
            quoted.append(f'{indent}"""')
        else:
            quoted[0] += '"""'
        first = node.body[0]
        old = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        row, end = first.lineno - 1, (first.end_lineno or first.lineno) if old else first.lineno - 1
        if isinstance(first, ast.stmt) and getattr(first, "decorator_list", None):
            row = end = first.decorator_list[0].lineno - 1  # type: ignore[attr-defined]
        if old and lines[row].lstrip() != lines[row][first.col_offset :]:  # `def f(): ...` on one line
            lines[row] = lines[row][: first.col_offset].rstrip()
            row = row + 1
        lines[row:end] = quoted
    return "\n".join(lines) + "\n"


def main() -> None:
    for stub in sorted((Path(__file__).resolve().parent.parent / "kvblocks").glob("*.pyi")):
        module = importlib.import_module(f"kvblocks.{stub.stem}")
        stub.write_text(with_docstrings(stub.read_text(), module))


if __name__ == "__main__":
    main()
