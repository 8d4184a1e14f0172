"""What the evaluation scripts share: finding edits, pairing them by file stem, intervals, tables.

Directories, as main_edit.py makes them: a *row* of a table is a directory that holds
`seed{S}/prompt{i}/NAME.png`. A given directory may be such a one, one above it (each matching child is a
row), or a `seed{S}` itself.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# The scripts of this folder run as `python eval_psnr.py` in it and as `python evaluation/eval_psnr.py`
# above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
FEW_IMAGES = 30  # below this a bootstrap interval is only a hint

# One value: (seed, prompt, name) -> value, of one row
Values = dict[tuple[int, int, str], float]


@dataclass(frozen=True)
class Row:
    """One line of a table: the edits of one method at one budget."""

    method: str
    directory: Path  # holds seed{S}


@dataclass(frozen=True)
class Pair:
    """One edit and the image that it is compared with."""

    seed: int
    prompt: int
    name: str  # the files' stem
    edit: Path
    reference: Path


# ---------------------------------------------------------------------------------------------------------
# flags


def add_arguments(parser: argparse.ArgumentParser, metric: str) -> None:
    """The flags of every evaluation script; `metric` names its CSV file."""
    parser.add_argument(
        "--defend_edit_dirs",
        type=Path,
        nargs="+",
        required=True,
        help="edits of protected images: each holds seed{S}/, or holds directories that do",
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", required=True, help="the S of seed{S}, one or more"
    )
    parser.add_argument(
        "--prompts",
        type=utils.number_list,
        metavar="I,J,...",
        help="numbers of the instructions to score (default: all that were edited)",
    )
    parser.add_argument(
        "--common", action="store_true", help="score the images that all directories have and name the rest"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"where the table goes (default: {metric}_metric.csv in the working directory)",
    )
    parser.add_argument("--per_image", type=Path, metavar="FILE", help="a CSV with one line an edit, too")


# ---------------------------------------------------------------------------------------------------------
# directories


def find_rows(directories: Sequence[Path], seeds: Sequence[int]) -> list[Row]:
    """The rows that the given directories stand for. Raises UserError if one holds no seed{S}."""
    rows = []
    for given in directories:
        if not given.is_dir():
            raise UserError(f"{given}: no such directory")
        if re.fullmatch(r"seed\d+", given.name):
            if [int(given.name[4:])] != list(seeds):
                raise UserError(f"{given}: holds other edits than --seed {' '.join(map(str, seeds))}")
            rows.append(Row(str(given), given.parent))
            continue
        here = [given] if _holds_seeds(given, seeds) else []
        found = here or [child for child in sorted(given.iterdir()) if _holds_seeds(child, seeds)]
        if not found:
            wanted = ", ".join(f"seed{seed}" for seed in seeds)
            raise UserError(f"{given}: no {wanted} in it or in its sub-directories")
        rows += [Row(str(child), child) for child in found]
    return rows


def clean_row(directory: Path, seeds: Sequence[int]) -> Row:
    """The row `clean`: the edits of the unprotected images.

    Raises UserError unless the directory is one row.
    """
    rows = find_rows([directory], seeds)
    if len(rows) > 1:
        found = ", ".join(row.method for row in rows)
        raise UserError(f"{directory}: which are the clean edits? ({found})")
    return Row("clean", rows[0].directory)


def _holds_seeds(directory: Path, seeds: Sequence[int]) -> bool:
    return all((directory / f"seed{seed}").is_dir() for seed in seeds)


def prompts_of(rows: Sequence[Row], seeds: Sequence[int], asked: Sequence[int] | None) -> list[int]:
    """The prompts to score: those asked for, else all that any row has.

    Raises UserError if a row lacks one.
    """
    there = {
        (row, seed): {
            int(found[1])
            for child in (row.directory / f"seed{seed}").iterdir()
            if (found := re.fullmatch(r"prompt(\d+)", child.name)) and child.is_dir()
        }
        for row in rows
        for seed in seeds
    }
    prompts = sorted(set(asked) if asked is not None else set().union(*there.values()))
    if not prompts:
        raise UserError(f"{rows[0].directory}: no prompt folders in seed{seeds[0]}")
    lacking = [
        f"{row.directory}/seed{seed}: {', '.join(f'prompt{i}' for i in prompts if i not in numbers)}"
        for (row, seed), numbers in there.items()
        if not numbers.issuperset(prompts)
    ]
    if lacking:
        raise UserError(f"prompts are missing: {'; '.join(lacking)}")
    return prompts


def find_pairs(
    rows: Sequence[Row],
    reference: Row | Path,
    seeds: Sequence[int],
    prompts: Sequence[int],
    common: bool,
) -> dict[Row, list[Pair]]:
    """Pairs every row's edits with the reference's files of the same stem.

    reference: a row (the edits of the clean images: same seed, prompt and stem) or a directory (the sources:
    same stem).
    Every directory must have every stem that any has; with `common` only those that all have are paired, and
    the rest is named on stderr. Raises UserError naming what is missing.
    """
    files: dict[Path, dict[str, Path]] = {}
    for seed in seeds:
        for prompt in prompts:
            for row in (*rows, *([reference] if isinstance(reference, Row) else [])):
                directory = row.directory / f"seed{seed}" / f"prompt{prompt}"
                files[directory] = utils.images_by_stem(directory)
    if isinstance(reference, Path):
        files[reference] = utils.images_by_stem(reference)
    every = set().union(*files.values())
    lacking = {
        directory: sorted(every - there.keys()) for directory, there in files.items() if every - there.keys()
    }
    shared = sorted(every.intersection(*files.values()))
    if lacking:
        text = "; ".join(f"{directory}: {', '.join(names)}" for directory, names in lacking.items())
        if not common:
            raise UserError(f"images are missing ({text}); --common scores those that all have")
        print(f"left out, not in every directory: {text}", file=sys.stderr)
    if not shared:
        raise UserError("no image is in every directory")

    def reference_of(seed: int, prompt: int) -> dict[str, Path]:
        if isinstance(reference, Row):
            return files[reference.directory / f"seed{seed}" / f"prompt{prompt}"]
        return files[reference]

    return {
        row: [
            Pair(
                seed,
                prompt,
                name,
                files[row.directory / f"seed{seed}" / f"prompt{prompt}"][name],
                reference_of(seed, prompt)[name],
            )
            for seed in seeds
            for prompt in prompts
            for name in shared
        ]
        for row in rows
    }


def load_edit(pair: Pair) -> np.ndarray:
    """The edit's pixels, (H, W, 3) uint8. Raises UserError if its reference has another size."""
    edit = utils.load_image(pair.edit)
    size = utils.image_size(pair.reference)
    if size is not None and edit.size != size:
        raise UserError(f"{pair.edit} is {edit.size[1]}x{edit.size[0]}, {pair.reference} {size[1]}x{size[0]}")
    return edit.pixels


