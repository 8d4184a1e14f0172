"""The command that a metric is: its flags, and the way from them to its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import outputs
import tables
from chain import Manifests, check_edits
from directories import find_row
from pairing import Edits, find_edits
from scoring import rows_of, score
from views import FACES, PIXELS, Metric

import models.sets
import utils

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = "torch.Tensor"  # for the metrics' annotations: torch itself takes seconds to import


def script(
    metric: Metric, doc: str, by: dict[str, dict[str, Metric]] | None = None, also: Sequence[Metric] = ()
) -> tuple[Callable[..., argparse.Namespace], Callable[..., int]]:
    """Makes a metric's command: its parse_args and its main.

    by: the metrics among which --by and --what choose. also: is measured with it, for the screen.
    """
    whats = next(iter(by.values())) if by else {metric.name: metric}  # the same of each of --by

    def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = make_parser(doc, metric.name, list(whats.values()))
        if by:
            compared, measured = "whose embeddings are compared", "what is measured of them"
            parser.add_argument("--by", choices=tuple(by), default=next(iter(by)), help=compared)
            parser.add_argument("--what", choices=tuple(whats), default=next(iter(whats)), help=measured)
        return parser.parse_args(argv)

    def run(args: argparse.Namespace) -> int:
        chosen = by[args.by][args.what] if by else metric
        metrics, output = [chosen, *also], args.output or Path(f"{chosen.name}_metric.csv")
        outputs.check_outputs([output, args.per_image])
        edits = edits_of(args)
        baseline = find_row(rows_of(edits, metrics), args.baseline).method if args.baseline else None
        check_edits(edits, Manifests())
        networks = None if is_plain(metrics) else models.sets.choose(args)
        scores = score(edits, metrics, networks, args.batch_size)
        values = scores.values[scores.values["metric"] == chosen.name]
        frame = tables.one_metric(values, baseline, chosen.infinite)
        outputs.write_csv(output, frame)
        if args.per_image:
            outputs.write_csv(args.per_image, values.drop(columns="metric"))
        print(tables.for_screen(frame, chosen.name, baseline))
        print(utils.one_line(f"{output}: {len(edits.prompts)} prompts, {len(frame)} rows"))
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
    table = f"where the table goes, a .csv (default: {name}_metric.csv in the working directory)"
    add("--output", type=utils.path, help=table)
    add("--per_image", type=utils.path, metavar="FILE", help="a CSV with one line an edit, too")
    add("--batch_size", type=utils.positive_int, default=16, help="images that are scored together")
    if "perceptual" in needs:
        models.sets.add_perceptual_argument(parser)
    if "clip_edits" in needs:
        models.sets.add_clip_argument(parser)
    if needs & FACES:
        models.sets.add_face_arguments(parser)
        gallery = "portraits among which a person is looked for, beside the sources"
        add("--gallery_dir", type=utils.path, help=f"{gallery}; one of an edit's stem is the person's, too")
    if is_plain(metrics):
        add("--debug", action="store_true", help="show the traceback of an error")
    else:
        models.sets.add_model_arguments(parser, dtype="fp32")  # a metric is not the place to save
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
    flags = ("clean_edit_dir", "src_dir", "prompts", "prompt_file", "names", "common", "gallery_dir")
    given = {flag: value for flag, value in vars(args).items() if flag in flags}
    return find_edits(args.defend_edit_dirs, args.seed, **given)
