"""A picture of what protection does: source, protected, difference x10, and the edits of both.

    python evaluation/figure.py --src_dir portraits --protected_dirs protected/facelock/budget_0.03 \\
        --clean_edit_dir edits/clean --defend_edit_dirs edits/facelock/budget_0.03 --seed 0 --prompts 0,3 \\
        --names alice bob --output figure.png

One line a portrait and instruction; with several --protected_dirs and --defend_edit_dirs (in the same order),
the columns of each method stand side by side. PNG or PDF, by the ending of --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import common

import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

AMPLIFY = 10  # of the difference, which is shown around grey
CELL = 1.6  # inches
DPI = 100


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="the source images")
    parser.add_argument(
        "--protected_dirs", type=Path, nargs="+", required=True, help="the protected images of each method"
    )
    parser.add_argument("--clean_edit_dir", type=Path, required=True, help="edits of the sources")
    parser.add_argument(
        "--defend_edit_dirs",
        type=Path,
        nargs="+",
        required=True,
        help="edits of the protected images, each holding seed{S}/",
    )
    parser.add_argument("--seed", type=int, required=True, help="the S of seed{S}")
    parser.add_argument(
        "--prompts",
        type=utils.number_list,
        metavar="I,J,...",
        help="numbers of the instructions to show (default: all that were edited)",
    )
    parser.add_argument("--prompt_file", type=Path, help="the instructions' texts, if they are one's own")
    parser.add_argument("--names", nargs="+", help="stems of the portraits to show (default: all)")
    parser.add_argument("--output", type=Path, default=Path("figure.png"), help="a .png or .pdf")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"{args.output}: a figure is written as .png or .pdf")
    clean = common.clean_row(args.clean_edit_dir, [args.seed])
    rows = common.find_rows(args.defend_edit_dirs, [args.seed])
    if len(rows) != len(args.protected_dirs):
        raise UserError(f"{len(args.protected_dirs)} --protected_dirs, but {len(rows)} directories of edits")
    prompts = common.prompts_of([clean, *rows], [args.seed], args.prompts)
    texts = utils.choose_prompts(None, args.prompt_file)
    sources = utils.images_by_stem(args.src_dir)
    names = args.names or sorted(sources)
    lines = [(name, prompt) for name in names for prompt in prompts]
    cells = [
        picture_row(name, prompt, sources, args, clean, rows) for name, prompt in lines
    ]
    labels = [f"{name}\n{texts.get(prompt, f'prompt {prompt}')}" for name, prompt in lines]
    draw(cells, labels, titles(rows), args.output)
    print(f"{args.output}: {len(lines)} lines, {len(cells[0])} columns")
    return 0


def picture_row(
    name: str,
    prompt: int,
    sources: dict[str, Path],
    args: argparse.Namespace,
    clean: common.Row,
    rows: Sequence[common.Row],
) -> list[np.ndarray]:
    """source, (protected, difference) of each method, edit of the source, edit of each protected."""
    source = _pixels(sources, name, args.src_dir)
    cells = [source]
    for directory in args.protected_dirs:
        protected = _pixels(utils.images_by_stem(directory), name, directory)
        cells += [protected, difference(protected, source)]
    for row in (clean, *rows):
        folder = row.directory / f"seed{args.seed}" / f"prompt{prompt}"
        cells.append(_pixels(utils.images_by_stem(folder), name, folder))
    return cells


def _pixels(files: dict[str, Path], name: str, directory: Path) -> np.ndarray:
    if name not in files:
        raise UserError(f"{directory}: no image {name}")
    return utils.load_image(files[name]).pixels


def difference(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: what was added to the source, AMPLIFY times, around grey."""
    import numpy as np

    if image.shape != source.shape:
        raise UserError(f"a protected image is {image.shape[1]}x{image.shape[0]}, its source is not")
    return np.clip(128 + AMPLIFY * (image.astype(int) - source.astype(int)), 0, 255).astype(np.uint8)


def titles(rows: Sequence[common.Row]) -> list[str]:
    """One title a column, in the order of `picture_row`."""
    many = len(rows) > 1
    shown = [f"\n{row.method}" if many else "" for row in rows]
    columns = ["source"]
    for method in shown:
        columns += [f"protected{method}", f"difference x{AMPLIFY}{method}"]
    return [*columns, "edit of source", *(f"edit of protected{method}" for method in shown)]


def draw(cells: list[list[np.ndarray]], labels: Sequence[str], columns: Sequence[str], output: Path) -> None:
    """Lays the pictures out with labels and writes the file, whole or not at all."""
    import io

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
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:].lower())
    utils.write_file(output, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