def load_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The edit's and the reference's pixels, (H, W, 3) uint8. Raises UserError if their sizes differ."""
    return load_edit(pair), utils.load_image(pair.reference).pixels


# ---------------------------------------------------------------------------------------------------------
# statistics


@dataclass(frozen=True)
class Mean:
    """A mean over images with its interval; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int  # images
    n_inf: int  # values left out because they are infinite


def image_means(values: Values) -> dict[str, float]:
    """Each image's mean over its prompts and seeds, of the finite values:
    prompts of one image are not independent.
    """
    per_image: dict[str, list[float]] = {}
    for (_, _, name), value in values.items():
        if math.isfinite(value):
            per_image.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in per_image.items()}


def mean_of(values: Values) -> Mean:
    """The mean over images with a 95 % BCa bootstrap interval over images (Efron 1987, by scipy)."""
    means = list(image_means(values).values())
    infinite = sum(not math.isfinite(value) for value in values.values())
    return Mean(average(means), *bootstrap(means), len(means), infinite)


def average(samples: Sequence[float]) -> float:
    """Their mean; NaN for none."""
    return sum(samples) / len(samples) if samples else math.nan


def bootstrap(samples: Sequence[float]) -> tuple[float, float]:
    """The ends of the interval; NaN for fewer than two samples or all equal,
    where there is nothing to resample.

    Equal up to rounding, that is: the interval of rounding errors would say nothing.
    """
    import numpy as np
    from scipy import stats

    if len(samples) < 2 or max(samples) - min(samples) <= 1e-6 * max(map(abs, samples)):
        return math.nan, math.nan
    interval = stats.bootstrap(
        (np.asarray(samples),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


# ---------------------------------------------------------------------------------------------------------
# tables


def report(
    results: dict[Row, Values], metric: str, args: argparse.Namespace, *, infinite: bool = False
) -> None:
    """Writes the CSV (and --per_image) and prints the table. `infinite`: whether to count infinite values."""
    prompts = sorted({prompt for values in results.values() for _, prompt, _ in values})
    means = {row: mean_of(values) for row, values in results.items()}
    header = ["method", *(f"prompt{i}" for i in prompts), "mean", "ci_low", "ci_high", "n"]
    lines = []
    for row, values in results.items():
        mean = means[row]
        of_prompts = [{key: v for key, v in values.items() if key[1] == i} for i in prompts]
        columns = [average(list(image_means(part).values())) for part in of_prompts]
        line = [row.method, *map(number, (*columns, mean.value, mean.low, mean.high)), str(mean.n)]
        lines.append([*line, str(mean.n_inf)] if infinite else line)
    output = args.output or Path(f"{metric}_metric.csv")
    write_csv(output, [*header, "n_inf"] if infinite else header, lines)
    if args.per_image:
        write_csv(
            args.per_image,
            ["method", "seed", "prompt", "name", "value"],
            [
                [row.method, str(seed), str(prompt), name, number(value)]
                for row, values in results.items()
                for (seed, prompt, name), value in values.items()
            ],
        )
    print_table(metric, means, infinite)
    print(f"{output}: {len(prompts)} prompts, {len(lines)} rows")


def print_table(metric: str, means: dict[Row, Mean], infinite: bool) -> None:
    """The table as a person reads it: mean, interval, n."""
    width = max(len("method"), *(len(row.method) for row in means))
    value_width = max(8, len(metric))
    inf = "  inf" if infinite else ""
    print(f"{'method':{width}}  {metric:>{value_width}}  {'95 % interval':>18}  {'n':>4}{inf}")
    for row, mean in means.items():
        interval = "" if math.isnan(mean.low) else f"{mean.low:.3f} to {mean.high:.3f}"
        count = f"  {mean.n_inf:>3}" if infinite else ""
        print(f"{row.method:{width}}  {mean.value:{value_width}.3f}  {interval:>18}  {mean.n:>4}{count}")
    if any(mean.n < FEW_IMAGES for mean in means.values()):
        print(f"(fewer than {FEW_IMAGES} images: the intervals are approximate)")


def number(value: float) -> str:
    """A value as it stands in a CSV: six digits, empty for NaN."""
    return "" if math.isnan(value) else f"{value:.6g}"


def write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Writes a CSV file, whole or not at all. Raises UserError."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    utils.write_file(path, buffer.getvalue().encode())
