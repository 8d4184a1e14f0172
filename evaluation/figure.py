"""Pictures for a paper: a grid of edits, and a metric against budget, visibility or purification.

    python evaluation/figure.py grid --src_dir portraits --clean_edit_dir edits/clean --seed 0 \\
        --protected_dirs protected/facelock/budget_0.03 --defend_edit_dirs edits/facelock/budget_0.03 \\
        --prompts 0,3 --names alice --output grid.png
    python evaluation/figure.py plot --tables all_metric.csv --metric facial_judge --output budgets.pdf
    python evaluation/figure.py plot --tables all_metric.csv --metric facial_judge --against lpips
    python evaluation/figure.py plot --tables none=all_metric.csv jpeg75=jpeg75/all_metric.csv \\
        --metric facial_judge --output purified.png

PNG or PDF, by the ending of --output. Each has flags of its own: figure.py grid --help
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file
    import _path  # noqa: F401

import numpy as np

import utils
from evaluation import tables
from evaluation.eval_all import METRICS
from evaluation.eval_facial import is_of_faces, title_of
from evaluation.pairing import NUMBER, Edits, Key, check_edits, check_pair, parse_row, protected_rows
from evaluation.scoring import edits_of
from images import images_by_stem, load_image
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_LINES = 60  # of a grid; nobody looks at more
MOST_TICKS = 8  # one at each point of a curve; matplotlib chooses if there are more points
AMPLIFY = 10  # factor of the difference, which is shown around grey
CELL = 1.6  # inches
DPI = 100
PLAIN = {"parse_math": False}  # names and prompts with two $ are not formulas
FORMATS = (".png", ".pdf")
VISIBLE = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "linf": "L-infinity"}
GRID = """A grid with one line per portrait and instruction: the source, its edit and, for each method, the
protected image and its edit. --protected_dirs and --defend_edit_dirs go in the same order.
"""
PLOT = """A metric with its 95 % interval, one line per method: against the budget, if rows are directories
called budget_{B}; with --against, against how visible the protection is; with several tables, as LABEL=FILE,
against their labels, such as purifications. The tables are those of eval_all.py or of a metric's script.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    look = {"formatter_class": utils.HelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **look)
    kinds = parser.add_subparsers(required=True, metavar="grid|plot")
    grid = kinds.add_parser("grid", help="portraits and their edits", description=GRID, **look)
    grid.set_defaults(run=run_grid)
    path = {"type": utils.path, "required": True}
    grid.add_argument("--src_dir", help="the source images", **path)
    grid.add_argument("--clean_edit_dir", help="edits of the sources", **path)
    grid.add_argument("--protected_dirs", nargs="+", help="the protected images of each method", **path)
    grid.add_argument("--defend_edit_dirs", nargs="+", help="edits of them, each holding seed{S}/", **path)
    grid.add_argument("--titles", nargs="+", help="titles of the methods (default: directories, if several)")
    grid.add_argument("--seed", type=utils.known_seed, nargs=1, required=True, help="the S of seed{S}")
    utils.add_prompt_arguments(grid, are_there=True)
    grid.add_argument("--names", nargs="+", help="stems of the portraits to show (default: all)")
    grid.add_argument("--difference", action="store_true", help=f"add a column of what was added, x{AMPLIFY}")
    plot = kinds.add_parser("plot", help="a metric's curve", description=PLOT, **look)
    plot.set_defaults(run=run_plot)
    plot.add_argument("--tables", nargs="+", required=True, metavar="[LABEL=]FILE", help="CSV files")
    plot.add_argument("--metric", help="the column to show (default: the mean, in a table of one metric)")
    plot.add_argument("--xlabel", help="label of the axis (default: budget, or --against, or none)")
    visible = "plot against a column of TABLE_protected.csv, not the budget"
    plot.add_argument("--against", choices=VISIBLE, help=visible)
    for kind, name in ((grid, "figure.png"), (plot, "plot.png")):
        kind.add_argument("--output", type=utils.path, default=Path(name), help="a .png or .pdf")
        kind.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(args.run, args)


