"""From values to tables: means over images with their intervals, paired differences, and as texts.

Values are a long DataFrame: method, seed, prompt, name, metric, value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import directories  # noqa: F401 (finds the project's modules)
import numpy as np

import utils

if TYPE_CHECKING:
    import pandas as pd
    from views import Metric

CONFIDENCE = 0.95
RESAMPLES = 9999
AT_ONCE = 100  # resamples, so that memory doesn't grow with the images
FEWEST = 5  # images; below this there is no interval
FEW_IMAGES = 30  # below this a bootstrap interval is only a hint


def image_means(values: pd.DataFrame, groups: Sequence[str]) -> pd.Series:
    """Averages each image's finite values by group; summed in order, on which ties of resamples depend."""
    import pandas as pd

    finite = values[np.isfinite(values["value"])]
    grouped = finite.groupby([*groups, "name"], observed=True)
    counts = grouped.size()
    return pd.Series(np.bincount(grouped.ngroup(), finite["value"], len(counts)) / counts, index=counts.index)


def means(values: pd.DataFrame) -> pd.DataFrame:
    """Averages over images, with a 95 % BCa bootstrap interval over images (Efron 1987, by scipy).

    An image counts once: as the mean of its finite values over prompts and seeds, which are not independent.
    Returns mean, low, high, n (images), n_inf (infinite values), by method and metric as they come.
    """
    groups = ["method", "metric"]
    infinite = values.assign(n_inf=np.isinf(values["value"]))
    table = infinite.groupby(groups, observed=True, sort=False)[["n_inf"]].sum()
    grouped = image_means(values, groups).groupby(groups, observed=True)
    table["mean"] = grouped.mean()
    table["n"] = grouped.size().reindex(table.index, fill_value=0)
    ends = {place: interval(samples.tolist()) for place, samples in grouped}
    table[["low", "high"]] = np.reshape([ends.get(place, (np.nan, np.nan)) for place in table.index], (-1, 2))
    return table[["mean", "low", "high", "n", "n_inf"]]


