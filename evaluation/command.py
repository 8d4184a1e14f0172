"""The command that a metric is: its flags, and the way from them to its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import outputs
import tables
from chain import Manifests, check_edits
from directories import find_row
from pairing import Edits, find_edits
from scoring import rows_of, score
from views import FACES, PIXELS, Metric

import models.sets
import utils


def script(
    metric: Metric, doc: str, by: dict[str, dict[str, Metric]] | None = None, also: Sequence[Metric] = ()
) -> tuple[Callable[..., argparse.Namespace], Callable[..., int]]:
    """Makes a metric's command: its parse_args and its main.

    by: the metrics among which --by and --what choose. also: is measured with it, for the screen.
    """
    parse = partial(_parse, metric, doc, by)

    def main(argv: Sequence[str] | None = None) -> int:
        args = parse(argv)
        chosen = by[args.by][args.what] if by else metric
        return utils.run_command(partial(_run, metrics=[chosen, *also]), args)

    return parse, main


def _parse(
    metric: Metric,
    doc: str,
    by: dict[str, dict[str, Metric]] | None,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    of_by = list(next(iter(by.values())).values()) if by else [metric]
    parser = make_parser(doc, metric.name, of_by)
    if by:
        parser.add_argument(
            "--by", choices=tuple(by), default=next(iter(by)), help="whose embeddings are compared"
        )
        whats = list(next(iter(by.values())))
        parser.add_argument("--what", choices=whats, default=whats[0], help="what is measured of them")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace, metrics: Sequence[Metric]) -> int:
    """Scores what the flags name by one metric, and those that go with it -> exit status."""
    metric = metrics[0]
    output = args.output or Path(f"{metric.name}_metric.csv")
    outputs.check_outputs([output, args.per_image])
    edits = edits_of(args)
    baseline = find_row(rows_of(edits, metrics), args.baseline).method if args.baseline else None
    check_edits(edits, Manifests())
    scores = score(edits, metrics, None if is_plain(metrics) else models.sets.choose(args), args.batch_size)
    values = scores.values[scores.values["metric"] == metric.name]
    frame = tables.one_metric(values, baseline, metric.infinite)
    outputs.write_csv(output, frame)
    if args.per_image:
        outputs.write_csv(args.per_image, values.drop(columns="metric"))
    print(tables.for_screen(frame, metric.name, baseline))
    print(utils.one_line(f"{output}: {len(edits.prompts)} prompts, {len(frame)} rows"))
    return scores.report()


def is_plain(metrics: Sequence[Metric]) -> bool:
    """Tells whether metrics do without any network."""
    return all(set(metric.needs) <= PIXELS for metric in metrics)


def make_parser(doc: str, name: str, metrics: Sequence[Metric]) -> argparse.ArgumentParser:
    """Makes the flags of a script that measures these metrics. name: of its CSV file."""
    needs = {need for metric in metrics for need in metric.needs}
    sources, clean = any(metric.is_of_source for metric in metrics), "clean" in needs
    parser = argparse.ArgumentParser(description=doc, formatter_class=utils.HelpFormatter)
    if sources:
        parser.add_argument("--src_dir", type=utils.path, required=True, help="the source images")
    row = ": the row 'clean'" if sources else ""
    parser.add_argument(
        "--clean_edit_dir", type=utils.path, required=clean, help=f"edits of the unprotected images{row}"
    )
    parser.add_argument(
        "--defend_edit_dirs",
        type=utils.path,
        nargs="+",
        required=True,
        help="edits of protected images: each holds seed{S}/, or holds directories that do",
    )
    parser.add_argument(
        "--seed", type=utils.known_seed, nargs="+", required=True, help="the S of seed{S}, one or more"
    )
    add_prompt_arguments(parser)
    parser.add_argument(
        "--common", action="store_true", help="score the images that all directories have and name the rest"
    )
    parser.add_argument("--baseline", metavar="ROW", help="a row that the others are compared with, in pairs")
    parser.add_argument(
        "--output",
        type=utils.path,
        help=f"where the table goes, a .csv (default: {name}_metric.csv in the working directory)",
    )
    parser.add_argument(
        "--per_image", type=utils.path, metavar="FILE", help="a CSV with one line an edit, too"
    )
    parser.add_argument(
        "--batch_size", type=utils.positive_int, default=16, help="images that are scored together"
    )
    if "perceptual" in needs:
        models.sets.add_perceptual_argument(parser)
    if "clip_edits" in needs:
        models.sets.add_clip_argument(parser)
    if needs & FACES:
        models.sets.add_face_arguments(parser)
        parser.add_argument(
            "--gallery_dir",
            type=utils.path,
            help="portraits among which a person is looked for, beside the sources; one of an edit's stem is "
            "the person's, too",
        )
    if is_plain(metrics):
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    else:
        models.sets.add_model_arguments(parser, dtype="fp32")  # a metric is not the place to save
    return parser


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --prompts and --prompt_file, of whatever reads edits."""
    parser.add_argument(
        "--prompts",
        type=utils.number_list,
        metavar="I,J,...",
        help="numbers of the instructions (default: all that were edited)",
    )
    parser.add_argument(
        "--prompt_file",
        type=utils.path,
        help="the instructions' texts, one a line, numbered from 0 (default: as the run.json of the edits "
        "has them, else the paper's)",
    )


def edits_of(args: argparse.Namespace) -> Edits:
    """Finds the edits that the flags of `make_parser` name. Raises UserError."""
    return find_edits(
        args.defend_edit_dirs,
        args.seed,
        clean_edit_dir=args.clean_edit_dir,
        src_dir=vars(args).get("src_dir"),
        prompts=args.prompts,
        prompt_file=args.prompt_file,
        common=args.common,
        gallery_dir=vars(args).get("gallery_dir"),
    )
