"""One table for a comparison, on the screen and as Markdown, CSV and JSON beside the results."""

from __future__ import annotations

import csv
import json
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullme.eval.retrieval import Hit

RETRIEVAL_METRICS = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@100": "recall_at_100"}
SNIPPET = 150


@dataclass
class Row:
    """One model on one task. scores: metric -> value in [0, 1]; queries and documents where they are known."""

    task: str
    model: str
    scores: dict[str, float]
    queries: int | None = None
    documents: int | None = None


@dataclass
class Report:
    """The rows of a comparison in the order they came, and what failed."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)

    def fail(self, where: str, error: Exception) -> None:
        """Keep one sentence for the screen and the traceback for failures.log."""
        sentence = (str(error).strip().splitlines() or [""])[0]
        self.failures.append(f"{where}: {sentence or type(error).__name__}")
        self.tracebacks.append("".join(traceback.format_exception(error)))

    @property
    def metrics(self) -> list[str]:
        """The union of the rows' metrics, in order of appearance."""
        return list(dict.fromkeys(metric for row in self.rows for metric in row.scores))

    def header(self) -> list[str]:
        return ["task", "model", *self.metrics, "queries", "documents"]

    def cells(self) -> list[list[str]]:
        """The table as text, rows of one task together; an unknown value is empty."""
        return [
            [
                row.task,
                row.model,
                *(f"{row.scores[metric]:.4f}" if metric in row.scores else "" for metric in self.metrics),
                *("" if count is None else str(count) for count in (row.queries, row.documents)),
            ]
            for task in dict.fromkeys(row.task for row in self.rows)
            for row in self.rows
            if row.task == task
        ]

    def markdown(self) -> str:
        lines = [self.header(), ["---", "---", *["---:"] * (len(self.metrics) + 2)], *self.cells()]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)

    def print(self, console: Console) -> None:
        """The table, then one line for each failure."""
        table = Table()
        for column, name in enumerate(self.header()):
            table.add_column(name, justify="left" if column < 2 else "right", overflow="fold")
        cells = self.cells()
        for number, row in enumerate(cells, start=1):
            table.add_row(*map(escape, row), end_section=number == len(cells) or cells[number][0] != row[0])
        if cells:
            console.print(table)
        for failure in self.failures:
            console.print(f"[red]failed:[/red] {escape(failure)}", soft_wrap=True)

    def write(self, folder: str | Path) -> Path:
        """Write report.md, report.csv and report.json into ``folder``, and failures.log where something failed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.header(), *self.cells()])
        content = {"rows": [asdict(row) for row in self.rows], "failures": self.failures}
        (folder / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "failures.log").unlink(missing_ok=True)
        if self.tracebacks:
            (folder / "failures.log").write_text("\n".join(self.tracebacks), encoding="utf-8")
        return folder


def print_hits(console: Console, query: str, found: Mapping[str, Sequence[Hit]]) -> None:
    """A search as a reader wants it. found: where was searched -> the hits, best first."""
    console.print(f"\n[bold]{escape(query)}[/bold]")
    for where, hits in found.items():
        console.print(f"  [dim]{escape(where)}[/dim]" + ("" if hits else "  nothing found"))
        grid = Table.grid(padding=(0, 1))
        for place, hit in enumerate(hits, start=1):
            passage = f"[dim]{escape(hit.id)}[/dim]  {escape(snippet(hit.text))}"
            grid.add_row("   ", f"{place}.", f"[cyan]{hit.score:.3f}[/cyan]", passage)
        if hits:
            console.print(grid)


def snippet(text: str, length: int = SNIPPET) -> str:
    """The beginning of a text on one line, cut between words."""
    return textwrap.shorten(text, length, placeholder=" …")
