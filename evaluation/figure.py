"""Pictures for a paper: a grid of edits, and a metric against the budget or the purification.

    python evaluation/figure.py grid --src_dir portraits --clean_edit_dir edits/clean --seed 0 \\
        --protected_dirs protected/facelock/budget_0.03 --defend_edit_dirs edits/facelock/budget_0.03 \\
        --prompts 0,3 --names alice --output grid.png
    python evaluation/figure.py plot --tables all_metric.csv --metric facial_judge --output budgets.pdf
    python evaluation/figure.py plot --tables none=all_metric.csv jpeg75=jpeg75/all_metric.csv \\
        --metric facial_judge --output purified.png

PNG or PDF, by the ending of --output. Each has flags of its own: figure.py grid --help
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import common
import eval_all

import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MOST_LINES = 60  # of a grid that somebody could still look at
AMPLIFY = 10  # of the difference, which is shown around grey
CELL = 1.6  # inches
DPI = 100
GRID = """A grid: columns are the source, its edit and, method by method, the protected image and its edit;
a line is a portrait and an instruction. --protected_dirs and --defend_edit_dirs go in the same order.
"""
PLOT = """A metric with its 95 % interval, a line a method: against the budget, if the table's directories are
called budget_{B}; or, with several tables as LABEL=FILE, against their labels (purifications, say).
The tables are those of eval_all.py or of one metric's script.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="grid|plot")
    grid = kinds.add_parser(
        "grid", help="portraits and their edits", description=GRID, formatter_class=utils.HelpFormatter
    )
    grid.set_defaults(make=make_grid)
    grid.add_argument("--src_dir", type=Path, required=True, help="the source images")
    grid.add_argument("--clean_edit_dir", type=Path, required=True, help="edits of the sources")
    grid.add_argument(
        "--protected_dirs", type=Path, nargs="+", required=True, help="the protected images of each method"
    )
    grid.add_argument(
        "--defend_edit_dirs",
        type=Path,
        nargs="+",
        required=True,
        help="edits of the protected images, each holding seed{S}/",
    )
    grid.add_argument(
        "--titles", nargs="+", help="of the methods (default: their directories, if there are several)"
    )
    grid.add_argument("--seed", type=utils.known_seed, required=True, help="the S of seed{S}")
    common.add_prompt_arguments(grid)
    grid.add_argument("--names", nargs="+", help="stems of the portraits to show (default: all)")
    grid.add_argument(
        "--difference", action="store_true", help=f"a column with the protection itself, x{AMPLIFY}"
    )
    plot = kinds.add_parser(
        "plot", help="a metric's curve", description=PLOT, formatter_class=utils.HelpFormatter
    )
    plot.set_defaults(make=make_plot)
    plot.add_argument(
        "--tables", nargs="+", required=True, metavar="[LABEL=]FILE", help="CSV files, each with its place"
    )
    plot.add_argument(
        "--metric", help="the column to show (default: the one metric of the file: its mean)"
    )
    plot.add_argument("--xlabel", help="default: budget, or nothing")
    for kind, name in ((grid, "figure.png"), (plot, "plot.png")):
        kind.add_argument("--output", type=Path, default=Path(name), help="a .png or .pdf")
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"{args.output}: a figure is written as .png or .pdf")
    common.check_outputs(args.output)
    return args.make(args)


