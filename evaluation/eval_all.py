"""Every metric at once, each file read once: the paper's table for your directories.

    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/noise edits/encoder edits/facelock --seed 0
    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean --seed 0 1 2 \\
        --defend_edit_dirs edits/noise edits/facelock --baseline edits/noise \\
        --protected_dirs protected/noise protected/facelock --output tables/main.csv

Writes all_metric.csv and all_metric.md: one row for the unprotected edits and one per method, each value with
a 95 % interval. The first table shows what the panel of judges says (left, by the one who finds most;
recognised and identified, by any; the share of edits without a face), CLIP-S, PSNR, SSIM, LPIPS and CLIP-I.
Then comes a table for each judge, and one for the recognisers that attacks see. An arrow shows the direction
that a defender wants. --baseline adds paired differences (..._minus_baseline.csv), --protected_dirs how
visible each protection is (..._protected.csv); without them, such a file of an earlier run is removed.
What each metric can be trusted for: docs/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from evaluation.features import Metric
from evaluation.pairing import Edits, Row, check_edits, find_protected, find_row
from evaluation.scoring import Scores, Tensor, edits_of, make_parser, rows_of, score
from runs import listed, read_record
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

METRICS = [  # without those of faces
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


# Of a protected image against its source, where a defender wants the opposite
VISIBILITY = [
    dataclasses.replace(eval_psnr.METRIC, title="PSNR ↑"),
    dataclasses.replace(eval_ssim.METRIC, title="SSIM ↑"),
    dataclasses.replace(eval_lpips.METRIC, title="LPIPS ↓"),
    Metric("linf", "L-infinity", linf, needs=("edits", "clean"), digits=4),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "all", [*METRICS, eval_facial.METRIC])
    text = "protected images, to see how visible each protection is: each holds them, or budget_{B}/"
    parser.add_argument("--protected_dirs", type=utils.path, nargs="+", default=[], help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Evaluates what the flags name -> exit status."""
    given = {flag: getattr(args, flag) for flag in ("per_image", "baseline", "protected_dirs", "batch_size")}
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
) -> int:
    """Scores edits by every metric, writes the tables and prints them -> exit status.

    Raises UserError before anything is written: for bad outputs, and for pictures that don't belong together.
    """
    of_baseline, of_protected, text = check_outputs(output, per_image)
    of_faces = eval_facial.groups(config)
    by_words = utils.NO_WORDS not in edits.texts.values()
    headline = [*of_faces.pop(""), *(METRICS if by_words else WITHOUT_CLIP)]
    metrics = [*headline, *itertools.chain(*of_faces.values())]
    rows = rows_of(edits, metrics)
    against = find_row(rows, baseline).method if baseline else None
    check_edits(edits)
    protected = find_protected(protected_dirs, edits) if protected_dirs else None
    visible = score(protected, VISIBILITY, config, batch_size) if protected else None
    if visible:
        check_budgets(protected, visible)
    scores = score(edits, metrics, config, batch_size)

    groups = {about(edits, scores, by_words): headline, **of_faces}
    parts = [write(output, tables.means(scores.values), groups, rows)]
    if against:
        groups = {f"minus {against}, in pairs": headline}
        groups |= {f"{title}, minus {against}": own for title, own in of_faces.items()}
        others = [row for row in rows if row.method != against]
        parts.append(write(of_baseline, tables.differences(scores.values, against), groups, others, "+"))
    if visible:
        groups = {"protected images against their sources": VISIBILITY}
        parts.append(write(of_protected, tables.means(visible.values), groups, protected.rows))
    for path, is_new in ((of_baseline, against), (of_protected, visible)):
        if path and path.exists() and not is_new:  # it would seem to belong to this table
            path.unlink()
            print(utils.one_line(f"{path}: from an earlier run, removed"))
    if per_image:
        tables.write_csv(per_image, tables.per_image(scores.values, [metric.name for metric in metrics]))
    whole = "\n\n".join(parts)
    print(whole)
    if text:
        utils.write_own(text, f"{whole}\n".encode(errors="surrogateescape"))
        print(utils.one_line(f"{output}: {len(rows)} rows; the same as Markdown: {text}"))
    status = scores.report()
    return max(status, visible.report("protected images")) if visible else status


def about(edits: Edits, scores: Scores, by_words: bool) -> str:
    """Says above a table what was scored."""
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


def write(
    path: Path | None,
    means: pd.DataFrame,
    groups: dict[str, Sequence[Metric]],
    rows: Sequence[Row],
    sign: str = "",
) -> str:
    """Writes a table, unless there is no path -> the same as Markdown."""
    table, text = tables.all_metrics(means, groups, [row.method for row in rows], sign)
    if path:
        tables.write_csv(path, table)
    return text


def check_outputs(output: Path, per_image: Path | None) -> list[Path | None]:
    """Refuses bad outputs -> those beside the table; none beside a device. Raises UserError."""
    if utils.is_special(output):
        tables.check_outputs([per_image])
        return [None] * 3
    csv = [output.with_name(f"{output.stem}_{what}.csv") for what in ("minus_baseline", "protected")]
    text = output.with_suffix(".md")
    tables.check_outputs([output, per_image, *csv])
    tables.check_outputs([text], suffixes=(".md",))
    return [*csv, text]


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