def save(figure: Figure, output: Path) -> None:
    """Writes the file, whole or not at all. Raises UserError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:].lower() or "png")  # /dev/null has no ending
    utils.write_own(output, buffer.getvalue())


def run_grid(args: argparse.Namespace) -> int:
    """Draws the grid that the flags name -> exit status."""
    make_grid(edits_of(args), args.protected_dirs, args.output, args.names, args.titles, args.difference)
    return 0


def make_grid(
    edits: Edits,
    protected_dirs: Sequence[Path],
    output: Path,
    names: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    with_difference: bool = False,
) -> None:
    """Draws portraits, protected versions (in the rows' order) and one seed's edits. Raises UserError."""
    protected = protected_rows(protected_dirs)
    titles = titles or ([row.method for row in edits.rows] if len(edits.rows) > 1 else [""])
    if not len(edits.rows) == len(protected) == len(titles):
        counts = f"{len(protected)} directories of protected images, but {len(edits.rows)} of edits"
        raise UserError(f"{counts} and {len(titles)} titles")
    names = dict.fromkeys(names or edits.names)
    keys = [Key(edits.keys[0].seed, i, name) for name in names for i in edits.prompts]
    if len(keys) > MOST_LINES:
        raise UserError(f"a grid of {len(keys)} lines: choose some with --names or --prompts")
    check_edits(edits)
    files = [images_by_stem(directory) for directory in protected]
    for row, directory, found in zip(edits.rows, protected, files, strict=True):
        if lacking := [name for name in edits.names if name not in found]:
            raise UserError(f"{directory}: no image {', '.join(lacking)}")
        check_pair(edits, row, found, "; --protected_dirs go in the order of --defend_edit_dirs")
    read = [edits.path(row, key) for row in edits.every_row for key in keys]
    read += [*edits.sources.values(), *(path for found in files for path in found.values())]
    tables.check_outputs([output], read, FORMATS)

    cells = []
    for key in keys:
        source = load_image(edits.sources[key.name]).pixels
        line = [source, load_image(edits.path(edits.clean, key)).pixels]
        for row, found in zip(edits.rows, files, strict=True):
            image = load_image(found[key.name]).pixels
            if image.shape != source.shape:
                raise UserError(f"{found[key.name]}: differs in size from its source")
            line += [image, *([difference(image, source)] if with_difference else [])]
            line.append(load_image(edits.path(row, key)).pixels)
        cells.append(line)
    texts = [edits.texts.get(key.prompt, f"prompt {key.prompt}") for key in keys]
    pairs = zip((key.name for key in keys), texts, strict=True)
    labels = ["\n".join(map(utils.one_line, pair)) for pair in pairs]
    columns = ["source", "edit of source"]
    for method in (f"\n{utils.one_line(title)}" if title else "" for title in titles):
        added = [f"difference x{AMPLIFY}"] if with_difference else []
        columns += [f"protected{method}", *added, f"edit of protected{method}"]
    save(draw(cells, labels, columns), output)
    print(utils.one_line(f"{output}: {len(keys)} lines, {len(columns)} columns"))


def difference(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Shows what was added to the source, AMPLIFY times, around grey: (H, W, 3) uint8."""
    return np.clip(128 + AMPLIFY * (image.astype(int) - source.astype(int)), 0, 255).astype(np.uint8)


def draw(cells: list[list[np.ndarray]], labels: Sequence[str], columns: Sequence[str]) -> Figure:
    """Lays the pictures out with labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(CELL * (len(columns) + 1), CELL * len(cells) + 0.5), dpi=DPI)
    axes = figure.subplots(len(cells), len(columns), squeeze=False)
    for axis, picture in zip(axes.flat, [picture for line in cells for picture in line], strict=True):
        axis.imshow(picture, interpolation="nearest" if picture.shape[0] <= 256 else "antialiased")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8, **PLAIN)
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center", wrap=True, **PLAIN)
    figure.tight_layout(pad=0.3)
    return figure


def run_plot(args: argparse.Namespace) -> int:
    """Draws the plot that the flags name -> exit status."""
    files: dict[str, Path] = {}
    for given in args.tables:
        label, _, file = ("", "", given) if Path(given).exists() else given.rpartition("=")
        if label in files:
            raise UserError(f"--tables: {f'two are called {label}' if label else 'two have no label'}")
        files[label] = Path(file)
    make_plot(files, args.output, args.metric, args.xlabel, args.against)
    return 0


def make_plot(
    files: dict[str, Path],
    output: Path,
    metric: str | None = None,
    xlabel: str | None = None,
    against: str | None = None,
) -> None:
    """Draws a metric of labelled tables against the labels, or of one without a label against its budgets or,
    with `against`, against how visible its protected pictures are. Raises UserError."""
    import pandas as pd

    if len(files) > 1 and "" in files:
        raise UserError(f"--tables: {files['']} has no label: LABEL=FILE")
    tables.check_outputs([output], files.values(), FORMATS)
    points = pd.concat([read_points(file, metric, label) for label, file in files.items()], ignore_index=True)
    twice = points[points.duplicated(["method", "place"])]
    if len(twice):
        method, place = twice.iloc[0][["method", "place"]]
        what = f"{method} at {place}" if place else method
        raise UserError(f"--tables: {what} has two values (a method is the last part of its directory)")
    by_budget = list(files) == [""]
    if by_budget and not any(points["place"]):
        raise UserError(f"{files['']}: no budget_B in its rows; label several tables: LABEL=FILE ...")
    if against and not by_budget:
        raise UserError("--against needs one table without a label")
    if against:
        seen = read_points(files[""].with_name(f"{files[''].stem}_protected.csv"), against, "")
        visible = seen.set_index(["method", "place"])["value"].to_dict()
        keys = zip(points["method"], points["place"], strict=True)
        points["place"] = [f"{visible[key]:.4g}" if key in visible else "" for key in keys]
        if not any(points["place"]):
            raise UserError(f"{files['']}: none of its methods is in the table of the protected pictures")
        xlabel = xlabel or f"how visible the protection is: {VISIBLE[against]}"
    titles = {known.name: known.title for known in METRICS}
    if metric and is_of_faces(metric):
        titles[metric] = title_of(metric)
    xlabel = xlabel or ("budget (L-infinity, [-1, 1])" if by_budget else "")
    save(draw_plot(points, titles.get(metric, metric or "mean"), xlabel), output)
    n_places = len({*points["place"]} - {""})
    print(utils.one_line(f"{output}: {points['method'].nunique()} methods, {n_places} places"))


def read_points(file: Path, metric: str | None, label: str) -> pd.DataFrame:
    """Reads a table's rows: method (the last part of its directory that is no budget), place, value, ends.

    place: on the x axis; empty for a row without one, such as the clean edits among budgets. Raises UserError
    if the file is no table or lacks the metric.
    """
    table = tables.read_csv(file)
    column, ends = metric or "mean", (f"{metric}_low", f"{metric}_high") if metric else ("ci_low", "ci_high")
    wanted = {"method", column, *ends}
    if table.empty or not wanted <= {*table.columns}:
        there = ", ".join(name[:-4] for name in table.columns if name.endswith("_low"))
        raise UserError(f"{file}: no columns {', '.join(sorted(wanted))} (metrics there: {there or 'none'})")
    points = table[["method", column, *ends]].set_axis(["method", "value", "low", "high"], axis=1)
    try:
        points = points.astype({"value": float, "low": float, "high": float})
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    points = points.dropna(subset="value").reset_index(drop=True).assign(place=label)
    tables.check_numbers(file, points[["value", "low", "high"]])
    if ((points["low"] > points["value"]) | (points["high"] < points["value"])).any():
        raise UserError(f"{file}: an interval of {column} doesn't contain its value")
    for at, name in points["method"].items():
        method, budget = parse_row(name)
        points.loc[at, "method"] = f"{method}, {budget}" if label and budget else method
        points.loc[at, "place"] = label or budget
    return points


def draw_plot(points: pd.DataFrame, ylabel: str, xlabel: str) -> Figure:
    """Draws one line per method over numbers, to scale, or points over names; rows without a place dashed."""
    from matplotlib.figure import Figure

    places = [place for place in points["place"].unique() if place]
    to_scale = all(re.fullmatch(NUMBER, place) for place in places)
    at = {place: float(place) if to_scale else number for number, place in enumerate(places)}
    figure = Figure(figsize=(6, 3.5), dpi=DPI)
    axis = figure.subplots()
    points = points.assign(x=points["place"].map(at).astype(float))  # NaN without a place
    methods = points["method"].unique()
    for number, method in enumerate(methods):
        own = points[points["method"] == method].sort_values("x")
        for value in own.loc[own["x"].isna(), "value"]:
            axis.axhline(value, linestyle="--", color="grey", label=utils.one_line(method))
        own = own.dropna(subset="x")
        if len(own):
            beside = 0 if to_scale else 0.5 * ((number + 0.5) / len(methods) - 0.5)
            ends = [(own["value"] - own["low"]).fillna(0), (own["high"] - own["value"]).fillna(0)]
            look = {"marker": "o", "capsize": 3, "linestyle": "-" if to_scale else ""}
            axis.errorbar(own["x"] + beside, own["value"], yerr=ends, label=utils.one_line(method), **look)
    if not to_scale or len(at) <= MOST_TICKS:
        axis.set_xticks(list(at.values()), list(map(utils.one_line, at)), **PLAIN)
    if not to_scale:
        axis.tick_params(axis="x", rotation=30)
    axis.set_xlabel(utils.one_line(xlabel), **PLAIN)
    axis.set_ylabel(utils.one_line(ylabel), **PLAIN)
    for text in axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)).get_texts():
        text.set(**PLAIN)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
