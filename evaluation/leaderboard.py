"""Keeps a leaderboard: a Markdown table to which each experiment adds the rows of its methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from evaluation import tables
from evaluation.pairing import parse_row
from evaluation.summary import read_table, row_name
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "method", "budget", "LPIPS of the picture", "left, hardest judge ↓", "identified by any ↓",
    "left, worst purification ↓", "left, worst of the other editors ↓", "no face", "commit", "command",
]  # fmt: skip


def rows_of(root: Path, purified: bool, transfer: bool, about: Mapping[str, str]) -> pd.DataFrame:
    """Reads an experiment's tables -> `COLUMNS`, one row per method and budget, as texts. Raises UserError.

    purified, transfer: whether the experiment had purifiers, and other editors. about: commit and command.
    """
    import pandas as pd

    table = read_table(root).set_index("method").drop("clean")
    pictures = tables.read_csv(root / "all_metric_protected.csv")
    pictures.index = pictures["method"].map(row_name)
    worst = tables.read_csv(root / "purified.csv").set_index("method")["worst"] if purified else None
    others = tables.read_csv(root / "transfer.csv").set_index("method") if transfer else None
    values = {
        "LPIPS of the picture": pictures["lpips"].map(lambda value: tables.shown(value, 4)),
        "left, hardest judge ↓": table["left"].map(lambda value: tables.shown(value, 2)),
        "identified by any ↓": table["identified_by_any"].map(share),
        "left, worst purification ↓": worst,
        "left, worst of the other editors ↓": others.iloc[:, 2:].max(axis=1) if transfer else None,
        "no face": table["no_face"].map(share),
    }
    methods, budgets = zip(*map(parse_row, table.index), strict=True)
    found = pd.DataFrame(values, table.index).assign(method=methods, budget=budgets, **about)
    texts = found.map(lambda value: tables.shown(value, 2) if isinstance(value, float) else value)
    return texts[COLUMNS].fillna("-").replace("", "-")


def share(value: float) -> str:
    """Writes a share as a percentage."""
    text = tables.shown(100 * value, 0)
    return text if text == "-" else f"{text} %"


def read_board(board: Path) -> tuple[list[str], dict[tuple[str, ...], str], list[str]]:
    """Reads a leaderboard -> the lines up to its rows, the rows by method and budget, the lines after them.

    A missing or empty one has no rows. Raises UserError for a file without this table.
    """
    utils.check_directory(board.absolute().parent)
    head = [line_of(COLUMNS), line_of(["---"] * len(COLUMNS))]
    try:
        lines = utils.read_plain(board, utils.MOST_TEXT).decode().splitlines() if board.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{board}: not a readable text file ({utils.first_line(error)})") from None
    lines = lines if "".join(lines).strip() else head
    if (place := next((i for i in range(len(lines)) if lines[i : i + 2] == head), None)) is None:
        raise UserError(f"{board}: has no leaderboard; one begins with the line {head[0]}")
    begin = place + 2
    end = next((i for i in range(begin, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = {tuple(line.split(" | ")[:2]): line for line in lines[begin:end]}
    return lines[:begin], rows, lines[end:]


def add(board: Path, rows: pd.DataFrame) -> None:
    """Puts rows into a leaderboard, in place of earlier ones of the same method and budget.

    The rest of the file stays as it is. Raises UserError.
    """
    before, known, after = read_board(board)
    lines = [line_of(map(tables.harmless, row)) for row in rows.itertuples(index=False)]
    known |= {tuple(line.split(" | ")[:2]): line for line in lines}
    text = "\n".join([*before, *known.values(), *after]) + "\n"
    utils.write_file(board, text.encode(errors="surrogateescape"))


def line_of(cells: Iterable[str]) -> str:
    """Writes a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
