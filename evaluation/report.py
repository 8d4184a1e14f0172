"""One HTML file for an experiment: what came out, the table, plots, pictures, and how it was made.

    python evaluation/report.py --experiment_dir experiment/methods --output report.html

Reads what experiment.py or eval_all.py wrote into a directory: per_image.csv, all_metric.csv (one of the two
is needed), all_metric_protected.csv, purified/*/all_metric.csv, each run.json, the pictures in edits/ and
protected/. Results of another project in this layout work, too; the page lists what is missing. The script
measures nothing. The HTML file needs no other file, and the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if not __package__:  # run as a file
    import _path  # noqa: F401

import utils
from evaluation import tables
from evaluation.eval_all import METRICS, VISIBILITY
from evaluation.eval_facial import NO_FACE, is_of_faces, title_of
from evaluation.figure import difference
from evaluation.pairing import parse_row
from evaluation.summary import knowing_attacker, row_name, told_apart
from evaluation.tables import EDIT
from images import images_by_stem, load_image
from runs import MANIFEST, digest, read_record
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from evaluation.features import Metric

PLACE = ["method", "metric"]
MEANS = {"": "mean", "_low": "low", "_high": "high", "_n": "n", "_n_inf": "n_inf"}
LEAD = ("left", "facial_judge", "facial")  # what the page goes by: the first that is there
MOST_DOTS = 200  # people in a strip
TONES = 8  # colours and shapes
SIDE, CROP = 176, 256  # px of a picture in the page, and of one in which single pixels count

Means = dict[tuple[str, str], Any]  # by method and metric: mean, low, high, n, n_inf


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--experiment_dir", type=utils.path, required=True, help="what experiment.py left")
    parser.add_argument("--output", type=utils.path, default=Path("report.html"), help="an .html file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(lambda args: make_report(args.experiment_dir, args.output), parse_args(argv))


def make_report(root: Path, output: Path) -> int:
    """Writes the report on an experiment's directory -> exit status. Raises UserError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    tables.check_outputs([output], suffixes=(".html",))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: utils.one_line(value) if type(value) is str else value,  # Markup is another
    )
    environment.globals |= {"spread": spread, "most_dots": MOST_DOTS, "nan": math.nan}
    page = environment.get_template("report.html.jinja").render(report=Report(root))
    utils.write_own(output, page.encode(errors="replace"))
    print(utils.one_line(f"{output}: the report; open it in a browser"))
    return 0


# ---------------------------------------------------------------------------------------------------------
# reading


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Escapes bytes in names that are not UTF-8, which pandas and HTML refuse."""
    for column in {"method", "name"} & {*frame.columns}:
        frame[column] = frame[column].map(lambda name: name.encode(errors="backslashreplace").decode())
    return frame


def read_values(path: Path) -> pd.DataFrame:
    """Reads per_image.csv -> method, seed, prompt, name, metric, value. Raises UserError."""
    import numpy as np
    import pandas as pd

    nothing = pd.DataFrame({key: [] for key in (*EDIT, "metric", "value")})
    frame = readable(tables.read_values(path)) if path.exists() else nothing
    if frame.duplicated([*EDIT, "metric"]).any():
        raise UserError(f"{path}: an edit has two values of one metric")
    finite = frame.loc[np.isfinite(frame["value"]), ["value"]]  # PSNR of the same picture is infinite
    tables.check_numbers(path, finite)
    return frame.dropna(subset="value").astype(dict.fromkeys(("method", "name", "metric"), "category"))


def read_means(path: Path, values: pd.DataFrame | None = None) -> Means:
    """Reads a table of means, adds missing ones from the values. Raises UserError if they disagree."""
    import numpy as np
    import pandas as pd

    table = readable(tables.read_csv(path)) if path.exists() else pd.DataFrame({"method": []})
    if "method" not in table:
        raise UserError(f"{path}: no column method in it")
    found: Means = {}
    for name in table.columns:
        if name != "method" and not re.search(r"_(low|high|n|n_inf)$", name):
            part = table.reindex(columns=[f"{name}{end}" for end in MEANS]).set_axis(MEANS.values(), axis=1)
            numbers = part.apply(pd.to_numeric, errors="coerce")
            tables.check_numbers(path, numbers)
            lines = numbers.itertuples()
            found |= {(method, name): line for method, line in zip(table["method"], lines, strict=True)}
    if values is not None and len(values):
        for key, mean in tables.image_means(values, PLACE).groupby(PLACE, observed=True).mean().items():
            if key in found and not np.isclose(mean, found[key].mean, rtol=1e-3, atol=1e-4):
                what = f"{key[1]} of {key[0]} is {found[key].mean:g} here, {mean:g} there"
                raise UserError(f"{path}: not of the same run as per_image.csv: {what}")
        rest = values[~pd.MultiIndex.from_frame(values[PLACE]).isin(list(found))]
        found |= as_means(tables.means(rest)) if len(rest) else {}
    return {key: line for key, line in found.items() if not math.isnan(line.mean)}


def as_means(frame: pd.DataFrame) -> Means:
    return {line.Index: line for line in frame.itertuples() if not math.isnan(line.mean)}


def read_records(root: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Reads every run.json -> records by directory, and the errors of damaged ones."""
    found, damaged = {}, []
    for path in sorted(root.rglob("run.json")):
        try:
            found[path.parent.relative_to(root).as_posix()] = read_record(path.parent) or {}
        except UserError as error:
            damaged.append(str(error))
    return found, damaged