def differences(values: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Averages paired differences to a row, edit by edit, where both are finite; otherwise as `means`."""
    edit = ["seed", "prompt", "name", "metric"]
    of_baseline = values.loc[values["method"] == baseline, [*edit, "value"]]
    pairs = values[values["method"] != baseline].merge(of_baseline, on=edit, suffixes=("", "_baseline"))
    both = np.isfinite(pairs["value"]) & np.isfinite(pairs["value_baseline"])
    with np.errstate(invalid="ignore"):  # inf - inf
        pairs["value"] = (pairs["value"] - pairs.pop("value_baseline")).where(both)
    return means(pairs)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Gives the ends of a mean's interval; NaN for fewer than 5 samples or all equal up to rounding."""
    from scipy import stats

    if len(samples) < FEWEST or max(samples) - min(samples) <= 1e-6 * max(map(abs, samples)):
        return math.nan, math.nan
    how = {"confidence_level": CONFIDENCE, "n_resamples": RESAMPLES, "batch": AT_ONCE, "method": "BCa"}
    found = stats.bootstrap((np.asarray(samples),), np.mean, **how, rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def about_intervals(counts: Iterable[int]) -> str:
    """Says what is to be known about the intervals of so few images; nothing if they are many."""
    counts = list(counts)
    if not counts or min(counts) >= FEW_IMAGES:
        return ""
    few = f"fewer than {FEWEST} images, no intervals" if min(counts) < FEWEST else ""
    some = f"fewer than {FEW_IMAGES} images, the intervals are approximate" if max(counts) >= FEWEST else ""
    return "; ".join(filter(None, (few, some)))


def shown(value: float, digits: int = 3, sign: str = "") -> str:
    """Writes a value for the screen; a small one with three significant digits instead of 0.000."""
    if math.isnan(value):
        return "-"
    small = 0 < abs(value) < max(0.001, 10**-digits)
    return f"{value:{sign}#.3g}" if small else f"{value:{sign}.{digits}f}"


def shown_interval(low: float, high: float, digits: int, sign: str, form: str) -> str:
    """Writes an interval in a form such as "{} to {}"; nothing if there is none."""
    return "" if math.isnan(low) else form.format(shown(low, digits, sign), shown(high, digits, sign))


def harmless(name: str) -> str:
    """Writes a name so that it can't break a line, a Markdown table or a terminal."""
    return utils.one_line(name).replace("|", "\\|")


def as_text(frame: pd.DataFrame, form: str) -> str:
    """Writes a table of texts, by tabulate, in one of its forms: the first column left, others right."""
    sides = ("left", *("right" for _ in frame.columns[1:]))
    cells = frame.astype(object).map(harmless).rename(columns=harmless)
    return cells.to_markdown(index=False, tablefmt=form, disable_numparse=True, colalign=sides)


def one_metric(values: pd.DataFrame, baseline: str | None, infinite: bool) -> pd.DataFrame:
    """Makes one metric's table: method, prompt{i}..., mean, ci_low, ci_high, n, diff...; n_inf if asked."""
    place = ["method", "prompt"]
    of_prompts = image_means(values, place).groupby(place, observed=True).mean().unstack("prompt")
    found = means(values).droplevel("metric")
    table = of_prompts.reindex(index=found.index, columns=sorted(values["prompt"].unique()))
    table = table.add_prefix("prompt")
    table[["mean", "ci_low", "ci_high", "n"]] = found[["mean", "low", "high", "n"]]
    if infinite:
        table["n_inf"] = found["n_inf"]
    if baseline is not None:
        pairs = differences(values, baseline).droplevel("metric").reindex(found.index)
        pairs["n"] = pairs["n"].astype("Int64")
        table[["diff", "diff_low", "diff_high", "diff_n"]] = pairs[["mean", "low", "high", "n"]]
    return table.reset_index()


def for_screen(table: pd.DataFrame, metric: str, baseline: str | None) -> str:
    """Writes the table of one metric as a person reads it: mean, interval, n, difference to the baseline."""
    import pandas as pd

    text, form = pd.DataFrame({"method": table["method"].astype(object)}), "{} to {}"
    text[metric] = table["mean"].map(shown)
    ends = zip(table["ci_low"], table["ci_high"], strict=True)
    text[f"{CONFIDENCE:.0%} interval"] = [shown_interval(*pair, 3, "", form) or "-" for pair in ends]
    text["n"] = table["n"].map(str)
    if "n_inf" in table:
        text["inf"] = table["n_inf"].map(str)
    if baseline is not None:
        text[f"minus {baseline}"] = [
            "" if pd.isna(n) else f"{shown(mean, 3, '+')} ({shown_interval(*ends, 3, '+', form) or '-'})"
            for mean, *ends, n in table[["diff", "diff_low", "diff_high", "diff_n"]].itertuples(index=False)
        ]
    note = about_intervals(table["n"])
    return as_text(text, "plain") + (f"\n({note})" if note else "")


def all_metrics(
    found: pd.DataFrame, groups: dict[str, Sequence[Metric]], rows: Sequence[str], sign: str = ""
) -> tuple[pd.DataFrame, str]:
    """Makes the table of several metrics: method; value, _low, _high, _n and perhaps _n_inf of each; and the
    same as Markdown, a table for each group under its title.
    """
    import pandas as pd

    columns, parts = {"method": pd.Series(rows, dtype=object)}, []
    few = about_intervals(found["n"])
    for title, metrics in groups.items():
        text, counts = pd.DataFrame({"method": columns["method"]}), pd.DataFrame(index=range(len(rows)))
        for metric in metrics:
            of_rows = found[found.index.get_level_values("metric") == metric.name].droplevel("metric")
            of_rows.index = of_rows.index.astype(object)
            of_rows = of_rows.reindex(list(rows)).astype({"n": "Int64", "n_inf": "Int64"})
            columns[metric.name] = of_rows["mean"].to_numpy()
            for column in ("low", "high", "n", *(["n_inf"] if metric.infinite else [])):
                columns[f"{metric.name}_{column}"] = of_rows[column].array
            cells = []
            for line in of_rows.itertuples():
                ends = shown_interval(line.low, line.high, metric.digits, sign, " [{}, {}]")
                infinite = "" if pd.isna(line.n_inf) or not line.n_inf else f" ({line.n_inf} inf)"
                cells.append(shown(line.mean, metric.digits, sign) + ends + infinite)
            text[metric.title] = cells
            counts[metric.name] = of_rows["n"].array
        ranges = [sorted({*row.dropna()}) or [0] for _, row in counts.iterrows()]
        text["n"] = [" to ".join(str(n) for n in dict.fromkeys((all_n[0], all_n[-1]))) for all_n in ranges]
        note = "; ".join(filter(None, (title, few if not parts else "")))
        parts.append(f"{harmless(note)}:\n\n{as_text(text, 'pipe')}")
    return pd.DataFrame(columns), "\n\n".join(parts)


def per_image(values: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Makes a table with one line per edit and one column per metric."""
    edit = ["method", "seed", "prompt", "name"]
    return values.pivot(index=edit, columns="metric", values="value").reindex(columns=metrics).reset_index()
