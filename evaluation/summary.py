"""Compares an experiment's tables: by editor, by purifier, and in words."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from evaluation import tables
from evaluation.pairing import parse_row

if TYPE_CHECKING:
    import pandas as pd


NOTE = "`left`: what the judge who finds most still finds; 1: the same picture, 0: a stranger; low is better."
LEAST = 0.05  # drop of `left` from the clean edits; for a smaller one, no share is given
PURIFIED = (
    "none: not purified; average: over the purifications; worst: the purification with the highest mean; "
    "knowing attacker: picks, for each picture, the purification (or none) that brings the person back most; "
    "kept: the smallest share of the protection's drop that survives a purification."
)


def read_table(root: Path) -> pd.DataFrame:
    """Reads the table of an experiment, its rows named as METHOD/budget_{B}. Raises UserError."""
    table = tables.read_csv(root / "all_metric.csv")
    table["method"] = table["method"].map(row_name)
    return table


def row_name(method: str) -> str:
    """Names a row as METHOD/budget_{B}; in older tables it is a path."""
    return "/budget_".join(filter(None, parse_row(method)))


def read_left(roots: dict[str, Path]) -> pd.DataFrame:
    """Reads `left` from tables, by label -> one row per method, one column per table. Raises UserError."""
    import pandas as pd

    read = {label: read_table(root).set_index("method") for label, root in roots.items()}
    return pd.DataFrame({label: table["left"] for label, table in read.items()})


def transfer(roots: dict[str, Path], attacked: dict[str, str], output: Path, latex: bool = False) -> str:
    """Writes `left` by editor -> the table as text. Raises UserError.

    roots: where each editor's table is; attacked: whose VAEs the protection of each row attacked.
    """
    table = read_left({f"edited by {editor}": root for editor, root in roots.items()})
    table.insert(0, "attacked", [attacked.get(row, "none") for row in table.index])
    return side_by_side(table, output, NOTE, latex)


def purified(roots: dict[str, Path], output: Path, latex: bool = False) -> str:
    """Writes `left` by purifier, `none` first, and what a choosing attacker gets -> the table as text.

    Raises UserError.
    """
    table = read_left(roots)
    taken = (table.loc["clean"] - table).drop("clean")
    tried = table.drop(columns="none")
    share = taken.drop(columns="none").min(axis=1) / taken["none"]
    table["average"], table["worst"] = tried.mean(axis=1), tried.max(axis=1)
    table["knowing_attacker"] = knowing_attacker(roots)
    table["kept"] = share.where(taken["none"] > LEAST)
    return side_by_side(table, output, f"{NOTE} {PURIFIED}", latex)


def knowing_attacker(roots: dict[str, Path]) -> pd.Series:
    """Averages the highest `left` that any table has of each picture, by row.

    A picture's `left` is the mean over its edits. Pictures that a table lacks are left out. Raises UserError.
    """
    import pandas as pd

    found = {}
    for label, root in roots.items():
        values = tables.read_values(root / "per_image.csv")
        values = values[values["metric"] == "left"]
        values = values.assign(method=values["method"].map(row_name))
        found[label] = tables.image_means(values, ["method"])
    return pd.DataFrame(found).max(axis=1, skipna=False).groupby("method").mean()


def side_by_side(table: pd.DataFrame, output: Path, note: str, latex: bool) -> str:
    """Writes a table by method as CSV, Markdown and, on demand, LaTeX -> its text. Raises UserError."""
    import pandas as pd

    page, typeset = output.with_suffix(".md"), output.with_suffix(".tex")
    tables.check_outputs([output, page, typeset], suffixes=(".csv", ".md", ".tex"))
    about = pd.DataFrame(map(parse_row, table.index), table.index, columns=["method", "budget"], dtype=object)
    tables.write_csv(output, about.join(table))
    cells, is_best = about.replace("", "-"), pd.DataFrame(False, table.index, about.columns)
    for name, values in table.items():
        title = name.replace("_", " ")
        cells[title], is_best[title] = values, False
        if values.dtype == float:
            cells[title] = values.map(lambda value: tables.shown(value, 2))
            way = 1 if name == "kept" else -1
            is_best[title] = tables.best_of_budgets(values, way, about["budget"])
    part = tables.Part(note.rstrip("."), cells, is_best.to_numpy())
    text = tables.as_markdown(part.cells)
    utils.write_own(page, f"{note}\n\n{text}\n".encode(errors="surrogateescape"))
    if latex:
        utils.write_own(typeset, tables.as_latex([part]).encode(errors="surrogateescape"))
    return text


def by_person(values: pd.DataFrame) -> pd.DataFrame:
    """Measures each row by its people: `known`, the share recognised by some judge in most of their edits,
    and `worst`, the mean `left` of the tenth of the people with the highest.
    """
    import pandas as pd

    place = ["method", "name"]
    rows = values.pivot_table("value", place, "metric", observed=True)
    rows = rows.reindex(columns=["left", "recognised_by_any"]).groupby("method")
    worst = rows["left"].agg(lambda people: people.nlargest(math.ceil(len(people) / 10)).mean())
    known = rows["recognised_by_any"].agg(lambda shares: (shares > 0.5).where(shares.notna()).mean())
    return pd.DataFrame({"known": known, "worst": worst})


def headlines(values: pd.DataFrame) -> list[str]:
    """Names the protection that leaves least, and says whether the second can be told apart from it.

    If a method has several budgets, once for each budget that several methods share.
    """
    rows = [row for row in values["method"].unique() if row != "clean"]
    methods, budgets = zip(*map(parse_row, rows), strict=True) if rows else ((), ())
    groups = {"": rows}
    if len({*methods}) < len(rows):
        groups = {
            f"At budget {budget}, ": [row for row, own in zip(rows, budgets, strict=True) if own == budget]
            for budget in dict.fromkeys(budgets)
        }
    lines = []
    for where, rivals in groups.items():
        if len(rivals) > 1:
            best, second, pairs = tables.best_two(values, "left", rivals)
            words = told_apart(tables.shown_mean(pairs, 3, "+"), pairs)
            lines.append(utils.one_line(f"{where}{best} leaves least, then {second}: {words}"))
    return lines


def told_apart(size: str, pairs: Any) -> str:
    """Writes in words whether a paired difference, a line of `tables.means`, is more than chance."""
    if math.isnan(pairs.low):
        return f"{size} in pairs; with so few portraits they can't be told apart"
    if pairs.low <= 0 <= pairs.high:
        return f"{size} in pairs; they can't be told apart, since the interval contains 0"
    return f"{size} in pairs, which is more than chance"


def verdict(root: Path, models: str, minutes: float) -> str:
    """Summarises in words the tables that were written. Raises UserError."""
    values = tables.read_values(root / "per_image.csv")
    values["method"] = values["method"].map(row_name)
    table, people, lines = read_table(root).set_index("method"), by_person(values), []
    recognizers = [name[6:] for name in table if re.match(r"facial(?!.*_(low|high|n)$)", name)]
    for row, line in table.iterrows():
        known, worst = people.loc[row]
        told = "" if math.isnan(known) else f"; {known:.0%} of the people recognised in most of their edits"
        lines.append(f"  {row}: left {line['left']:.2f}, {worst:.2f} of the worst tenth of the people{told}")
        for end in sorted(recognizers, key=lambda end: not end):  # the attacked one, "", comes last
            found, nearest = (line[f"{what}{end}"] for what in ("recognised", "identified"))
            taken = "no threshold" if math.isnan(found) else f"recognised in {found:.0%} of the edits"
            who = end[1:] or "the attacked recogniser"
            if models == "mini" and end == "_judge":
                who += " (trained here, like the attacked recogniser: not counted)"
            still = line.get(f"left{end}", math.nan) if end else math.nan
            size = f"FR {line[f'facial{end}']:.2f}" + ("" if math.isnan(still) else f" (left {still:.2f})")
            lines.append(f"    {who}: {size}, {taken}, identified in {nearest:.0%}")
    worth = "Weigh the judges' lines: the attack knows its recogniser, and other judges may find more."
    if models == "mini":
        worth = "The mini models are a stand-in: this tells nothing about how well a real photo is protected."
    return f"""
How much of the person is left in the edits, by judges that no attack sees. left: 1 is the same picture, 0 a
stranger, by the judge who finds most; FR: each judge's cosine similarity; recognised: above the threshold
for one person; identified: nearest to its own source among all sources. Lower is better for all of these:
{chr(10).join([*lines, *headlines(values)])}
Look at {root / "figure.png"}: a protected portrait should look like its source, and its edits
should not show the person whom the edits of the source (clean) show. Don't expect every face
to be gone: what one judge still finds, others may find, too.
{worth}
It took {minutes:.1f} minutes; all metrics are in {root / "all_metric.md"}.
Next: python defend.py --input_path=PHOTO, or every method in one table: make table IMAGES=DIR"""