# ---------------------------------------------------------------------------------------------------------
# rows and columns


class Row(NamedTuple):
    """Holds a row of the tables: its name there and on the page. tone: its colour and shape."""

    method: str
    name: str
    budget: str  # empty if it has none
    kind: str  # clean, cheat or method
    tone: int

    @property
    def label(self) -> str:
        return "unprotected" if self.kind == "clean" else f"{self.name} {self.budget}".strip()


class Column(NamedTuple):
    """Holds a metric as it is shown. way: -1 if a defender wants it low, 1 if high, 0 if unknown."""

    name: str
    title: str
    digits: int
    way: int
    is_share: bool  # of edits: its values are 0 or 1

    @property
    def kind(self) -> str:
        """Returns the name without that of a recogniser."""
        return self.name.partition("_")[0] if is_of_faces(self.name) else self.name

    def show(self, value: float, sign: str = "") -> str:
        if self.is_share and not math.isnan(value):
            return f"{100 * value:{sign}.0f} %"
        return tables.shown(value, self.digits, sign)

    def ends(self, line: Any, sign: str = "") -> str:
        """Writes the interval of a mean, and how many values were infinite."""
        ends = "" if math.isnan(line.low) else f"[{self.show(line.low, sign)}, {self.show(line.high, sign)}]"
        return ends + (f" ({line.n_inf:.0f} inf)" if line.n_inf > 0 else "")


def name_rows(found: Means, directories: dict[str, Any]) -> list[Row]:
    """Names rows by method and budget; by the whole name if two are the same."""
    rows: list[Row] = []
    for method in dict.fromkeys(method for method, _ in found):
        is_cheat = Path(str(directories.get(method, method))).parent.name == "cheats"
        kind = "clean" if method == "clean" else "cheat" if is_cheat else "method"
        rows.append(Row(method, *parse_row(method), kind, 0))
    labels = [row.label for row in rows]
    rows = [row._replace(name=row.method) if labels.count(row.label) > 1 else row for row in rows]
    tones = list(dict.fromkeys(["clean", *(row.name for row in rows)]))
    return [row._replace(tone=tones.index(row.name) % TONES) for row in rows]


def name_columns(found: Means, known: Sequence[Metric], values: pd.DataFrame) -> list[Column]:
    """Lists the metrics: those of the panel, others, each judge's, the attacked recogniser's."""
    there = dict.fromkeys(name for _, name in found)
    metrics, columns = {metric.name: metric for metric in known}, []
    in_order = [name for name in metrics if name in there] + [name for name in there if name not in metrics]
    for name in sorted(in_order, key=place_of):
        metric, own = metrics.get(name), values.loc[values["metric"] == name, "value"]
        title = title_of(name) if is_of_faces(name) else metric.title if metric else name
        digits = metric.digits if metric else 3
        is_share = len(own) and own.isin([0, 1]).all() and (not metric or own.any())
        is_share = is_share or (metric and metric.counts) or name.startswith(("recognised", "identified"))
        columns.append(Column(name, title, digits, {"↓": -1, "↑": 1}.get(title[-1:], 0), bool(is_share)))
    return columns


