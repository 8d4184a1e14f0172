"""Edits every image of a directory by every instruction.

    python main_edit.py --src_dir=portraits --edit_dir=edits/clean --seed=0
    python main_edit.py --src_dir=protected/facelock/budget_0.03 \\
        --edit_dir=edits/facelock/budget_0.03 --seed=0
    python main_edit.py --src_dir=assets/portraits/mini --edit_dir=edits/mini --seed=0 \\
        --prompts=0,3,7 --models=mini

Writes EDIT_DIR/seed{S}/prompt{i}/NAME.png, i being the number in utils.edit_prompts (or the line of
--prompt_file, from 0), and a run.json in seed{S}. Run again with the same seed, it skips what is finished.
edit.py with the same seed reproduces any single file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import edit
import models
import runs
import utils
from utils import Portrait


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="directory of images")
    parser.add_argument("--edit_dir", type=Path, required=True, help="where seed{S}/prompt{i}/ are made")
    parser.add_argument(
        "--prompts",
        type=utils.number_list,
        metavar="I,J,...",
        help="numbers of the instructions to use (default: all)",
    )
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="a text file of one's own instructions, one a line (default: the 25 of the paper)",
    )
    edit.add_seed_argument(parser)
    edit.add_edit_arguments(parser)
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    team = runs.Team.gather(args)
    chosen = edit.choose(args)
    prompts = utils.choose_prompts(args.prompts, args.prompt_file)
    images, args.seed = team.once(lambda: prepare(args))
    directory = args.edit_dir / f"seed{args.seed}"
    device, dtype = models.set_up(args)
    unread = {"strength" if args.model == "instruct-pix2pix" else "image_guidance_scale": None}
    record = runs.record_of(args, chosen, dtype, unread)
    record["prompts"] = {str(number): text for number, text in prompts.items()}
    team.once(lambda: runs.check_record(directory, record))
    editor = models.load_editor(chosen, args.model, device, dtype, progress=False)

    items = [
        runs.Item(
            image,
            directory / f"prompt{number}" / f"{image.stem}.png",
            size,
            label=f"prompt{number}/{image.name}",
            prompt=text,
        )
        for image, size in images
        for number, text in prompts.items()
    ]
    warnings = {models.size_warning(chosen, size) for _, size in images if size}
    for warning in sorted(filter(None, warnings)) if team.is_first else ():
        print(warning, file=sys.stderr)

    def load(item: runs.Item) -> Portrait:
        return utils.load_portrait(item.source, chosen.resolution)

    def work(batch: list[runs.Item], portraits: list[Portrait], wanted: list[bool]) -> None:
        edited = edit.edit_portraits(portraits, [item.prompt for item in batch], editor, args.seed)
        for item, portrait, pixels, is_wanted in zip(batch, portraits, edited, wanted, strict=True):
            if is_wanted:
                utils.save_png(item.output, pixels, portrait.alpha)

    with runs.writing(directory, record, team):
        summary = runs.run_batches(
            runs.batches(items, args.batch_size),
            load,
            work,
            overwrite=args.overwrite,
            debug=args.debug,
            unit="edit",
            team=team,
        )
    return runs.finish(summary, team, directory)


def prepare(args: argparse.Namespace) -> tuple[list[tuple[Path, tuple[int, int] | None]], int]:
    """All that can be checked before models are loaded -> the images with their sizes, and the seed.

    For -1 that is one whose folder doesn't exist yet. Raises UserError.
    """
    images = runs.find_images(args.src_dir)
    utils.check_directory(args.edit_dir)
    seed = utils.draw_seed(args.seed)
    while args.seed == -1 and (args.edit_dir / f"seed{seed}").exists():
        seed = utils.draw_seed(-1)
    return [(image, utils.image_size(image)) for image in images], seed


if __name__ == "__main__":
    sys.exit(main())
