"""Every metric at once, each file read once: the paper's table for your directories.

    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/noise edits/encoder edits/facelock --seed 0
    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean --seed 0 1 2 \\
        --defend_edit_dirs edits/noise edits/facelock --baseline edits/noise \\
        --protected_dirs protected/noise protected/facelock --output tables/main.csv

Writes all_metric.csv and all_metric.md: one row for the unprotected edits and one per method, each value with
a 95 % interval; and all_metric.json, which names the networks that measured (a table made with other networks
is not replaced). The first table has left, by the judge that finds most; recognised and identified, by any
judge; the share of edits without a face; CLIP-S, PSNR, SSIM, LPIPS and CLIP-I. Then come a table for each
judge and one for the recognisers that attacks see. An arrow shows the direction that a defender wants.
--baseline adds paired differences (..._minus_baseline.csv), --protected_dirs how visible each protection is
(..._protected.csv); without these flags, such files of an earlier run are removed.
What each metric can be trusted for: docs/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    import _path  # noqa: F401

import models.config
import utils
from evaluation import (
    eval_clip_i,
    eval_clip_s,
    eval_facial,
    eval_lpips,
    eval_psnr,
    eval_ssim,
    tables,
)
from evaluation.features import Metric, networks, people_of
from evaluation.pairing import Edits, check_edits, find_protected, find_row
from evaluation.scoring import Scores, Tensor, directories, edits_of, make_parser, rows_of, said, score
from runs import listed, read_record
from utils import UserError

METRICS = [  # except those of faces
    eval_clip_s.METRIC,
    eval_psnr.METRIC,
    eval_ssim.METRIC,
    eval_lpips.METRIC,
    eval_clip_i.METRIC,
]


WITHOUT_CLIP = [one for one in METRICS if not any(need.startswith("clip") for need in one.needs)]


def linf(images: Tensor, references: Tensor) -> Tensor:
    """Measures max |a - b| of 8-bit images in [-1, 1], (B, 3, H, W) -> (B,), without float32's rounding."""
    levels = (images - references).abs().amax(dim=(1, 2, 3)).double() / utils.LEVEL
    return levels.round() * utils.LEVEL