def save(figure: Figure, output: Path) -> None:
    """Writes the file, whole or not at all. Raises UserError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:].lower())
    utils.write_file(output, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------
# the grid


def make_grid(args: argparse.Namespace) -> int:
    clean = common.clean_row(args.clean_edit_dir, [args.seed])
    rows = common.find_rows(args.defend_edit_dirs, [args.seed])
    protected = common.protected_rows(args.protected_dirs)
    titles = args.titles or ([row.method for row in rows] if len(rows) > 1 else [""])
    if len(rows) != len(protected) or len(rows) != len(titles):
        raise UserError(
            f"{len(protected)} directories of protected images, but {len(rows)} of edits"
            + (f" and {len(titles)} titles" if args.titles else "")
        )
    prompts = common.prompts_of([clean, *rows], [args.seed], args.prompts)
    texts = common.texts_of([clean, *rows], [args.seed], prompts, args.prompt_file)
    sources = utils.images_by_stem(args.src_dir)
    lines = [(name, prompt) for name in args.names or sources for prompt in prompts]
    if len(lines) > MOST_LINES:
        raise UserError(f"a grid of {len(lines)} lines: choose some with --names or --prompts")
    listed = {directory: utils.images_by_stem(directory) for directory in [args.src_dir, *protected]}
    listed |= {
        folder: utils.images_by_stem(folder)
        for row in (clean, *rows)
        for prompt in prompts
        for folder in [row.directory / f"seed{args.seed}" / f"prompt{prompt}"]
    }

    def pixels(directory: Path, name: str) -> np.ndarray:
        if name not in listed[directory]:
            raise UserError(f"{directory}: no image {name}")
        return utils.load_image(listed[directory][name]).pixels

    def edit_of(row: common.Row, name: str, prompt: int) -> np.ndarray:
        return pixels(row.directory / f"seed{args.seed}" / f"prompt{prompt}", name)

    cells = []
    for name, prompt in lines:
        source = pixels(args.src_dir, name)
        cells.append([source, edit_of(clean, name, prompt)])
        for directory, row in zip(protected, rows, strict=True):
            image = pixels(directory, name)
            if image.shape != source.shape:
                raise UserError(f"{directory}: {name} has another size than its source")
            cells[-1] += [image, *([difference(image, source)] if args.difference else [])]
            cells[-1].append(edit_of(row, name, prompt))
    labels = [f"{name}\n{texts.get(prompt, f'prompt {prompt}')}" for name, prompt in lines]
    save(draw(cells, labels, column_titles(titles, args.difference)), args.output)
    print(f"{args.output}: {len(lines)} lines, {len(cells[0])} columns")
    return 0


def difference(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: what was added to the source, AMPLIFY times, around grey."""
    import numpy as np

    return np.clip(128 + AMPLIFY * (image.astype(int) - source.astype(int)), 0, 255).astype(np.uint8)


def column_titles(methods: Sequence[str], with_difference: bool) -> list[str]:
    """One title a column: source, its edit, then of each method protected, (difference), its edit; a method
    may go without a name.
    """
    titles = ["source", "edit of source"]
    for method in methods:
        shown = f"\n{method}" if method else ""
        titles += [f"protected{shown}", *([f"difference x{AMPLIFY}"] if with_difference else [])]
        titles.append(f"edit of protected{shown}")
    return titles


