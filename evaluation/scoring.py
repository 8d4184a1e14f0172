"""Scoring: each file is read once and given to all metrics; and the command that a metric is."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import outputs
import tables
from directories import Row, find_row
from pairing import Edits, Key, Manifests, check_edits, find_edits
from PIL import Image
from views import FACE, PIXELS, Metric, View, load_views

import models.config
import utils
from images import load_image, to_tensor
from runs import batches
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
else:
    Tensor = "torch.Tensor"  # for the metrics' annotations: torch itself takes seconds to import


@dataclass
class Scores:
    """The values, and what could not be measured."""

    metrics: Sequence[Metric]
    values: pd.DataFrame  # method, seed, prompt, name, metric, value; without NaN
    damaged: list[str]  # what can't be read
    problems: list[str]  # other reasons for what isn't there
    n_edits: int  # of each row, that should have been scored
    n_left_out: int  # of them, since they or their source can't be read in some row

    def report(self, what: str = "edits") -> int:
        """Says what could not be measured -> exit status: 1 if there is anything. what: is scored."""
        for metric in (metric for metric in self.metrics if metric.counts):
            of_metric = self.values[self.values["metric"] == metric.name]
            for row, found in of_metric.groupby("method", observed=True)["value"]:
                if count := int(found.sum()):
                    print(utils.one_line(f"{row}: {metric.counts} {count} of {len(found)} edits"))
        for line in (*self.problems, *(f"damaged: {line}" for line in self.damaged)):
            print(utils.one_line(line), file=sys.stderr)
        if self.n_left_out:
            print(f"{self.n_left_out} of {self.n_edits} {what} are left out of every row", file=sys.stderr)
        return 1 if self.damaged or self.problems else 0


def rows_of(edits: Edits, metrics: Sequence[Metric]) -> list[Row]:
    """Lists the rows of a table: the clean edits are one where something is compared with the sources."""
    return edits.every_row if any(metric.is_of_source for metric in metrics) else edits.rows


def score(
    edits: Edits,
    metrics: Sequence[Metric],
    config: models.config.ModelConfig | None = None,
    batch_size: int = 16,
) -> Scores:
    """Reads each file once and gives it to all metrics; one that can't be read is left out of every row.

    Raises UserError for edits too small, instructions that are not known, and if nothing can be scored.
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
    views = load_views(needs, config, texts, edits.gallery, edits.references)
    rows, damaged = rows_of(edits, metrics), []
    keys = _learn_sources(edits, views, damaged)
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
            of_rows = zip(edits.every_row, map(np.stack, zip(*loaded.values(), strict=True)), strict=True)
            images = dict(of_rows)  # (B, H, W, 3) each
            clean = to_tensor(images[edits.clean]) if "clean" in needs else None
            for number, row in enumerate(rows):
                own = [i for i, one in enumerate(metrics) if one.is_of_source or row != edits.clean]
                found = measure([metrics[i] for i in own], views, images[row], list(loaded), clean)
                for i, value in zip(own, found, strict=True):
                    values[number, at, i] = value.cpu().numpy()
    problems = [problem for view in views for problem in view.problems]
    if np.isnan(values).all():
        raise UserError(f"nothing could be scored: {'; '.join([*damaged, *problems][:3])}")
    frame = _long(values, [row.method for row in rows], edits.keys, [metric.name for metric in metrics])
    return Scores(metrics, frame, damaged, problems, len(edits.keys), len(edits.keys) - n_scored)


def measure(
    metrics: Sequence[Metric], views: Sequence[View], images: np.ndarray, keys: Sequence[Key], clean: Any
) -> list[Tensor]:
    """Gives edits (B, H, W, 3) uint8, and the clean ones as a tensor or None, to metrics -> (B,) of each."""
    seen = {"edits": to_tensor(images), "clean": clean}
    for view in views:
        seen |= view(images, keys)
    return [metric.function(*(seen[need] for need in metric.needs)) for metric in metrics]


def _long(
    values: np.ndarray, methods: Sequence[str], keys: Sequence[Key], metrics: Sequence[str]
) -> pd.DataFrame:
    """(rows, edits, metrics) -> a line a value; categories, in this order, which cost a byte or two each."""
    import pandas as pd

    def category(texts: Sequence[str], codes: np.ndarray) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, pd.Index(texts, dtype=object))

    row, key, metric = np.nonzero(~np.isnan(values))
    seeds, prompts, names = zip(*keys, strict=True)
    code, names = pd.factorize(np.array(names, dtype=object), sort=True)
    columns = {
        "method": category(methods, row),
        "seed": np.array(seeds)[key],
        "prompt": np.array(prompts, dtype=np.int32)[key],
        "name": category(names, code[key]),
        "metric": category(metrics, metric),
        "value": values[row, key, metric],
    }
    return pd.DataFrame(columns)


