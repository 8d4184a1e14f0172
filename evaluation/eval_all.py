"""Every metric at once, each file read once: the paper's table for your directories.

    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/noise edits/encoder edits/facelock --seed 0
    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean --seed 0 1 2 \\
        --defend_edit_dirs edits/noise edits/facelock --baseline edits/noise \\
        --protected_dirs protected/noise protected/facelock --output tables/main.csv

Writes all_metric.csv and, with the same name, .md: rows are the unprotected edits and each method, columns
CLIP-S, PSNR, SSIM, LPIPS, CLIP-I, FR by the recogniser and by the judge, each with a 95 % interval, and the
share of edits in which no face was found. An arrow shows which way a defender wants it. With --baseline,
paired differences, too (..._minus_baseline.csv); with --protected_dirs, how visible each protection is
(..._protected.csv). Either file of an earlier run is removed where this one has nothing for it. Which
metric can be trusted for what: see the README.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import common
import eval_clip_i
import eval_clip_s
import eval_facial
import eval_lpips
import eval_psnr
import eval_ssim

import models
import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Column:
    """How a metric is shown."""

    title: str
    digits: int


COLUMNS = {
    "clip_s": Column("CLIP-S ↓", 3),
    "psnr": Column("PSNR ↓", 2),
    "ssim": Column("SSIM ↓", 3),
    "lpips": Column("LPIPS ↑", 3),
    "clip_i": Column("CLIP-I ↓", 3),
    "facial": Column("FR ↓", 3),
    "facial_judge": Column("FR, judge ↓", 3),
    "no_face": Column("no face", 3),
}
VISIBLE = {  # of a protected image against its source: less is seen the other way round
    "psnr": Column("PSNR ↑", 2),
    "ssim": Column("SSIM ↑", 3),
    "lpips": Column("LPIPS ↓", 3),
    "linf": Column("L-infinity", 4),
}


@dataclass
class Visibility:
    """How far protected images are from their sources, as these come by."""

    directories: dict[str, dict[str, Path]]  # by the row's name: files by stem
    metrics: dict[str, common.AgainstClean]
    values: dict[str, dict[str, common.Values]] = field(default_factory=dict)  # metric -> row -> ...
    damaged: list[str] = field(default_factory=list)

    def __call__(self, name: str, source: np.ndarray) -> None:
        """A source's protected images; one that can't be compared leaves the name out of every row."""
        try:
            images = {row: utils.load_image(files[name]).pixels for row, files in self.directories.items()}
        except UserError as error:
            self.damaged.append(f"{error} (left out of the table of protected images)")
            return
        key = common.Key(0, 0, name)
        reference = utils.to_tensor(source)
        for row, image in images.items():
            found = {
                metric: function(utils.to_tensor(image), reference).item()
                for metric, function in self.metrics.items()
            }
            for metric, value in (found | {"linf": utils.linf(image, source)}).items():
                self.values.setdefault(metric, {}).setdefault(row, {})[key] = value


def find_protected(given: Sequence[Path], sources: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """Files by stem of each directory of protected images, or of each budget_{B} in it.

    Raises UserError if one lacks an image or has it in another size.
    """
    found = {}
    for directory in common.protected_rows(given):
        files = found[str(directory)] = utils.images_by_stem(directory)
        lacking = [name for name in sources if name not in files]
        if lacking:
            raise UserError(f"images are missing: {', '.join(lacking)} in {directory}")
        for name, source in sources.items():
            size, wanted = utils.image_size(files[name]), utils.image_size(source)
            if size and wanted and size != wanted:
                raise UserError(
                    f"{files[name]} is {size[1]}x{size[0]}, its source {wanted[1]}x{wanted[0]}"
                )
    return found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "all", sources=True, clean=True)
    parser.add_argument(
        "--protected_dirs",
        type=Path,
        nargs="+",
        help="protected images, to see how visible each protection is: each holds them, or budget_{B}/",
    )
    models.add_perceptual_argument(parser)
    models.add_clip_argument(parser)
    models.add_face_arguments(parser)
    common.add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def remove_earlier(table: Path) -> None:
    """An earlier run's, which would seem to belong to the table that is written beside it."""
    if table.exists():
        table.unlink()
        print(f"{table}: an earlier run's, removed")


