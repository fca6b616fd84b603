"""How `kvblocks plan` prints: a table for people, the same as Markdown, and several plans side by side.

What stands in the tables is `kvblocks.planner`'s. Imports nothing but the standard library.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvblocks.planner import Plan

__all__ = ["print_markdown", "print_table"]

Words = Callable[[str], str]  # what a plan says of its arguments, in words of the command

_WIDTH = 160  # of what is printed to a file or a pipe, where no terminal says its own
_NARROWEST = 24  # characters of a column that is folded, however narrow the terminal


def print_table(plans: "Sequence[Plan]", words: Words) -> None:
    """Plans for a terminal: one with every figure and its arithmetic, several side by side."""
    if len(plans) == 1:
        _print_one(plans[0], words)
    else:
        _print_comparison(plans, words)


def print_markdown(plans: "Sequence[Plan]", words: Words) -> None:
    """The same as Markdown."""
    if len(plans) == 1:
        _print_markdown_one(plans[0], words)
    else:
        _print_markdown_comparison(plans, words)


def _print_one(plan: "Plan", words: Words) -> None:
    """One plan for a terminal: a figure to a row, then remarks and the verdict."""
    from kvblocks.planner.explain import lines, title

    width, found = _width(), lines(plan)
    names = max((len(line.name) for line in found), default=0)
    values = max((len(line.value) for line in found), default=0)
    room = width - (2 + names + 2 + values + 2)
    print(_folded(title(plan), width), end="\n\n")
    for line in found:
        if room < _NARROWEST:
            print(_folded(f"  {line}", width, "      "))
            continue
        start = f"  {line.name:<{names}}  {line.value:>{values}}  "
        print(_folded(start + line.arithmetic, width, " " * len(start)).rstrip())
    print()
    for sentence in _sentences(plan):
        print(_folded(words(sentence), width))


def _print_comparison(plans: "Sequence[Plan]", words: Words) -> None:
    """Several plans for a terminal, a row each."""
    from kvblocks.planner.compare import side_by_side

    heads, rows = side_by_side(plans)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for cells in (heads, ["-" * width for width in widths], *rows):
        first, *others = (
            f"{cell:<{width}}" if not i else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        print(f"  {'  '.join([first, *others])}".rstrip())
    print()
    for sentence in _shared_sentences(plans):
        print(_folded(words(sentence), _width()))


def _print_markdown_one(plan: "Plan", words: Words) -> None:
    """One plan as a Markdown table."""
    from kvblocks.planner.explain import lines, title

    print(f"**{_escaped(title(plan))}**\n")
    _markdown(["figure", "", "arithmetic"], [[line.name, line.value, line.arithmetic] for line in lines(plan)])
    _markdown_list(map(words, _sentences(plan)))


def _print_markdown_comparison(plans: "Sequence[Plan]", words: Words) -> None:
    """Several plans as a Markdown table."""
    from kvblocks.planner.compare import side_by_side

    _markdown(*side_by_side(plans))
    _markdown_list(map(words, _shared_sentences(plans)))


def _sentences(plan: "Plan") -> list[str]:
    from kvblocks.planner.explain import notes, verdict

    return [*notes(plan), *verdict(plan)]


def _shared_sentences(plans: "Sequence[Plan]") -> list[str]:
    """Remarks on all plans, each once."""
    from kvblocks.planner.explain import notes

    return list(dict.fromkeys(note for plan in plans for note in notes(plan)))


def _width() -> int:
    columns = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    return columns or _WIDTH  # a terminal that does not know its width says 0


def _folded(text: str, width: int, indent: str = "") -> str:
    """Text in lines of at most `width` characters, broken between words; all but the first begin with `indent`."""
    return "\n".join(
        textwrap.wrap(
            text,
            max(width, len(indent) + _NARROWEST),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows):
        print(f"| {' | '.join(map(_escaped, cells))} |")


def _markdown_list(sentences: Iterable[str]) -> None:
    shown = [f"- {_escaped(sentence.strip())}" for sentence in sentences]
    if shown:
        print("\n" + "\n".join(shown))


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")