def place_of(name: str) -> int:
    """Orders columns as eval_all.py does: those of the panel, others, each judge's, the attacked one's."""
    if name == "left" or name.endswith("_by_any"):
        return 0
    if not is_of_faces(name):
        return 1 if name == NO_FACE.name else 2
    return 3 if "_" in name else 4


def recogniser_of(name: str) -> str:
    """Names the recogniser of a column; "" of those of the panel and of other metrics."""
    return (name.partition("_")[2] or "the attacked recogniser") if place_of(name) > 2 else ""


# ---------------------------------------------------------------------------------------------------------
# the page


class Report:
    """Holds what the template shows of an experiment; the prose is in the template. Raises UserError."""

    def __init__(self, root: Path) -> None:
        self.root, self.title = root, root.resolve().name
        files = [root / name for name in ("per_image.csv", "all_metric.csv", "all_metric_protected.csv")]
        purified = sorted(root.glob("purified/*/all_metric.csv"))
        there = [file for file in files + purified if file.exists()]
        self.hashes = {str(file.relative_to(root)): digest(file) for file in there}
        values = self.values = read_values(files[0])
        self.found, self.visible = read_means(files[1], values), read_means(files[2])
        if not self.found:
            raise UserError(f"{root}: no values in a per_image.csv or all_metric.csv")
        self.purified = {file.parent.name: read_means(file) for file in purified}
        self.records, self.damaged = read_records(root)

        self.directories = tables.read_about(root / "all_metric.json").get("rows", {})
        self.rows = name_rows(self.found, self.directories)
        self.columns = name_columns(self.found, [*METRICS, NO_FACE], values)
        self.seen_rows = name_rows(self.visible, {})
        self.seen_columns = name_columns(self.visible, VISIBILITY, values[:0])
        self.main = [column for name in LEAD for column in self.columns if column.name == name]
        if self.main and self.main[0].name == "left":  # and beside it each judge's
            self.main = [column for column in self.columns if column.kind == "left"]
        if not self.main:
            self.main = ([column for column in self.columns if column.way] or self.columns)[:1]
        self.lead = self.main[0]
        of_lead = self.lead.name.replace("facial", "recognised")
        still = "recognised_by_any" if self.lead.name == "left" else of_lead
        same = [column for column in self.columns if column.name == still != self.lead.name]
        self.still = same[0] if same else None
        self.clean = [row for row in self.rows if row.kind == "clean"]  # one or none
        marks = self.marks(self.lead, (row for row in self.rows if row.kind == "method"))
        self.methods = [mark["row"] for mark in marks]
        best = max(marks, key=lambda mark: self.lead.way * mark["value"], default=None)
        self.best = best and best["row"]
        names = [row.name for row in self.methods]  # in plots of many lines and in pictures
        self.shown = self.clean + [
            row for row in self.methods if row.budget in ("", self.best.budget) or names.count(row.name) == 1
        ]
        self.few = tables.about_intervals(mark["n"] for mark in marks)
        has_pairs = self.clean and len(values) and len(self.rows) > 1
        self.minus = as_means(tables.differences(values, "clean")) if has_pairs else {}
        self.names, self.prompts, self.seeds = (sorted(values[key].unique()) for key in EDIT[:0:-1])
        self.people = {column.name: self.of_people(column) for column in self.main}
        of_lead = self.people[self.lead.name]
        after = of_lead.get(self.best.method, {}) if self.best else {}
        before = of_lead.get("clean", {}) if self.clean else dict.fromkeys(after, 0)
        moved = [(after[name] - before[name], name) for name in after if name in before]
        self.moved = sorted(moved, reverse=self.lead.way > 0)  # the best protected first
        self.folders: dict[Path, dict[str, Path]] = {}
        records = self.records.items()
        said = {i: text for _, record in records for i, text in record.get("prompts", {}).items()}
        self.texts = {prompt: str(said.get(str(prompt), f"prompt {prompt}")) for prompt in self.prompts}
        sources = [record.get("sources") for at, record in records if at.startswith("edits/clean")]
        self.sources = Path(str(sources[0])) if sources else root / "portraits"

    def of_people(self, column: Column) -> dict[str, dict[str, float]]:
        """Computes each person's mean, by method and name."""
        means = tables.image_means(self.values[self.values["metric"] == column.name], ["method"])
        groups = means.groupby("method", observed=True)
        return {method: of.droplevel("method").to_dict() for method, of in groups}

    def second(self) -> tuple[Row, str] | None:
        """Finds the second best method, and whether the best can be told apart from it, in words."""
        rivals = [row.method for row in self.methods]
        there = self.values.loc[self.values["metric"] == self.lead.name, "method"].unique()
        if len(rivals) < 2 or not {*rivals} <= {*there}:
            return None
        _, second, pairs = tables.best_two(self.values, self.lead.name, rivals, self.lead.way)
        size = f"{self.lead.show(pairs.mean, '+')} {self.lead.ends(pairs, '+')}".rstrip()
        return next(row for row in self.methods if row.method == second), told_apart(size, pairs)

    def knowing(self) -> float | None:
        """Computes what the best method leaves to an attacker who picks a purification for each picture."""
        roots = {name: self.root / "purified" / name for name in self.purified} | {"none": self.root}
        if self.lead.name != "left" or not all((root / "per_image.csv").exists() for root in roots.values()):
            return None
        return knowing_attacker(roots).get(row_name(self.best.method))

    def tables(self, columns: Sequence[Column]) -> dict[str, list[Column]]:
        """Groups columns into tables: the headline, "", and one for each recogniser."""
        groups: dict[str, list[Column]] = {"": []}
        for column in columns:
            groups.setdefault(recogniser_of(column.name), []).append(column)
        return groups

    def is_best(self, row: Row, column: Column) -> bool:
        """Returns whether a method's interval is better than, and apart from, all others' of its budget."""
        rivals = [other for other in self.methods if other.budget == row.budget and other != row]
        own, *others = (self.found.get((one.method, column.name)) for one in (row, *rivals, *self.clean))
        if not (own and column.way and rivals and row in self.methods):
            return False
        return all(own.high < line.low if column.way < 0 else own.low > line.high for line in others if line)

    # plots: panels of lines, which have a label, marks and dots

    def marks(self, column: Column, rows: Iterable[Row], means: Means | None = None) -> list[dict[str, Any]]:
        """Lists means as points, each with a description in words."""
        found = self.found if means is None else means
        return [
            {"row": row, "value": line.mean, "low": line.low, "high": line.high, "n": line.n}
            | {"text": f"{row.label}: {column.show(line.mean)} {column.ends(line)}"}
            for row in rows
            if (line := found.get((row.method, column.name)))
        ]

    def strips(self, column: Column) -> Iterable[tuple[Any, ...]]:
        for row in self.rows:
            people = sorted(
                (value, name) for name, value in self.people[column.name].get(row.method, {}).items()
            )
            if marks := self.marks(column, [row]):
                yield row.label, marks, spread(people, MOST_DOTS)

    def budgets(self, column: Column) -> Iterable[tuple[Any, ...]]:
        rows = sorted((row for row in self.methods if row.budget), key=lambda row: float(row.budget))
        if len(rows) > len({row.name for row in rows}):
            for name in dict.fromkeys(row.name for row in rows):
                yield name, self.marks(column, [row for row in rows if row.name == name]), []

    def purifications(self, column: Column) -> Iterable[tuple[Any, ...]]:
        tones = {row.label: row.tone for row in self.shown}
        for name, means in {"as they are": self.found, **self.purified}.items() if self.purified else ():
            rows = [row._replace(tone=tones[row.label]) for row in name_rows(means, {}) if row.label in tones]
            yield name, self.marks(column, rows, means), []

    def instructions(self, column: Column) -> Iterable[tuple[Any, ...]]:
        values = self.values[self.values["metric"] == column.name]
        values = values[values["method"].isin([row.method for row in self.shown])]
        for prompt in self.prompts if len(self.prompts) > 1 else ():
            means = as_means(tables.means(values[values["prompt"] == prompt]))
            yield self.texts[prompt], self.marks(column, self.shown, means), []

    def panels(self, key: str) -> tuple[list[Any], list[float]]:
        """Makes a plot's panels, and round ticks for their shared axis, which ends at the first and last."""
        from matplotlib.ticker import MaxNLocator

        panels = [(column, lines) for column in self.main if (lines := list(getattr(self, key)(column)))]
        numbers = [value for _, lines in panels for _, _, dots in lines for value, _ in dots]
        marks = [mark for _, lines in panels for _, marks, _ in lines for mark in marks]
        numbers += [x for mark in marks for x in map(mark.get, ("value", "low", "high")) if math.isfinite(x)]
        low, high = min(numbers, default=0), max(numbers, default=1)
        aside = 0.05 * (high - low < 1e-6)
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low - aside, high + aside)
        return panels, [float(f"{tick:.9g}") for tick in ticks]

    # pictures: "" for one that isn't there

    def folder(self, kind: str, row: Row) -> Path:
        """Looks for a row's pictures in the experiment, by the end of the row's path, then at that path."""
        if kind == "protected" and row.kind == "clean":
            return self.sources
        named = Path(str(self.directories.get(row.method, row.method)))
        parts = [part for part in named.parts if part not in ("/", "..")]
        places = [self.root.joinpath(kind, *parts[start:]) for start in range(len(parts))]
        places += [named] if kind == "edits" else []
        return next((place for place in places if place.is_dir()), self.root / "nowhere")

    def pixels(self, folder: Path, name: str) -> np.ndarray | None:
        """Reads a picture, (H, W, 3) uint8."""
        with contextlib.suppress(UserError, KeyError):
            if folder not in self.folders:
                self.folders[folder] = images_by_stem(folder)
            return load_image(self.folders[folder][name]).pixels
        return None

    def pictures(self, row: Row, name: str, prompts: Sequence[int]) -> list[str]:
        """Packs a person's picture, as it was edited, and its edits, all small."""
        edits = self.folder("edits", row) / f"seed{self.seeds[0]}"
        folders = [self.folder("protected", row), *(edits / f"prompt{prompt}" for prompt in prompts)]
        return [packed(self.pixels(folder, name), "JPEG") for folder in folders]

    def crops(self, row: Row, name: str) -> list[str]:
        """Packs the middle of a picture as it is, and what protection added to it."""
        image, source = self.pixels(self.folder("protected", row), name), self.pixels(self.sources, name)
        same = image is not None and source is not None and image.shape == source.shape
        added = [difference(image, source)] if same and row.kind != "clean" else []
        return [packed(pixels, "PNG") for pixels in (image, *added)]

    # how it was made

    def said(self, part: str) -> dict[str, list[tuple[str, str]]]:
        """Groups directories, each with its manifest's hash, by a part of their run.json."""
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for where, record in self.records.items():
            settings = record["arguments"] | {"seed": record.get("seed")}
            said = (record | {"settings": settings}).get(part)
            text = re.sub(r'["{}]', "", json.dumps(said, sort_keys=True))
            if part == "command" and isinstance(said, list):
                text = shlex.join(["python", *map(str, said)])
            found[text].append((where, digest(self.root / where / MANIFEST)))
        return found


def packed(pixels: np.ndarray | None, form: str) -> str:
    """Encodes a picture as a data URL: shrunk as JPEG, or its middle as PNG."""
    from PIL import Image

    if pixels is None:
        return ""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if form == "JPEG":
        image.thumbnail((SIDE, SIDE))
    left, top = (max(0, side - CROP) // 2 for side in image.size)
    image = image.crop((left, top, min(left + CROP, image.width), min(top + CROP, image.height)))
    image.save(buffer, format=form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Picks at most `most` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


if __name__ == "__main__":
    sys.exit(main())