def run(args: argparse.Namespace) -> int:
    output = args.output or Path("all_metric.csv")
    if output.suffix == ".md":
        raise UserError(f"{output}: the Markdown table is written beside a .csv; ask for that")
    of_baseline = output.with_name(f"{output.stem}_minus_baseline.csv")
    of_protected = output.with_name(f"{output.stem}_protected.csv")
    common.check_outputs(output, output.with_suffix(".md"), args.per_image, of_baseline, of_protected)
    smallest = max(eval_ssim.WINDOW, eval_lpips.SMALLEST)
    edits = common.find_edits(args, clean_is_row=True, smallest=smallest, needs_texts=True)
    protected = find_protected(args.protected_dirs or [], edits.sources)
    against_clean = {"psnr": eval_psnr.psnr, "ssim": eval_ssim.ssim, "lpips": eval_lpips.load(args)}
    clip_metrics = {
        "clip_s": eval_clip_s.clip_s,
        "clip_i": lambda edit, source, _: eval_clip_i.clip_i(edit, source),
    }
    clip = common.clip_scorer(args, edits, clip_metrics)
    faces = eval_facial.load(args, list(eval_facial.METRICS))
    visibility = Visibility(protected, against_clean)
    results = common.score(
        edits, against_clean, [clip, faces], args.batch_size, visibility if protected else None
    )
    values = {metric: results.values[metric] for metric in COLUMNS if metric in results.values}
    means = {
        metric: {row.method: common.mean_of(of_row) for row, of_row in of_rows.items() if of_row}
        for metric, of_rows in values.items()
    }
    seeds = sorted(set(args.seed))
    note = f"{len(edits.sources)} images, {len(edits.prompts)} prompts, seed {', '.join(map(str, seeds))}"
    if results.n_left_out:
        note += f"; {results.n_left_out} of {results.n_edits} edits left out of every row"
    parts = [markdown(means, COLUMNS, [row.method for row in edits.rows], note)]
    write_table(output, means, [row.method for row in edits.rows])
    if edits.baseline:
        differences = {
            metric: {
                row.method: common.difference_of(of_row, of_rows[edits.baseline])
                for row, of_row in of_rows.items()
                if row != edits.baseline and of_row and of_rows[edits.baseline]
            }
            for metric, of_rows in values.items()
        }
        rows = [row.method for row in edits.rows if row != edits.baseline]
        what = f"minus {edits.baseline.method}, in pairs"
        parts.append(markdown(differences, COLUMNS, rows, what, sign="+"))
        write_table(of_baseline, differences, rows)
    else:
        remove_earlier(of_baseline)
    if visibility.values:
        seen = {
            metric: {row: common.mean_of(of_row) for row, of_row in of_rows.items()}
            for metric, of_rows in visibility.values.items()
        }
        parts.append(markdown(seen, VISIBLE, list(protected), "protected images against their sources"))
        write_table(of_protected, seen, list(protected))
    else:
        remove_earlier(of_protected)
    if args.per_image:
        write_per_image(args.per_image, values)
    text = "\n\n".join(parts)
    utils.write_file(output.with_suffix(".md"), (text + "\n").encode(errors="surrogateescape"))
    print(text)
    print(f"{output}: {len(edits.rows)} rows; the same as Markdown: {output.with_suffix('.md')}")
    results.damaged += visibility.damaged
    return max(faces.report(results), results.exit_status())


def write_table(path: Path, means: dict[str, dict[str, common.Mean]], rows: Sequence[str]) -> None:
    """The CSV: four columns a metric (value, interval, images), empty where a metric has no value."""
    header = ["method"]
    for metric in means:
        header += [metric, f"{metric}_low", f"{metric}_high", f"{metric}_n"]
        header += ["psnr_n_inf"] if metric == "psnr" else []
    lines = []
    for row in rows:
        line = [row]
        for metric, of_rows in means.items():
            mean = of_rows.get(row)
            line += mean.cells() if mean else [""] * 4
            line += [str(mean.n_inf) if mean else ""] if metric == "psnr" else []
        lines.append(line)
    common.write_csv(path, header, lines)


def write_per_image(path: Path, values: dict[str, dict[common.Row, common.Values]]) -> None:
    """One line an edit, a column a metric."""
    rows = list(next(iter(values.values())))
    lines = []
    for row in rows:
        keys = sorted(set().union(*(of_rows[row] for of_rows in values.values())))
        for key in keys:
            found = [common.number(of_rows[row].get(key, math.nan)) for of_rows in values.values()]
            lines.append([row.method, str(key.seed), str(key.prompt), key.name, *found])
    common.write_csv(path, ["method", "seed", "prompt", "name", *values], lines)


def markdown(
    means: dict[str, dict[str, common.Mean]],
    columns: dict[str, Column],
    rows: Sequence[str],
    note: str,
    sign: str = "",
) -> str:
    """A Markdown table of means with their intervals, under a line that says of what."""
    shown = {metric: column for metric, column in columns.items() if metric in means}
    table = [["method", *(column.title for column in shown.values()), "n"]]
    everything = [mean for of_rows in means.values() for mean in of_rows.values()]
    for row in rows:
        line = [row]
        for metric, column in shown.items():
            mean = means[metric].get(row)
            line.append(cell(mean, column.digits, sign) if mean else "-")
        counts = {means[metric][row].n for metric in shown if row in means[metric]}
        line.append(" to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0")
        table.append(line)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    few = any(mean.n < common.FEW_IMAGES for mean in everything)
    note += f"; fewer than {common.FEW_IMAGES} images, the intervals are approximate" if few else ""
    return "\n".join([f"{note}:", "", *lines])


def cell(mean: common.Mean, digits: int, sign: str) -> str:
    """`0.412 [0.38, 0.44]`, with the count of infinite values where there are any."""
    if math.isnan(mean.value):
        text = "-"
    else:
        text = f"{mean.value:{sign}.{digits}f}"
    if not math.isnan(mean.low):
        text += f" [{mean.low:{sign}.{digits}f}, {mean.high:{sign}.{digits}f}]"
    return text + (f" ({mean.n_inf} inf)" if mean.n_inf else "")


if __name__ == "__main__":
    sys.exit(main())
