"""How `kvblocks plan` prints: a table for people, the same as Markdown, and several plans side by side.

What stands in the tables is `kvblocks.planner`'s. Imports rich only where it prints for people.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from kvblocks.planner import Plan

__all__ = ["print_markdown", "print_table"]

Words = Callable[[str], str]  # what a plan says of its arguments, in words of the command


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
    from rich import box
    from rich.table import Table

    from kvblocks.planner.explain import lines, title

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for line in lines(plan):
        table.add_row(line.name, line.value, line.arithmetic)
    _say([title(plan), table, *map(words, _sentences(plan))])


def _print_comparison(plans: "Sequence[Plan]", words: Words) -> None:
    """Several plans for a terminal, a row each."""
    from rich import box
    from rich.table import Table

    from kvblocks.planner.compare import side_by_side

    heads, rows = side_by_side(plans)
    table = Table(box=box.SIMPLE)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    _say([table, *map(words, _shared_sentences(plans))])


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


def _say(parts: "Sequence[str | Table]") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for part in parts:
        console.print(part, highlight=False, markup=False)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows):
        print(f"| {' | '.join(map(_escaped, cells))} |")


def _markdown_list(sentences: Iterable[str]) -> None:
    shown = [f"- {_escaped(sentence.strip())}" for sentence in sentences]
    if shown:
        print("\n" + "\n".join(shown))


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")
