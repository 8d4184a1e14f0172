"""From values to tables: means over images, intervals, paired differences; as CSV, Markdown and text.

Values are a long DataFrame: method, seed, prompt, name, metric, value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import utils
from evaluation.pairing import parse_row
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.features import Metric

CONFIDENCE = 0.95
RESAMPLES = 9999
AT_ONCE = 100  # resamples, so that memory doesn't grow with the images
FEWEST = 5  # images; below this there is no interval
FEW_IMAGES = 30  # below this a bootstrap interval is approximate
LARGEST = 1e9  # value of a metric that is shown
EDIT = ["method", "seed", "prompt", "name"]  # columns that identify an edit
STATISTICS = ["mean", "low", "high", "n", "n_inf"]


# ---------------------------------------------------------------------------------------------------------
# means


def image_means(values: pd.DataFrame, groups: Sequence[str]) -> pd.Series:
    """Averages each image's finite values, within groups.

    They are summed in order: pandas' own mean differs in the last digit, on which ties between resamples
    depend, and so the ends of intervals.
    """
    import pandas as pd

    finite = values[np.isfinite(values["value"])]
    grouped = finite.groupby([*groups, "name"], observed=True)
    counts = grouped.size()
    return pd.Series(np.bincount(grouped.ngroup(), finite["value"], len(counts)) / counts, index=counts.index)


def means(values: pd.DataFrame) -> pd.DataFrame:
    """Averages over images, with a 95 % BCa bootstrap interval over images (Efron 1987, by scipy).

    An image counts once: as the mean of its finite values over prompts and seeds, which are not independent.
    Returns mean, low, high, n (images), n_inf (infinite values) by method and metric, in order of appearance.
    """
    groups = ["method", "metric"]
    infinite = values.assign(n_inf=np.isinf(values["value"]))
    table = infinite.groupby(groups, observed=True, sort=False)[["n_inf"]].sum()
    grouped = image_means(values, groups).groupby(groups, observed=True)
    table["mean"] = grouped.mean()
    table["n"] = grouped.size().reindex(table.index, fill_value=0)
    ends = {place: interval(samples.tolist()) for place, samples in grouped}
    table[["low", "high"]] = np.reshape([ends.get(place, (np.nan, np.nan)) for place in table.index], (-1, 2))
    table.index = table.index.set_levels([level.astype(object) for level in table.index.levels])
    return table[STATISTICS]


def differences(values: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Averages paired differences to a row, edit by edit, where both are finite; otherwise as `means`."""
    edit = [*EDIT[1:], "metric"]
    of_baseline = values.loc[values["method"] == baseline, [*edit, "value"]]
    pairs = values[values["method"] != baseline].merge(of_baseline, on=edit, suffixes=("", "_baseline"))
    both = np.isfinite(pairs["value"]) & np.isfinite(pairs["value_baseline"])
    with np.errstate(invalid="ignore"):  # inf - inf
        pairs["value"] = (pairs["value"] - pairs.pop("value_baseline")).where(both)
    return means(pairs)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Gives the ends of a mean's interval; NaN for fewer than 5 samples, or equal ones up to rounding."""
    from scipy import stats

    if len(samples) < FEWEST or max(samples) - min(samples) <= 1e-6 * max(map(abs, samples)):
        return math.nan, math.nan
    how = {"confidence_level": CONFIDENCE, "n_resamples": RESAMPLES, "batch": AT_ONCE, "method": "BCa"}
    found = stats.bootstrap((np.asarray(samples),), np.mean, **how, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


# ---------------------------------------------------------------------------------------------------------
# tables


def one_metric(
    values: pd.DataFrame, found: pd.DataFrame, pairs: pd.DataFrame | None, infinite: bool
) -> pd.DataFrame:
    """Makes the table of one metric: method, prompt{i}..., mean, ci_low, ci_high, n, n_inf, diff...

    found, pairs: `means` and `differences` of the values. n_inf is there if values may be `infinite`.
    """
    place = ["method", "prompt"]
    of_prompts = image_means(values, place).groupby(place, observed=True).mean().unstack("prompt")
    of_prompts.index = of_prompts.index.astype(object)
    found = found.droplevel("metric")
    table = of_prompts.reindex(index=found.index, columns=sorted(values["prompt"].unique()))
    table = table.add_prefix("prompt")
    table[["mean", "ci_low", "ci_high", "n"]] = found[["mean", "low", "high", "n"]]
    if infinite:
        table["n_inf"] = found["n_inf"]
    if pairs is not None:
        pairs = pairs.droplevel("metric").reindex(found.index).astype({"n": "Int64"})
        table[["diff", "diff_low", "diff_high", "diff_n"]] = pairs[["mean", "low", "high", "n"]]
    return table.reset_index()


def all_metrics(
    found: pd.DataFrame, groups: dict[str, Sequence[Metric]], rows: Sequence[str], sign: str = ""
) -> tuple[pd.DataFrame, str]:
    """Makes the table of several metrics, and the same as Markdown, one table per group under its title.

    found: as `means` returns it. Columns: method, and for each metric its mean, _low, _high, _n and, if it
    can be infinite, _n_inf.
    """
    import pandas as pd

    metrics = [metric for group in groups.values() for metric in group]
    columns = [(metric.name, statistic) for metric in metrics for statistic in STATISTICS]
    table = found.astype({"n": "Int64", "n_inf": "Int64"}).unstack("metric").swaplevel(axis=1)
    table = table.reindex(index=pd.Index(rows, dtype=object), columns=pd.MultiIndex.from_tuples(columns))
    parts, few = [], about_intervals(found["n"])
    for title, group in groups.items():
        text = pd.DataFrame({"method": pd.Series(rows, dtype=object)})
        for metric in group:
            lines = table[metric.name].astype(float).itertuples()
            text[metric.title] = [shown_mean(line, metric.digits, sign) for line in lines]
        counts = table[[(metric.name, "n") for metric in group]].astype("Int64")
        ranges = [sorted({*row.dropna()}) or [0] for _, row in counts.iterrows()]
        text["n"] = [" to ".join(map(str, dict.fromkeys((own[0], own[-1])))) for own in ranges]
        note = "; ".join(filter(None, (title, few if not parts else "")))
        parts.append(f"{harmless(note)}:\n\n{as_markdown(text)}")
    finite = [(metric.name, "n_inf") for metric in metrics if not metric.infinite]
    table = table.drop(columns=finite)
    table.columns = [name if what == "mean" else f"{name}_{what}" for name, what in table.columns]
    return table.rename_axis("method").reset_index(), "\n\n".join(parts)


def per_image(values: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Makes a table with one line per edit and one column per metric."""
    return values.pivot(index=EDIT, columns="metric", values="value").reindex(columns=metrics).reset_index()


# ---------------------------------------------------------------------------------------------------------
# as text


def about_intervals(counts: Iterable[int]) -> str:
    """Warns of the intervals of few images; empty if there are many."""
    counts = list(counts)
    if not counts or min(counts) >= FEW_IMAGES:
        return ""
    few = f"fewer than {FEWEST} images, no intervals" if min(counts) < FEWEST else ""
    some = f"fewer than {FEW_IMAGES} images, the intervals are approximate" if max(counts) >= FEWEST else ""
    return "; ".join(filter(None, (few, some)))


def shown(value: float, digits: int = 3, sign: str = "") -> str:
    """Formats a value for the screen; a small one has three significant digits instead of 0.000."""
    if math.isnan(value):
        return "-"
    small = 0 < abs(value) < max(0.001, 10**-digits)
    return f"{value:{sign}#.3g}" if small else f"{value:{sign}.{digits}f}"


def shown_mean(line: Any, digits: int, sign: str) -> str:
    """Formats a line of `means`: 0.512 [0.498, 0.530] (2 inf)."""
    text = shown(line.mean, digits, sign)
    if not math.isnan(line.low):
        text += f" [{shown(line.low, digits, sign)}, {shown(line.high, digits, sign)}]"
    return f"{text} ({line.n_inf:.0f} inf)" if line.n_inf > 0 else text


def harmless(name: str) -> str:
    """Formats a name so that it can't break a line, a Markdown table or a terminal."""
    return utils.one_line(name).replace("|", "\\|")


def as_markdown(frame: pd.DataFrame) -> str:
    """Formats a table of texts as Markdown: the first column to the left, the others to the right."""
    sides = ("left", *("right" for _ in frame.columns[1:]))
    cells = frame.astype(object).map(harmless).rename(columns=harmless)
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides)


# ---------------------------------------------------------------------------------------------------------
# files


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a CSV file, whole or not at all: numbers with six digits, empty for NaN. Raises UserError."""
    for column in {"method", "name"} & {*frame.columns}:
        frame = frame.assign(**{column: frame[column].astype(object).map(utils.csv_name)})
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    utils.write_own(path, text.encode(errors="surrogateescape"))


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table that `write_csv` wrote; names are texts. Raises UserError."""
    import pandas as pd

    texts = {"method": object, "name": object}
    how = {"keep_default_na": False, "na_values": [""], "encoding_errors": "surrogateescape"}
    try:
        if utils.is_special(path):
            raise ValueError("a device or a pipe")
        frame = pd.read_csv(path, dtype=texts, **how)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: not a readable table ({utils.first_line(error)})") from None
    for column in texts.keys() & {*frame.columns}:
        frame[column] = frame[column].fillna("").map(utils.name_of_csv)
    return frame


def check_numbers(path: Path, numbers: pd.DataFrame) -> None:
    """Refuses what no axis could show: infinity, and values that no metric has. Raises UserError."""
    if (numbers.abs() > LARGEST).any(axis=None):
        raise UserError(f"{path}: a number in it is infinite or over {LARGEST:g}")


def check_outputs(
    outputs: Iterable[Path | None], inputs: Iterable[Path | None] = (), suffixes: Sequence[str] = (".csv",)
) -> None:
    """Refuses outputs that can't be written, would destroy something or overwrite each other.

    An existing file is overwritten only if it is empty or just as `utils.write_own` wrote it, and none of the
    inputs; a device, such as /dev/null, is written through. Raises UserError.
    """
    given = [path for path in outputs if path and not utils.is_special(path)]
    for path in filter(None, outputs):
        if Path(os.path.realpath(path)).is_fifo():  # /dev/stdout and >(...) are pipes without a name
            raise UserError(f"{path}: is a named pipe, which may have no reader")
    read = [path for path in inputs if path and path.exists()]
    for path in given:
        if path.is_dir():
            raise UserError(f"{path}: is a directory")
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{path}: is written as {' or '.join(suffixes)}; ask for that")
        utils.check_directory(path.absolute().parent)
        if path.exists() and any(path.samefile(other) for other in read):
            raise UserError(f"{path}: would overwrite what this run reads")
        utils.check_own(path)
    if len({path.resolve() for path in given}) < len(given):
        raise UserError(f"one output would overwrite the other: {' '.join(map(str, given))}")


# ---------------------------------------------------------------------------------------------------------
# what an experiment shows


ABOUT = "`left`: what the judge who finds most still finds, 1 the same picture, 0 a stranger; low is better."
LEAST = 0.05  # of `left`, taken from the clean edits; for less, no share is given
KEPT = "worst: the highest after any purification; kept: the share of its drop that survives it."


def read_table(root: Path, name: str = "all_metric.csv") -> pd.DataFrame:
    """Reads a table of an experiment, its rows named as METHOD/budget_{B}. Raises UserError."""
    table = read_csv(root / name)
    table["method"] = ["/budget_".join(filter(None, parse_row(row))) for row in table["method"]]
    return table


def read_left(roots: dict[str, Path]) -> pd.DataFrame:
    """Reads `left` from tables, by label -> one row per method, one column per table. Raises UserError."""
    import pandas as pd

    read = {label: read_table(root).set_index("method") for label, root in roots.items()}
    return pd.DataFrame({label: table["left"] for label, table in read.items()})


def transfer(roots: dict[str, Path], attacked: dict[str, str], output: Path) -> str:
    """Writes `left` by editor -> the table as text. Raises UserError.

    roots: where each editor's table is; attacked: whose VAEs the protection of each row attacked.
    """
    table = read_left({f"edited by {editor}": root for editor, root in roots.items()})
    table.insert(0, "attacked", [attacked.get(row, "none") for row in table.index])
    return side_by_side(table, output)


def purified(roots: dict[str, Path], output: Path) -> str:
    """Writes `left` by purifier, with `none` first, and what survives the worst one -> the table as text.

    Raises UserError.
    """
    table = read_left(roots)
    taken = (table.loc["clean"] - table).drop("clean")
    table["worst"] = table.drop(columns="none").max(axis=1)
    share = taken.drop(columns="none").min(axis=1) / taken["none"]
    table["kept"] = share.where(taken["none"] > LEAST)
    return side_by_side(table, output, KEPT)


def side_by_side(table: pd.DataFrame, output: Path, more: str = "") -> str:
    """Writes a table by method as CSV and as Markdown -> its text. Raises UserError."""
    page = output.with_suffix(".md")
    check_outputs([output, page], suffixes=(".csv", ".md"))
    table = table.rename_axis("method").reset_index()
    write_csv(output, table)
    text = table.to_markdown(index=False, floatfmt=".2f")
    whole = f"{f'{ABOUT} {more}'.rstrip()}\n\n{text}\n"
    utils.write_own(page, whole.encode(errors="surrogateescape"))
    return text


def by_person(root: Path) -> pd.DataFrame:
    """Measures the people of each row: `known`, the share whom some judge recognises in most of their edits,
    and `worst`, the mean `left` of the tenth with the highest. Raises UserError.
    """
    import pandas as pd

    edits = read_table(root, "per_image.csv")
    rows = edits.groupby(["method", "name"])[["left", "recognised_by_any"]].mean().groupby("method")
    worst = rows["left"].agg(lambda people: people.nlargest(math.ceil(len(people) / 10)).mean())
    known = rows["recognised_by_any"].agg(lambda shares: (shares > 0.5).where(shares.notna()).mean())
    return pd.DataFrame({"known": known, "worst": worst})


def verdict(root: Path, models: str, minutes: float) -> str:
    """Says in words what came out, from the tables that were written. Raises UserError."""
    table, people, lines = read_table(root).set_index("method"), by_person(root), []
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
stranger's, by the judge who finds most; FR: the cosine similarity by each; recognised: above the threshold
for one person; identified: nearest to its own source among all sources. Lower is better for all of it:
{chr(10).join(lines)}
Look at {root / "figure.png"}: a protected portrait should look like its source, and its edits
should not show the person whom the edits of the source (clean) show. Don't expect that each
face is gone; what a judge still finds, others may find, too.
{worth}
It took {minutes:.1f} minutes; all metrics are in {root / "all_metric.md"}.
Next: python defend.py --input_path=PHOTO, or every method in one table: make table IMAGES=DIR"""
