"""Scores edits, reading each file once for all metrics, and makes the command line of a metric."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import models.config
import utils
from evaluation import tables
from evaluation.features import FACE, PIXELS, Features, Metric, load_features, networks, people_of
from evaluation.pairing import Edits, Key, Row, check_edits, find_edits, find_row
from images import load_image, to_tensor
from runs import batches
from utils import UserError

LATEX_HELP = "also write each table as LaTeX (booktabs), a .tex beside it"

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
else:
    Tensor = "torch.Tensor"  # for the metrics' annotations: torch itself takes seconds to import


@dataclass
class Scores:
    """Holds the values, and what could not be measured."""

    metrics: Sequence[Metric]
    values: pd.DataFrame  # method, seed, prompt, name, metric, value; without NaN
    problems: list[str]  # why some values are missing
    n_edits: int  # of each row, that should have been scored
    n_left_out: int  # of them, since they or their source can't be read in some row

    def report(self, what: str = "edits") -> int:
        """Prints what could not be measured -> exit status, 1 if there was any. what: what was scored."""
        for metric in (metric for metric in self.metrics if metric.counts):
            of_metric = self.values[self.values["metric"] == metric.name]
            for row, found in of_metric.groupby("method", observed=True)["value"]:
                if count := int(found.sum()):
                    print(utils.one_line(f"{row}: {metric.counts} {count} of {len(found)} edits"))
        for line in self.problems:
            print(utils.one_line(line), file=sys.stderr)
        if self.n_left_out:
            print(f"{self.n_left_out} of {self.n_edits} {what} are left out of every row", file=sys.stderr)
        return 1 if self.problems else 0


def rows_of(edits: Edits, metrics: Sequence[Metric]) -> list[Row]:
    """Lists the rows of a table: the clean edits are one if something is compared with the sources."""
    return edits.every_row if any(metric.is_of_source for metric in metrics) else edits.rows


def score(
    edits: Edits,
    metrics: Sequence[Metric],
    config: models.config.ModelConfig | None = None,
    batch_size: int = 16,
) -> Scores:
    """Reads each file once and gives it to all metrics; one that can't be read is left out of every row.

    Raises UserError if edits are too small, if instructions are not known, and if nothing can be scored.
    """
    from tqdm import tqdm

    needs = {need for metric in metrics for need in metric.needs}
    smallest = max(metric.smallest for metric in metrics)
    for key, size in edits.sizes.items():
        if size and min(size) < smallest:
            path = edits.path(edits.rows[0], key)
            raise UserError(f"{path} is {size[1]}x{size[0]}; sides of at least {smallest} px are needed")
    if "clip_texts" in needs:
        edits.check_texts()
    texts = {number: edits.texts.get(number, "") for number in edits.prompts}
    features = load_features(needs, config, texts, edits.gallery, edits.references)
    rows, damaged = rows_of(edits, metrics), []
    keys = _add_sources(edits, features, damaged)
    place = {key: number for number, key in enumerate(edits.keys)}
    values = np.full((len(rows), len(edits.keys), len(metrics)), np.nan)
    n_scored = 0
    with tqdm(total=len(keys), unit="edit", leave=False) as bar:
        for batch in batches(keys, batch_size, edits.sizes.get):
            loaded = _read(edits, batch, damaged)
            bar.update(len(batch))
            n_scored += len(loaded)
            if not loaded:
                continue
            at = [place[key] for key in loaded]
            stacks = map(np.stack, zip(*loaded.values(), strict=True))  # (B, H, W, 3) of each row
            images = dict(zip(edits.every_row, stacks, strict=True))
            clean = to_tensor(images[edits.clean]) if "clean" in needs else None
            for number, row in enumerate(rows):
                own = [i for i, one in enumerate(metrics) if one.is_of_source or row != edits.clean]
                found = measure([metrics[i] for i in own], features, images[row], list(loaded), clean)
                for i, value in zip(own, found, strict=True):
                    values[number, at, i] = value.cpu().numpy()
    problems = [problem for one in features for problem in one.problems]
    problems += [f"damaged: {line}" for line in damaged]
    if np.isnan(values).all():
        raise UserError(f"nothing could be scored: {'; '.join(problems[:3])}")
    frame = _long(values, [row.method for row in rows], edits.keys, [metric.name for metric in metrics])
    return Scores(metrics, frame, problems, len(edits.keys), len(edits.keys) - n_scored)


def measure(
    metrics: Sequence[Metric],
    features: Sequence[Features],
    images: np.ndarray,
    keys: Sequence[Key],
    clean: Tensor | None,
) -> list[Tensor]:
    """Measures edits (B, H, W, 3) uint8 by metrics; clean: a tensor or None -> (B,) of each."""
    given = {"edits": to_tensor(images), "clean": clean}
    for one in features:
        given |= one(images, keys)
    return [metric.function(*(given[need] for need in metric.needs)) for metric in metrics]


def _long(
    values: np.ndarray, methods: Sequence[str], keys: Sequence[Key], metrics: Sequence[str]
) -> pd.DataFrame:
    """Converts (rows, edits, metrics) to one line per value; names are categories, to save memory."""
    import pandas as pd

    row, key, metric = np.nonzero(~np.isnan(values))
    types = {"seed": np.int64, "prompt": np.int32, "name": "category"}
    frame = pd.DataFrame(keys, columns=Key._fields, dtype=object).astype(types).iloc[key]
    methods, metrics = (pd.Index(texts, dtype=object) for texts in (methods, metrics))
    frame.insert(0, "method", pd.Categorical.from_codes(row, methods))
    frame["metric"] = pd.Categorical.from_codes(metric, metrics)
    return frame.assign(value=values[row, key, metric]).reset_index(drop=True)


def _add_sources(edits: Edits, features: Sequence[Features], damaged: list[str]) -> list[Key]:
    """Computes features of every source, at the sizes of its edits -> the keys whose source can be read."""
    from tqdm import tqdm

    sizes = defaultdict(set)
    for key, size in edits.sizes.items():
        sizes[key.name].add(size)
    unread = set()
    for name, path in tqdm(edits.sources.items(), unit="source", leave=False, disable=not edits.sources):
        try:
            source = Image.fromarray(load_image(path).pixels)
        except UserError as error:
            damaged.append(str(error))
            unread.add(name)
            continue
        for height, width in sorted(sizes[name] - {None}):
            at_size = source.resize((width, height), Image.Resampling.BICUBIC)  # a copy, if it has that size
            for one in features:
                one.add_source(name, np.array(at_size))
    return [key for key in edits.keys if key.name not in unread]


def _read(edits: Edits, batch: Sequence[Key], damaged: list[str]) -> dict[Key, list[np.ndarray]]:
    """Reads the edits of a batch -> those that can be read in every row: (H, W, 3) of each row."""
    read = {}
    for key in batch:
        found = []
        for row in edits.every_row:
            path = edits.path(row, key)
            try:
                pixels = load_image(path).pixels
                if pixels.shape[:2] != edits.sizes[key]:
                    raise UserError(f"{path}: its size is not what its header says")
                found.append(pixels)
            except UserError as error:
                damaged.append(str(error))
        if len(found) == len(edits.every_row):
            read[key] = found
    return read


# ---------------------------------------------------------------------------------------------------------
# the command line


def script(
    metric: Metric,
    doc: str,
    choose: Callable[[argparse.Namespace, models.config.ModelConfig], list[Metric]] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    also: Sequence[Metric] = (),
) -> tuple[Callable[..., argparse.Namespace], Callable[..., int]]:
    """Makes the command line of a metric: its parse_args and its main.

    choose: selects the metrics to measure in place of `metric`, by flags that `add_arguments` adds; they
    need the same networks. also: further metrics, for the screen only.
    """

    def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = make_parser(doc, metric.name, [metric])
        add_arguments(parser)
        return parser.parse_args(argv)

    def run(args: argparse.Namespace) -> int:
        config = None if is_plain([metric]) else models.config.resolve(models.config.ModelSettings.of(args))
        wanted = choose(args, config) if choose else [metric]
        files = {one.name: Path(f"{one.name}_metric.csv") for one in wanted}
        if args.output:
            several = {one.name: args.output.with_stem(f"{args.output.stem}_{one.name}") for one in wanted}
            files = several if len(wanted) > 1 else {wanted[0].name: args.output}
        tables.check_outputs([*files.values(), args.per_image])
        endings = (".json", ".tex") if args.latex else (".json",)
        others = [tables.beside(file, ending) for file in files.values() for ending in endings]
        tables.check_outputs(others, suffixes=endings)
        by = {one.name: networks([one], config) for one in wanted}
        edits = edits_of(args)
        people = people_of(edits.gallery, edits.references)
        for one in wanted:
            tables.check_networks(files[one.name], by[one.name] | people, "choose another --output")
        baseline = find_row(rows_of(edits, wanted), args.baseline).method if args.baseline else None
        check_edits(edits)
        scores = score(edits, [*wanted, *also], config, args.batch_size)
        for one in wanted:
            file, pairs = files[one.name], None
            values = scores.values[scores.values["metric"] == one.name]
            rows = [row for row in edits.every_row if row.method in values["method"].unique()]
            found, about = tables.means(values), edits.about(rows)
            title = "; ".join([f"{len(edits.prompts)} prompts", *said(by[one.name])])
            parts = tables.all_metrics(found, {title: [one]}, about)[1]
            if baseline:
                pairs, against = tables.differences(values, baseline), tables.method_at(about, baseline)
                groups = {f"minus {against}, in pairs": [one]}
                parts += tables.all_metrics(pairs, groups, about.drop(baseline), "+")[1]
            print(tables.as_page(parts))
            tables.write_csv(file, tables.one_metric(values, found, pairs, one, about))
            measured = by[one.name] | people
            tables.write_beside(file, parts, measured, directories(rows, about), args.latex)
            print(utils.one_line(f"{file}: {len(rows)} rows"))
        if args.per_image:
            about = edits.about(rows_of(edits, wanted))
            tables.write_csv(args.per_image, tables.per_image(scores.values, wanted, about))
        return scores.report()

    def main(argv: Sequence[str] | None = None) -> int:
        return utils.run_command(run, parse_args(argv))

    return parse_args, main


def said(networks: dict[str, str]) -> list[str]:
    """Lists the networks, for the line above a table."""
    return [f"{part}: {names}" for part, names in networks.items()]


def directories(rows: Sequence[Row], about: pd.DataFrame) -> dict[str, Path]:
    """Returns the directory of each row, by the row's name as `tables.row_names` makes it."""
    return dict(zip(tables.row_names(about), (row.directory for row in rows), strict=True))