def _learn_sources(edits: Edits, views: Sequence[View], damaged: list[str]) -> list[Key]:
    """Shows every source to the views, at the sizes of its edits -> the keys whose source can be read."""
    from tqdm import tqdm

    wanted = defaultdict(set)
    for key, size in edits.sizes.items():
        wanted[key.name].add(size)
    unread = set()
    for name, path in tqdm(edits.sources.items(), unit="source", leave=False, disable=not edits.sources):
        try:
            source = Image.fromarray(load_image(path).pixels)
        except UserError as error:
            damaged.append(str(error))
            unread.add(name)
            continue
        for height, width in sorted(wanted[name] - {None}):
            at_size = source.resize((width, height), Image.Resampling.BICUBIC)  # none, if it has that size
            for view in views:
                view.add_source(name, np.array(at_size))
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


def script(
    metric: Metric,
    doc: str,
    asked: Callable[[argparse.Namespace, models.config.ModelConfig], list[Metric]] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    also: Sequence[Metric] = (),
) -> tuple[Callable[..., argparse.Namespace], Callable[..., int]]:
    """Makes a metric's command: its parse_args and its main.

    asked: makes of flags, which `add_arguments` adds, the metrics that are measured instead, like `metric` in
    what they need. also: is measured with them, for the screen.
    """

    def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = make_parser(doc, metric.name, [metric])
        add_arguments(parser)
        return parser.parse_args(argv)

    def run(args: argparse.Namespace) -> int:
        config = None if is_plain([metric]) else models.config.resolve(models.config.ModelSettings.of(args))
        wanted = asked(args, config) if asked else [metric]
        files = {one.name: Path(f"{one.name}_metric.csv") for one in wanted}
        if args.output:
            several = {one.name: args.output.with_stem(f"{args.output.stem}_{one.name}") for one in wanted}
            files = several if len(wanted) > 1 else {wanted[0].name: args.output}
        outputs.check_outputs([*files.values(), args.per_image])
        edits = edits_of(args)
        baseline = find_row(rows_of(edits, wanted), args.baseline).method if args.baseline else None
        check_edits(edits, Manifests())
        scores = score(edits, [*wanted, *also], config, args.batch_size)
        for one in wanted:
            values = scores.values[scores.values["metric"] == one.name]
            frame = tables.one_metric(values, baseline, one.infinite)
            outputs.write_csv(files[one.name], frame)
            print(tables.for_screen(frame, one.name, baseline))
            print(utils.one_line(f"{files[one.name]}: {len(edits.prompts)} prompts, {len(frame)} rows"))
        if args.per_image and len(wanted) == 1:
            outputs.write_csv(args.per_image, values.drop(columns="metric"))
        elif args.per_image:
            outputs.write_csv(args.per_image, tables.per_image(scores.values, list(files)))
        return scores.report()

    def main(argv: Sequence[str] | None = None) -> int:
        return utils.run_command(run, parse_args(argv))

    return parse_args, main


def is_plain(metrics: Sequence[Metric]) -> bool:
    """Tells whether metrics do without any network."""
    return all(set(metric.needs) <= PIXELS for metric in metrics)


def make_parser(doc: str, name: str, metrics: Sequence[Metric]) -> argparse.ArgumentParser:
    """Makes the flags of a script that measures these metrics. name: of its CSV file."""
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
    add_prompt_arguments(parser)
    add("--common", action="store_true", help="score the images that all directories have and name the rest")
    add("--baseline", metavar="ROW", help="a row that the others are compared with, in pairs")
    add("--output", type=utils.path, help=f"a .csv (default: {name}_metric.csv in the working directory)")
    add("--per_image", type=utils.path, metavar="FILE", help="a CSV with one line an edit, too")
    add("--batch_size", type=utils.positive_int, default=16, help="images that are scored together")
    if "perceptual" in needs:
        models.config.add_perceptual_argument(parser)
    if "clip_edits" in needs:
        models.config.add_clip_argument(parser)
    if any(need.startswith(FACE) for need in needs):
        models.config.add_face_arguments(parser)
        gallery = "portraits among which a person is looked for, beside the sources"
        add("--gallery_dir", type=utils.path, help=f"{gallery}; one of an edit's stem is the person's, too")
        others = "other photos of the people, NAME.* or NAME/*, which count instead of the sources"
        add("--reference_dir", type=utils.path, help=others)
    if is_plain(metrics):
        add("--debug", action="store_true", help="show the traceback of an error")
    else:
        models.config.add_model_arguments(parser, dtype="fp32")  # a metric is not the place to save
    return parser


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --prompts and --prompt_file, of whatever reads edits."""
    numbers = "numbers of the instructions (default: all that were edited)"
    parser.add_argument("--prompts", type=utils.number_list, metavar="I,J,...", help=numbers)
    default = "default: as the run.json of the edits has them, else the paper's"
    texts = f"the instructions' texts, one a line, numbered from 0 ({default})"
    parser.add_argument("--prompt_file", type=utils.path, help=texts)


def edits_of(args: argparse.Namespace) -> Edits:
    """Finds the edits that a script's flags name. Raises UserError."""
    flags = ("clean_edit_dir", "src_dir", "prompts", "prompt_file", "names", "common")
    flags += ("gallery_dir", "reference_dir")
    given = {flag: value for flag, value in vars(args).items() if flag in flags}
    return find_edits(args.defend_edit_dirs, args.seed, **given)