# Of protected images against their sources, where a defender wants the opposite
VISIBILITY = [
    dataclasses.replace(eval_psnr.METRIC, title="PSNR ↑"),
    dataclasses.replace(eval_ssim.METRIC, title="SSIM ↑"),
    dataclasses.replace(eval_lpips.METRIC, title="LPIPS ↓"),
    Metric("linf", "L-infinity", linf, needs=("edits", "clean"), digits=4),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "all", [*METRICS, eval_facial.METRIC])
    text = "directories of protected images, or of budget_{B}/, to measure how visible protection is"
    parser.add_argument("--protected_dirs", type=utils.path, nargs="+", default=[], help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Evaluates what the flags name -> exit status."""
    flags = ("per_image", "baseline", "protected_dirs", "batch_size", "latex")
    given = {flag: getattr(args, flag) for flag in flags}
    config = models.config.resolve(models.config.ModelSettings.of(args))
    return evaluate(edits_of(args), config, args.output or Path("all_metric.csv"), **given)


def evaluate(
    edits: Edits,
    config: models.config.ModelConfig,
    output: Path,
    *,
    per_image: Path | None = None,
    baseline: str | None = None,
    protected_dirs: Sequence[Path] = (),
    batch_size: int = 16,
    latex: bool = False,
    overwrite: bool = False,
) -> int:
    """Scores edits by every metric, writes the tables and prints them -> exit status.

    overwrite: replace a table that other networks measured. Raises UserError before anything is
    written: for bad outputs, and for pictures that don't belong together.
    """
    of_baseline, of_protected, text = check_outputs(output, per_image, latex)
    by_words = utils.NO_WORDS not in edits.texts.values()
    headline, of_faces = metrics_of(config, by_words)
    metrics = [*headline, *itertools.chain(*of_faces.values())]
    by = networks_of(config, by_words)
    measured = by | people_of(edits.gallery, edits.references)
    if not overwrite:
        tables.check_networks(output, measured, "choose another --output")
    rows = rows_of(edits, metrics)
    against = find_row(rows, baseline).method if baseline else None
    check_edits(edits)
    protected = find_protected(protected_dirs, edits) if protected_dirs else None
    visible = score(protected, VISIBILITY, config, batch_size) if protected else None
    if visible:
        check_budgets(protected, visible)
    scores = score(edits, metrics, config, batch_size)

    about_rows = edits.about(rows)
    groups = {"; ".join([about(edits, scores, by_words), *said(by)]): headline, **of_faces}
    table, parts = tables.all_metrics(tables.means(scores.values), groups, about_rows)
    written = {output: table}
    if against:
        name = tables.method_at(about_rows, against)
        groups = {f"minus {name}, in pairs": headline}
        groups |= {f"{title}, minus {name}": own for title, own in of_faces.items()}
        pairs, others = tables.differences(scores.values, against), about_rows.drop(against)
        written[of_baseline], more = tables.all_metrics(pairs, groups, others, "+")
        parts += more
    if visible:
        groups, found = {"protected images against their sources": VISIBILITY}, tables.means(visible.values)
        written[of_protected], more = tables.all_metrics(found, groups, protected.about(protected.rows))
        parts += more
    if per_image:
        written[per_image] = tables.per_image(scores.values, metrics, about_rows)
    for path in (of_baseline, of_protected):
        if path and path.exists() and path not in written:  # it would seem to belong to this table
            path.unlink()
            print(utils.one_line(f"{path}: from an earlier run, removed"))
    for path, frame in written.items():
        if path:
            tables.write_csv(path, frame)
    tables.write_beside(output, parts, measured, directories(rows, about_rows), latex)
    whole = tables.as_page(parts)
    print(whole)
    if text:
        utils.write_own(text, f"{whole}\n".encode(errors="surrogateescape"))
        print(utils.one_line(f"{output}: {len(rows)} rows; the same as Markdown: {text}"))
    status = scores.report()
    return max(status, visible.report("protected images")) if visible else status


def about(edits: Edits, scores: Scores, by_words: bool) -> str:
    """Describes what was scored, for the line above a table."""
    seeds = ", ".join(map(str, sorted({key.seed for key in edits.keys})))
    note = f"{len(edits.names)} images, {len(edits.prompts)} prompts, seed {seeds}"
    note += f", a gallery of {len(edits.references or edits.sources) + len(edits.gallery)} people"
    if edits.references:
        note += "; faces are compared with other photos of the people, not with the sources"
    if not by_words:
        note += "; no edit by words was made: these are round trips through an autoencoder, without CLIP"
    if scores.n_left_out:
        note += f"; {scores.n_left_out} of {scores.n_edits} edits left out of every row"
    return note


def networks_of(config: models.config.ModelConfig, by_words: bool) -> dict[str, str]:
    """Names the networks that measure the tables' values, with hashes."""
    headline, of_faces = metrics_of(config, by_words)
    return networks([*headline, *itertools.chain(*of_faces.values())], config)


def metrics_of(
    config: models.config.ModelConfig, by_words: bool
) -> tuple[list[Metric], dict[str, list[Metric]]]:
    """Lists the metrics of the first table, and those of each recogniser's table, by title."""
    of_faces = eval_facial.groups(config)
    return [*of_faces.pop(""), *(METRICS if by_words else WITHOUT_CLIP)], of_faces


def check_outputs(output: Path, per_image: Path | None, latex: bool) -> list[Path | None]:
    """Refuses bad outputs -> the files beside the table; None beside a device. Raises UserError."""
    if utils.is_special(output):
        tables.check_outputs([per_image])
        return [None] * 3
    csv = [output.with_name(f"{output.stem}_{what}.csv") for what in ("minus_baseline", "protected")]
    endings = (".md", ".json", ".tex") if latex else (".md", ".json")
    tables.check_outputs([output, per_image, *csv])
    tables.check_outputs([output.with_suffix(ending) for ending in endings], suffixes=endings)
    return [*csv, output.with_suffix(".md")]


def check_budgets(protected: Edits, visible: Scores) -> None:
    """Refuses protected images beyond the budget in their run.json. Raises UserError."""
    of_linf = visible.values[visible.values["metric"] == "linf"]
    for row in protected.rows:
        budget = ((read_record(row.directory) or {}).get("arguments", {})).get("attack_budget")
        found = of_linf[of_linf["method"] == row.method]
        beyond = found[found["value"] > budget + 1e-9] if isinstance(budget, int | float) else found[:0]
        if len(beyond):
            names = listed(beyond.itertuples(), lambda line: f"{line.name} {line.value:.3g}")
            raise UserError(f"{row.directory}: beyond the budget {budget:g} of its run.json: {names}")


if __name__ == "__main__":
    sys.exit(main())
