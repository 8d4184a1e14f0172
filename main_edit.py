"""Edits every image of a directory by every instruction.

    python main_edit.py --src_dir=portraits --edit_dir=edits/clean --seed=0
    python main_edit.py --src_dir=protected/facelock/budget_0.03 \\
        --edit_dir=edits/facelock/budget_0.03 --seed=0
    python main_edit.py --src_dir=assets/portraits/mini --edit_dir=edits/mini --seed=0 \\
        --prompts=0,3,7 --models=mini

Writes EDIT_DIR/seed{S}/prompt{i}/NAME.png, where i is the number in utils.edit_prompts (or the line number in
--prompt_file, from 0), and run.json and manifest.jsonl in seed{S}. A second run with the same seed skips
finished files. edit.py with the same seed reproduces any single file.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import runs
import utils
from edit import add_seed_argument, edit_portraits
from images import Portrait, image_size, load_image, save_png
from models.config import ModelConfig, ModelSettings, add_model_arguments, prompts_of, resolve
from models.editors import EDITORS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=utils.path, required=True, help="directory of images")
    text = "where seed{S}/prompt{i}/ are created"
    parser.add_argument("--edit_dir", type=utils.path, required=True, help=text)
    utils.add_prompt_arguments(parser)
    add_seed_argument(parser)
    add_model_arguments(parser, "edit")
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Edits the directory that the flags name -> exit status."""
    prompts = prompts_of(args.model, args.prompts, args.prompt_file)
    runs.processes(args.device)
    if args.seed == -1 and not EDITORS[args.model].by_words:
        args.seed = 0  # it changes nothing
    seed = runs.once(lambda: settle_seed(args.seed, args.edit_dir))
    directory, config = args.edit_dir / f"seed{seed}", resolve(ModelSettings.of(args))
    if runs.processes().is_main_process:
        config.warn_of_cpu(args.device)
    return edit_directory(args.src_dir, directory, prompts, seed, config, runs.Options.of(args))


def settle_seed(seed: int, edit_dir: Path) -> int:
    """Replaces a seed of -1 with a random one whose folder doesn't exist yet."""
    drawn = utils.draw_seed(seed)
    while seed == -1 and (edit_dir / f"seed{drawn}").exists():
        drawn = utils.draw_seed(-1)
    return drawn


def edit_directory(
    src_dir: Path,
    directory: Path,
    prompts: dict[int, str],
    seed: int,
    config: ModelConfig,
    options: runs.Options = runs.USUAL,
) -> int:
    """Edits the images of a directory into a seed{S} folder -> exit status. Raises UserError."""
    images = runs.once(lambda: [(path, image_size(path)) for path in runs.find_images(src_dir)])
    utils.check_directory(directory)
    items = []
    for path, size in images:
        for number, text in prompts.items():
            output = directory / f"prompt{number}" / f"{path.stem}.png"
            items.append(runs.Item(path, output, size, f"prompt{number}/{path.name}", text))
    if runs.processes().is_main_process:
        config.warn_of((size for _, size in images), prompts.values())

    editor = functools.cache(config.load_editor)  # so that it warns once

    def load(item: runs.Item) -> Portrait:
        return load_image(item.source, config.resolution)

    def work(batch: list[runs.Item], portraits: list[Portrait], wanted: list[bool]) -> runs.Facts:
        edited = edit_portraits(portraits, [item.prompt for item in batch], editor(), seed)
        for item, portrait, pixels, is_wanted in zip(batch, portraits, edited, wanted, strict=True):
            if is_wanted:
                save_png(item.output, pixels, portrait.alpha)
        return [{}] * sum(wanted)

    settings = {"seed": seed, **config.edit_settings()}
    return runs.Job(items, load, work, directory, settings, options, prompts, editor, "edit").run()


if __name__ == "__main__":
    sys.exit(main())
