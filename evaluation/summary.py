"""What an experiment came to: FR side by side for editors or purifiers, and the verdict in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import outputs

import utils

if TYPE_CHECKING:
    import pandas as pd

ABOUT = "FR by the judge; lower is better."  # a page of side_by_side begins with it
LEAST = 0.05  # of FR: of what takes less from the clean edits no share is told
LEFT = "worst: the highest FR after any purification; left: the share of its drop in FR that survives it."


def read_table(root: Path) -> pd.DataFrame:
    """Reads the table of all metrics below a root, by row. Raises UserError."""
    table = outputs.read_csv(root / "all_metric.csv").set_index("method")
    table.index = [row.removeprefix(f"{root / 'edits'}/") for row in table.index]
    return table


def judged(roots: dict[str, Path]) -> pd.DataFrame:
    """Reads FR by the judge of tables by label -> rows by method, a column each. Raises UserError."""
    import pandas as pd

    return pd.DataFrame({label: read_table(root)["facial_judge"] for label, root in roots.items()})


def transfer(roots: dict[str, Path], attacked: dict[str, str], output: Path) -> str:
    """Writes FR by editor -> the table as a text. Raises UserError.

    roots: editor -> where its table is; attacked: row -> the editors whose VAEs its protection attacked.
    """
    table = judged({f"edited by {editor}": root for editor, root in roots.items()})
    table.insert(0, "attacked", [attacked.get(row, "none") for row in table.index])
    return side_by_side(table, output)


def purified(roots: dict[str, Path], output: Path) -> str:
    """Writes FR by purifier, `none` among them, and what is left in the worst case -> the table as a text.

    Raises UserError.
    """
    table = judged(roots)
    taken = (table.loc["clean"] - table).drop("clean")
    table["worst"] = table.drop(columns="none").max(axis=1)
    share = taken.drop(columns="none").min(axis=1) / taken["none"]
    table["left"] = share.where(taken["none"] > LEAST)
    return side_by_side(table, output, LEFT)


def side_by_side(table: pd.DataFrame, output: Path, more: str = "") -> str:
    """Writes a table by method as CSV and as a page -> its text. Raises UserError."""
    page = output.with_suffix(".md")
    outputs.check_outputs([output])
    outputs.check_outputs([page], (), (".md",), lambda content: content.startswith(ABOUT.encode()))
    table = table.rename_axis("method").reset_index()
    outputs.write_csv(output, table)
    text = table.to_markdown(index=False, floatfmt=".2f")
    utils.write_file(page, f"{ABOUT} {more}".rstrip().encode() + f"\n\n{text}\n".encode())
    return text


def by_person(root: Path) -> pd.DataFrame:
    """Measures each row's people by the judge: `known`, the share of them that it recognises in most of their
    edits, and `worst`, the mean FR of the tenth with the highest -> by row. Raises UserError.
    """
    import pandas as pd

    table = outputs.read_csv(root / "per_image.csv")
    table["method"] = table["method"].str.removeprefix(f"{root / 'edits'}/")
    people = table.groupby(["method", "name"])[["facial_judge", "recognised_judge"]].mean()
    rows = people.groupby("method")
    worst = {row: of.nlargest(math.ceil(len(of) / 10)).mean() for row, of in rows["facial_judge"]}
    known = rows["recognised_judge"].agg(lambda shares: (shares > 0.5).where(shares.notna()).mean())
    return pd.DataFrame({"known": known, "worst": pd.Series(worst)})


def verdict(root: Path, models: str, minutes: float) -> str:
    """Says in words what came out, from the tables that were written. Raises UserError."""
    table, people, lines = read_table(root), by_person(root), []
    for row, line in table.iterrows():
        lines.append(f"  {row}")
        for who, by in (("recogniser", ""), ("judge", "_judge")):
            found, nearest = (line[f"{what}{by}"] for what in ("recognised", "identified"))
            taken = "no threshold" if math.isnan(found) else f"recognised in {found:.0%} of the edits"
            lines.append(f"    {who}: FR {line[f'facial{by}']:.2f}, {taken}, identified in {nearest:.0%}")
        known, worst = people.loc[row]
        told = "" if math.isnan(known) else f", {known:.0%} of the people recognised in most of their edits"
        lines.append(f"    by person: FR of the worst tenth {worst:.2f}{told}, by the judge")
    worth = "Weigh the judge's lines: the attack knows the recogniser, and others are not known to it."
    if models == "mini":
        worth = "The mini models are a stand-in: this tells nothing about how well a real photo is protected."
    return f"""
How much of the person is left in the edits, by the recogniser, which facelock attacks, and by a judge, which
no attack sees. FR is 1 for the same face and 0 for a stranger's; recognised: above the threshold for one
person; identified: nearest to its own source among all sources. All of it is better when it is lower:
{chr(10).join(lines)}
Look at {root / "figure.png"}: a protected portrait should look like its source, and its edits
should not show the person whom the edits of the source (clean) show. Don't expect that each
face is gone; what the judge still finds, others may find, too.
{worth}
It took {minutes:.1f} minutes; all metrics are in {root / "all_metric.md"}.
Next: python defend.py --input_path=PHOTO, or every method in one table: make table IMAGES=DIR"""
