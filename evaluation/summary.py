"""What an experiment came to: `left` side by side for editors or purifiers, and the verdict in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import outputs

import utils

if TYPE_CHECKING:
    import pandas as pd

ABOUT = "`left`: what the judge who finds most still finds, 1 the same picture, 0 a stranger; low is better."
LEAST = 0.05  # of `left`: of what takes less from the clean edits no share is given
KEPT = "worst: the highest after any purification; kept: the share of its drop that survives it."


def read_table(root: Path) -> pd.DataFrame:
    """Reads the table of all metrics below a root, by row. Raises UserError."""
    table = outputs.read_csv(root / "all_metric.csv").set_index("method")
    table.index = [row.removeprefix(f"{root / 'edits'}/") for row in table.index]
    return table


def judged(roots: dict[str, Path]) -> pd.DataFrame:
    """Reads `left` of tables by label -> rows by method, a column each. Raises UserError."""
    import pandas as pd

    return pd.DataFrame({label: read_table(root)["left"] for label, root in roots.items()})


def transfer(roots: dict[str, Path], attacked: dict[str, str], output: Path) -> str:
    """Writes `left` by editor -> the table as a text. Raises UserError.

    roots: editor -> where its table is; attacked: row -> the editors whose VAEs its protection attacked.
    """
    table = judged({f"edited by {editor}": root for editor, root in roots.items()})
    table.insert(0, "attacked", [attacked.get(row, "none") for row in table.index])
    return side_by_side(table, output)


def purified(roots: dict[str, Path], output: Path) -> str:
    """Writes `left` by purifier, `none` among them, and what survives the worst one -> the table as a text.

    Raises UserError.
    """
    table = judged(roots)
    taken = (table.loc["clean"] - table).drop("clean")
    table["worst"] = table.drop(columns="none").max(axis=1)
    share = taken.drop(columns="none").min(axis=1) / taken["none"]
    table["kept"] = share.where(taken["none"] > LEAST)
    return side_by_side(table, output, KEPT)


def side_by_side(table: pd.DataFrame, output: Path, more: str = "") -> str:
    """Writes a table by method as CSV and as a page -> its text. Raises UserError."""
    page = output.with_suffix(".md")
    outputs.check_outputs([output, page], suffixes=(".csv", ".md"))
    table = table.rename_axis("method").reset_index()
    outputs.write_csv(output, table)
    text = table.to_markdown(index=False, floatfmt=".2f")
    whole = f"{f'{ABOUT} {more}'.rstrip()}\n\n{text}\n"
    utils.write_own(page, whole.encode(errors="surrogateescape"))
    return text


def by_person(root: Path) -> pd.DataFrame:
    """Measures each row's people: `known`, the share of them whom some judge recognises in most of their
    edits, and `worst`, the mean `left` of the tenth with the highest -> by row. Raises UserError.
    """
    import pandas as pd

    table = outputs.read_csv(root / "per_image.csv")
    table["method"] = table["method"].str.removeprefix(f"{root / 'edits'}/")
    people = table.groupby(["method", "name"])[["left", "recognised_by_any"]].mean()
    rows = people.groupby("method")
    worst = {row: of.nlargest(math.ceil(len(of) / 10)).mean() for row, of in rows["left"]}
    known = rows["recognised_by_any"].agg(lambda shares: (shares > 0.5).where(shares.notna()).mean())
    return pd.DataFrame({"known": known, "worst": pd.Series(worst)})


def recognisers(columns: Iterable[str]) -> dict[str, str]:
    """Lists who measured faces in a table: how their columns end -> their name; "" is the attacked one's."""
    ends = [name.removeprefix("facial") for name in columns if re.fullmatch(r"facial(_.+)?", name)]
    ends = [end for end in ends if not re.search(r"_(low|high|n)$", end)]
    return {end: end[1:] or "the attacked recogniser" for end in sorted(ends, key=lambda end: not end)}


def verdict(root: Path, models: str, minutes: float) -> str:
    """Says in words what came out, from the tables that were written. Raises UserError."""
    table, people, lines = read_table(root), by_person(root), []
    for row, line in table.iterrows():
        known, worst = people.loc[row]
        told = "" if math.isnan(known) else f"; {known:.0%} of the people recognised in most of their edits"
        lines.append(f"  {row}: left {line['left']:.2f}, {worst:.2f} of the worst tenth of the people{told}")
        for end, name in recognisers(table.columns).items():
            found, nearest = (line[f"{what}{end}"] for what in ("recognised", "identified"))
            taken = "no threshold" if math.isnan(found) else f"recognised in {found:.0%} of the edits"
            is_sibling = models == "mini" and end == "_judge"
            who = f"{name} (trained here, like the attacked recogniser: not counted)" if is_sibling else name
            still = line.get(f"left{end}", math.nan) if end else math.nan
            size = f"FR {line[f'facial{end}']:.2f}" + ("" if math.isnan(still) else f" (left {still:.2f})")
            lines.append(f"    {who}: {size}, {taken}, identified in {nearest:.0%}")
    worth = "Weigh the judges' lines: the attack knows its recogniser, and other judges may find more."
    if models == "mini":
        worth = "The mini models are a stand-in: this tells nothing about how well a real photo is protected."
    return f"""
How much of the person is left in the edits, by judges that no attack sees. left: 1 is the same picture, 0 a
stranger's, by the judge who finds most; FR: the cosine similarity by each; recognised: above the threshold
for one person; identified: nearest to its own source among all sources. Lower is better for all of it:
{chr(10).join(lines)}
Look at {root / "figure.png"}: a protected portrait should look like its source, and its edits
should not show the person whom the edits of the source (clean) show. Don't expect that each
face is gone; what a judge still finds, others may find, too.
{worth}
It took {minutes:.1f} minutes; all metrics are in {root / "all_metric.md"}.
Next: python defend.py --input_path=PHOTO, or every method in one table: make table IMAGES=DIR"""