def is_plain(metrics: Sequence[Metric]) -> bool:
    """Returns whether metrics need no network."""
    return all(set(metric.needs) <= PIXELS for metric in metrics)


def make_parser(doc: str, name: str, metrics: Sequence[Metric]) -> argparse.ArgumentParser:
    """Makes the parser of a script that measures these metrics. name: of its CSV file."""
    needs = {need for metric in metrics for need in metric.needs}
    sources, clean = any(metric.is_of_source for metric in metrics), "clean" in needs
    parser = argparse.ArgumentParser(description=doc, formatter_class=utils.HelpFormatter)
    add = parser.add_argument
    if sources:
        add("--src_dir", type=utils.path, required=True, help="the source images")
    row = ": the row 'clean'" if sources else ""
    add("--clean_edit_dir", type=utils.path, required=clean, help=f"edits of the unprotected images{row}")
    protected = "edits of protected images: each holds seed{S}/, or holds directories that do"
    add("--defend_edit_dirs", type=utils.path, nargs="+", required=True, help=protected)
    add("--seed", type=utils.known_seed, nargs="+", required=True, help="the S of seed{S}, one or more")
    utils.add_prompt_arguments(parser, are_there=True)
    add("--common", action="store_true", help="score the images that all directories have and name the rest")
    add("--baseline", metavar="ROW", help="a row to compare the others with, in pairs")
    add("--output", type=utils.path, help=f"a .csv (default: {name}_metric.csv in the working directory)")
    text = "also write a CSV with one line per value: method, budget, editor, purifier (as far as run.json "
    text += "tells), judge (of faces: a recogniser's name; attacked: the first of those that an attack sees; "
    text += "hardest: the judge who finds most; any: whether any judge does), seed, prompt, name (the file's "
    text += "stem), metric, value"
    add("--per_image", type=utils.path, metavar="FILE", help=text)
    add("--latex", action="store_true", help=LATEX_HELP)
    add("--batch_size", type=utils.positive_int, default=16, help="images that are scored together")
    wanted = ["lpips"] if "perceptual" in needs else []
    wanted += ["clip"] if "clip_edits" in needs else []
    if any(need.startswith(FACE) for need in needs):
        wanted += ["recognizer", "judge"]
        gallery = "portraits among which a person is looked for, beside the sources"
        add("--gallery_dir", type=utils.path, help=f"{gallery}; one with an edit's stem is the same person")
        others = "other photos of the people, NAME.* or NAME/*, which replace the sources in the comparison"
        add("--reference_dir", type=utils.path, help=others)
    if is_plain(metrics):
        add("--debug", action="store_true", help="show the traceback of an error")
    else:
        models.config.add_model_arguments(parser, *wanted, dtype="fp32")  # precision counts in a metric
    return parser


def edits_of(args: argparse.Namespace) -> Edits:
    """Finds the edits that a script's flags name. Raises UserError."""
    flags = ("clean_edit_dir", "src_dir", "prompts", "prompt_file", "names", "common")
    flags += ("gallery_dir", "reference_dir")
    given = {flag: value for flag, value in vars(args).items() if flag in flags}
    return find_edits(args.defend_edit_dirs, args.seed, **given)
