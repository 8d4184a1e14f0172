"""Turns values into tables: means over images, intervals, paired differences; as CSV, Markdown and LaTeX.

Values are a long DataFrame: method, seed, prompt, name, metric, value. Here `method` is the name of a row.
Files have method, budget, editor and purifier instead, as `pairing.about_rows` returns them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import utils
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
ABOUT = ["method", "budget", "editor", "purifier"]  # what a row of a file begins with
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


def best_two(values: pd.DataFrame, metric: str, rows: Sequence[str], way: int = -1) -> tuple[str, str, Any]:
    """Finds the best of at least two rows by a metric, the second, and the second minus the best in pairs.

    way: -1 if low is good, 1 if high. The last is a line of `means`. Raises UserError without any pair.
    """
    own = values[(values["metric"] == metric) & values["method"].isin(rows)]
    of_rows = image_means(own, ["method"]).groupby("method", observed=True).mean()
    best, second = of_rows.sort_values(ascending=way < 0, kind="stable").index[:2]
    lines = [*differences(own[own["method"].isin([best, second])], best).itertuples()]
    if not lines:
        raise UserError(f"{best} and {second} have no edit in common")
    return best, second, lines[0]


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Computes the ends of a mean's interval; NaN for fewer than 5 samples, or equal ones up to rounding."""
    from scipy import stats

    if len(samples) < FEWEST or max(samples) - min(samples) <= 1e-6 * max(map(abs, samples)):
        return math.nan, math.nan
    how = {"confidence_level": CONFIDENCE, "n_resamples": RESAMPLES, "batch": AT_ONCE, "method": "BCa"}
    found = stats.bootstrap((np.asarray(samples),), np.mean, **how, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


# ---------------------------------------------------------------------------------------------------------
# tables


class Part(NamedTuple):
    """Holds a table as texts: its title, its cells, and which of them are the best of their budget."""

    title: str
    cells: pd.DataFrame
    is_best: np.ndarray  # of bool, as large as the cells


def named(table: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """Replaces the column `method`, names of rows, with what is known of them."""
    own = {column: table["method"].map(about[column]).astype("category") for column in about}
    return table[[]].assign(**own).join(table.drop(columns="method"))


def one_metric(
    values: pd.DataFrame, found: pd.DataFrame, pairs: pd.DataFrame | None, metric: Metric, about: pd.DataFrame
) -> pd.DataFrame:
    """Makes the table of one metric: `ABOUT`, judge, metric, prompt{i}..., mean, ci_low, ci_high, n, diff...

    found, pairs: `means` and `differences` of the values. n_inf is there if values may be infinite.
    """
    place = ["method", "prompt"]
    of_prompts = image_means(values, place).groupby(place, observed=True).mean().unstack("prompt")
    of_prompts.index = of_prompts.index.astype(object)
    found = found.droplevel("metric")
    table = of_prompts.reindex(index=found.index, columns=sorted(values["prompt"].unique()))
    table = table.add_prefix("prompt")
    table[["mean", "ci_low", "ci_high", "n"]] = found[["mean", "low", "high", "n"]]
    if metric.infinite:
        table["n_inf"] = found["n_inf"]
    if pairs is not None:
        pairs = pairs.droplevel("metric").reindex(found.index).astype({"n": "Int64"})
        table[["diff", "diff_low", "diff_high", "diff_n"]] = pairs[["mean", "low", "high", "n"]]
    table.insert(0, "judge", metric.judge)
    table.insert(1, "metric", metric.kind)
    return named(table.reset_index(), about)


def all_metrics(
    found: pd.DataFrame, groups: dict[str, Sequence[Metric]], about: pd.DataFrame, sign: str = ""
) -> tuple[pd.DataFrame, list[Part]]:
    """Makes the table of several metrics, and the same as texts, one part per group under its title.

    found: as `means` returns it; about: of its rows. Columns: `ABOUT`, and for each metric its mean, _low,
    _high, _n and, if it can be infinite, _n_inf.
    """
    import pandas as pd

    metrics = [metric for group in groups.values() for metric in group]
    columns = [(metric.name, statistic) for metric in metrics for statistic in STATISTICS]
    table = found.astype({"n": "Int64", "n_inf": "Int64"}).unstack("metric").swaplevel(axis=1)
    table = table.reindex(index=about.index, columns=pd.MultiIndex.from_tuples(columns))
    parts, few = [], about_intervals(found["n"])
    names = ["method", *(["budget"] if about["budget"].any() else [])]
    names += [column for column in ("editor", "purifier") if about[column].nunique() > 1]
    for title, group in groups.items():
        cells = about[names].replace("", "-")
        is_best = np.zeros((len(about), len(names) + len(group) + 1), bool)
        for place, metric in enumerate(group, len(names)):
            lines = table[metric.name].astype(float)
            cells[metric.title] = [shown_mean(line, metric.digits, sign) for line in lines.itertuples()]
            is_best[:, place] = best_of_budgets(lines["mean"], metric.way, about["budget"])
        counts = table[[(metric.name, "n") for metric in group]].astype("Int64")
        ranges = [sorted({*row.dropna()}) or [0] for _, row in counts.iterrows()]
        cells["n"] = [" to ".join(map(str, dict.fromkeys((own[0], own[-1])))) for own in ranges]
        parts.append(Part("; ".join(filter(None, (title, few if not parts else ""))), cells, is_best))
    finite = [(metric.name, "n_inf") for metric in metrics if not metric.infinite]
    table = table.drop(columns=finite)
    table.columns = [name if what == "mean" else f"{name}_{what}" for name, what in table.columns]
    return named(table.rename_axis("method").reset_index(), about), parts


def best_of_budgets(values: pd.Series, way: int, budgets: pd.Series) -> np.ndarray:
    """Marks the rows that are the best of their budget, if it has several; never the unprotected one.

    way: -1 if low is good, 1 if high; 0: nothing is best.
    """
    goodness = (way * values).where((values.index != "clean") & (way != 0))
    groups = goodness.groupby(budgets)
    return ((groups.transform("count") > 1) & (goodness == groups.transform("max"))).to_numpy()


def per_image(values: pd.DataFrame, metrics: Sequence[Metric], about: pd.DataFrame) -> pd.DataFrame:
    """Makes a table with one line per value: `ABOUT`, judge, seed, prompt, name, metric, value."""
    known = {metric.name: metric for metric in metrics}
    table = named(values[values["metric"].isin([*known])], about)
    names = table["metric"].astype(object)
    judges = names.map({name: metric.judge for name, metric in known.items()})
    kinds = names.map({name: metric.kind for name, metric in known.items()})
    table = table.assign(judge=judges.astype("category"), metric=kinds.astype("category"))
    return table[[*ABOUT, "judge", *EDIT[1:], "metric", "value"]]


# ---------------------------------------------------------------------------------------------------------
# as text


def about_intervals(counts: Iterable[int]) -> str:
    """Writes a warning about intervals of few images; empty if there are many."""
    counts = list(counts)
    if not counts or min(counts) >= FEW_IMAGES:
        return ""
    few = f"fewer than {FEWEST} images, no intervals" if min(counts) < FEWEST else ""
    some = f"fewer than {FEW_IMAGES} images, the intervals are approximate" if max(counts) >= FEWEST else ""
    return "; ".join(filter(None, (few, some)))


def shown(value: float, digits: int = 3, sign: str = "") -> str:
    """Formats a value with fixed digits; a zero has no minus."""
    return "-" if math.isnan(value) else f"{value:{sign}z.{digits}f}"


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


def as_page(parts: Sequence[Part]) -> str:
    """Formats tables as Markdown, each under its title."""
    return "\n\n".join(f"{harmless(part.title)}:\n\n{as_markdown(part.cells)}" for part in parts)


def as_latex(parts: Sequence[Part]) -> str:
    """Formats tables as LaTeX with booktabs: the best in bold, intervals as small print."""
    found = [r"% needs \usepackage{booktabs}"]
    for part in parts:
        cells = part.cells.astype(object).map(utils.one_line).reset_index(drop=True)
        style = cells.style.hide(axis="index")
        style = style.format(small_print, escape="latex")
        style = style.format_index(arrows, axis=1, escape="latex")
        bold = np.where(part.is_best, "textbf:--rwrap;", "")
        style = style.apply(lambda _, bold=bold: bold, axis=None)
        sides = "".join("l" if column in ABOUT else "r" for column in cells)
        table = style.to_latex(hrules=True, column_format=sides)
        found.append(f"% {utils.one_line(part.title)}\n{table}")
    return "\n".join(found)


def small_print(cell: str) -> str:
    """Sets what follows a value in a LaTeX cell small; keeps a leading bracket from being an option."""
    value, space, more = cell.partition(" [")
    return f"{value} {{\\scriptsize [{more}}}" if space else f"{{}}{cell}" if cell[:1] in ("[", "*") else cell


def arrows(title: str) -> str:
    """Writes the arrows of a title in LaTeX."""
    return title.replace("↓", r"$\downarrow$").replace("↑", r"$\uparrow$")


# ---------------------------------------------------------------------------------------------------------
# files


TEXTS = (*ABOUT, "judge", "name")  # columns of names, which may come from anywhere


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a CSV file, whole or not at all: numbers with six digits, empty for NaN. Raises UserError."""
    for column in {*TEXTS} & {*frame.columns}:
        frame = frame.assign(**{column: frame[column].astype(object).map(utils.csv_name)})
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    utils.write_own(path, text.encode(errors="surrogateescape"))


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table that `write_csv` wrote. Raises UserError.

    The column `method` is METHOD/budget_{B}, or METHOD, and stands for all of `ABOUT`; in a table without a
    column for the budget it stays as it is. Names are texts.
    """
    import pandas as pd

    texts = dict.fromkeys(TEXTS, object)
    how = {"keep_default_na": False, "na_values": [""], "encoding_errors": "surrogateescape"}
    try:
        if utils.is_special(path):
            raise ValueError("a device or a pipe")
        frame = pd.read_csv(path, dtype=texts, **how)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: not a readable table ({utils.first_line(error)})") from None
    for column in texts.keys() & {*frame.columns}:
        frame[column] = frame[column].fillna("").map(utils.name_of_csv)
    if {"method", "budget"} <= {*frame.columns}:
        frame["method"] = row_names(frame)
    return frame.drop(columns=[column for column in ABOUT[1:] if column in frame])


def method_at(about: pd.DataFrame, row: str) -> str:
    """Names a row for a title, as its columns do: facelock at 0.03."""
    return " at ".join(filter(None, about.loc[row, ["method", "budget"]]))


def row_names(about: pd.DataFrame) -> pd.Series:
    """Names rows by method and budget, METHOD/budget_{B}."""
    return about["method"].where(about["budget"] == "", about["method"] + "/budget_" + about["budget"])


def read_values(path: Path) -> pd.DataFrame:
    """Reads per_image.csv -> method, seed, prompt, name, metric, value, with a judge's name in the metric's.

    Also reads a file with one column per metric. Raises UserError.
    """
    import pandas as pd

    frame = read_csv(path)
    if lacking := [column for column in EDIT if column not in frame]:
        raise UserError(f"{path}: no column {lacking[0]} in it")
    if not {"metric", "value"} <= {*frame.columns}:
        numbers = frame.drop(columns=EDIT).select_dtypes(["number", "bool"]).astype(float)
        frame = pd.concat([frame[EDIT], numbers], axis=1).melt(EDIT, var_name="metric")
    elif "judge" in frame:
        pairs = zip(frame["metric"], frame["judge"], strict=True)
        frame["metric"] = [column_of(*pair) for pair in pairs]
    try:
        return frame[[*EDIT, "metric", "value"]].astype({"seed": int, "prompt": int, "value": float})
    except (ValueError, TypeError) as error:
        text = f"a seed, a prompt or a value is not a number ({utils.first_line(error)})"
        raise UserError(f"{path}: {text}") from None


def column_of(metric: str, judge: str) -> str:
    """Names a metric's column in a table with all metrics."""
    endings = {"": "", "hardest": "", "attacked": "", "any": "_by_any"}
    return f"{metric}{endings.get(judge, f'_{judge}')}"


def beside(table: Path, suffix: str) -> Path | None:
    """Returns a table's path with another ending; None for a device, such as /dev/null."""
    return None if utils.is_special(table) else table.with_suffix(suffix)


def write_beside(
    table: Path, parts: Sequence[Part], networks: dict[str, str], rows: dict[str, Path], latex: bool
) -> None:
    """Writes, beside a table, its networks and the directory of each row as JSON, and the table as LaTeX.

    Without `latex`, the .tex of an earlier run is removed. Raises UserError.
    """
    if utils.is_special(table):
        return
    found = {"networks": networks, "rows": {name: str(directory) for name, directory in rows.items()}}
    utils.write_own(table.with_suffix(".json"), (json.dumps(found, indent=2) + "\n").encode())
    typeset = table.with_suffix(".tex")
    if latex:
        utils.write_own(typeset, as_latex(parts).encode(errors="surrogateescape"))
    elif typeset.is_file() and typeset.stat().st_size:
        with contextlib.suppress(UserError):  # somebody else's
            utils.check_own(typeset)
            typeset.unlink()


def read_about(path: Path) -> dict[str, Any]:
    """Reads the JSON that `write_beside` wrote; empty for anything else."""
    try:
        found = utils.parse_json(utils.read_plain(path, utils.MOST_TEXT))
        return found if all(isinstance(found[key], dict) for key in ("networks", "rows")) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def check_networks(table: Path, networks: dict[str, str], way_out: str) -> None:
    """Raises UserError for a table that was measured by other networks or against other photos."""
    page = beside(table, ".json")
    known = read_about(page).get("networks", {}) if page and table.exists() else {}
    parts = [part for part, names in networks.items() if known.get(part, names) != names]
    if said := "; ".join(f"{part}: {known[part]} there, {networks[part]} now" for part in parts):
        raise UserError(f"{table}: measured by other networks or photos ({said}); {way_out}")


def check_numbers(path: Path, numbers: pd.DataFrame) -> None:
    """Refuses numbers that no axis could show: infinity, and values that no metric has. Raises UserError."""
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
            raise UserError(f"{path}: must end in {' or '.join(suffixes)}")
        utils.check_directory(path.absolute().parent)
        if path.exists() and any(path.samefile(other) for other in read):
            raise UserError(f"{path}: would overwrite what this run reads")
        utils.check_own(path)
    if len({path.resolve() for path in given}) < len(given):
        raise UserError(f"one output would overwrite the other: {' '.join(map(str, given))}")