def draw(cells: list[list[np.ndarray]], labels: Sequence[str], columns: Sequence[str]) -> Figure:
    """Lays the pictures out with labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(CELL * (len(columns) + 1), CELL * len(cells) + 0.5), dpi=DPI)
    axes = figure.subplots(len(cells), len(columns), squeeze=False)
    for line, (pictures, label) in enumerate(zip(cells, labels, strict=True)):
        for column, picture in enumerate(pictures):
            axis = axes[line, column]
            axis.imshow(picture, interpolation="nearest" if picture.shape[0] <= 256 else "antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if line == 0:
                axis.set_title(columns[column], fontsize=8)
        axes[line, 0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center", wrap=True)
    figure.tight_layout(pad=0.3)
    return figure


# ---------------------------------------------------------------------------------------------------------
# the plot


@dataclass(frozen=True)
class Point:
    """One row of a table."""

    method: str  # the last part of its directory that is no budget
    place: str  # on the axis; empty for a row that belongs to none, such as the clean edits' among budgets
    value: float
    low: float  # NaN where there is no interval
    high: float


def make_plot(args: argparse.Namespace) -> int:
    tables = {}
    for given in args.tables:
        label, _, file = ("", "", given) if Path(given).exists() else given.rpartition("=")
        if label in tables:
            raise UserError(f"--tables: {f'two are called {label}' if label else 'two have no label'}")
        tables[label] = Path(file)
    if len(tables) > 1 and "" in tables:
        raise UserError(f"--tables: {tables['']} has no label: LABEL=FILE")
    points = [
        point for label, file in tables.items() for point in read_points(file, args.metric, label)
    ]
    places = [(point.method, point.place) for point in points]
    twice = [f"{method} at {place or label}" for method, place in places if places.count((method, place)) > 1]
    if twice:
        raise UserError(f"--tables: {twice[0]} has two values (a method is the last part of its directory)")
    by_budget = list(tables) == [""]
    if by_budget and not any(point.place for point in points):
        raise UserError(f"{tables['']}: no budget_B in its rows; label several tables: LABEL=FILE ...")
    xlabel = args.xlabel or ("budget (L-infinity, [-1, 1])" if by_budget else "")
    shown = eval_all.COLUMNS[args.metric].title if args.metric in eval_all.COLUMNS else args.metric or "mean"
    save(draw_plot(points, shown, xlabel), args.output)
    n_places = len({place for _, place in places if place})
    print(f"{args.output}: {len({method for method, _ in places})} methods, {n_places} places")
    return 0


def read_points(file: Path, metric: str | None, label: str) -> list[Point]:
    """A table's rows. Raises UserError if it is none or has no such metric."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a readable table ({utils.first_line(error)})") from None
    ends = (f"{metric}_low", f"{metric}_high") if metric else ("ci_low", "ci_high")
    column = metric or "mean"
    wanted = {"method", column, *ends}
    if not rows or not wanted <= rows[0].keys():
        there = ", ".join(name[:-4] for name in (rows[0] if rows else ()) if name.endswith("_low"))
        raise UserError(f"{file}: no columns {', '.join(sorted(wanted))} (metrics there: {there or 'none'})")
    points = []
    for row in rows:
        parts = [part for part in Path(row["method"]).parts if part != "/"]
        budgets = [part[7:] for part in parts if re.fullmatch(r"budget_[\d.e-]+", part)]
        rest = [part for part in parts if not re.fullmatch(r"(budget_|seed)[\d.e-]+", part)]
        try:
            value, low, high = (float(row[name] or "nan") for name in (column, *ends))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
        if row[column]:
            budget = budgets[-1] if budgets else ""
            method = rest[-1] if rest else row["method"]
            if label and budget:
                method += f", {budget}"
            points.append(Point(method, label or budget, value, low, high))
    return points


def draw_plot(points: Sequence[Point], ylabel: str, xlabel: str) -> Figure:
    """A line a method over numbers, to scale; points beside each other over names. A row without a place is a
    dashed line.
    """
    import numpy as np
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(point.place for point in points if point.place))
    to_scale = all(_is_number(place) for place in places)
    at = {place: float(place) if to_scale else number for number, place in enumerate(places)}
    methods = list(dict.fromkeys(point.method for point in points))
    figure = Figure(figsize=(6, 3.5), dpi=DPI)
    axis = figure.subplots()
    for index, method in enumerate(methods):
        own = sorted((p for p in points if p.method == method and p.place), key=lambda p: at[p.place])
        for point in points:
            if point.method == method and not point.place:
                axis.axhline(point.value, linestyle="--", color="grey", label=method)
        if own:
            beside = 0 if to_scale else 0.5 * ((index + 0.5) / len(methods) - 0.5)
            axis.errorbar(
                [at[point.place] + beside for point in own],
                [point.value for point in own],
                yerr=np.nan_to_num([[p.value - p.low for p in own], [p.high - p.value for p in own]]),
                marker="o",
                capsize=3,
                linestyle="-" if to_scale else "",
                label=method,
            )
    axis.set_xticks(list(at.values()), list(at))
    if not to_scale:
        axis.tick_params(axis="x", rotation=30)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text) is not None


if __name__ == "__main__":
    sys.exit(main())
