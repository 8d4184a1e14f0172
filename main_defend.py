"""Protects every portrait of a directory.

    python main_defend.py --image_dir=portraits --output_dir=protected/facelock --defend_method=facelock
    python main_defend.py --image_dir=portraits --output_dir=protected/cw --defend_method=cw \\
        --attack_budget=0.02
    python main_defend.py --image_dir=assets/portraits/mini --output_dir=protected/mini --models=mini

Writes OUTPUT_DIR/budget_{B}/NAME.png and a run.json that records how. Run again, it skips what is finished.
With --batch_size=1 a portrait gets just what defend.py gives it; in larger batches the arithmetic differs in
its last bits, which sign steps can amplify.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import defend
import models
import runs
import utils
from utils import UserError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=Path, required=True, help="directory of portraits")
    parser.add_argument("--output_dir", type=Path, required=True, help="where budget_{B}/ is made")
    defend.add_defense_arguments(parser)
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    team = runs.Team.gather(args)
    directory = args.output_dir / f"budget_{args.attack_budget:g}"
    images, args.seed = team.once(lambda: prepare(args, directory))
    tools = defend.Tools(args)
    record = runs.record_of(args, tools.models, tools.dtype, defend.flags_in_effect(args))
    team.once(lambda: runs.check_record(directory, record))
    tools.preload(args)

    items = [
        runs.Item(image, directory / f"{image.stem}.png", size, label=image.name) for image, size in images
    ]
    warnings = {models.size_warning(tools.models, size) for _, size in images if size}
    for warning in sorted(filter(None, warnings)) if team.is_first else ():
        print(warning, file=sys.stderr)

    def load(item: runs.Item) -> defend.Subject:
        return defend.load_subject(item.source, args, tools)

    def work(batch: list[runs.Item], subjects: list[defend.Subject], wanted: list[bool]) -> None:
        outputs = [item.output if is_wanted else None for item, is_wanted in zip(batch, wanted, strict=True)]
        bar = defend.LossBar(args.num_iters, args.defend_method, shown=team.is_first)
        try:
            reports = defend.protect_subjects(subjects, outputs, args, tools, bar)
        finally:
            bar.close()
        for report in reports:
            bar.bar.write(str(report))

    with runs.writing(directory, record, team):
        summary = runs.run_batches(
            runs.batches(items, args.batch_size),
            load,
            work,
            overwrite=args.overwrite,
            debug=args.debug,
            unit="portrait",
            team=team,
        )
    return runs.finish(summary, team, directory)


def prepare(
    args: argparse.Namespace, directory: Path
) -> tuple[list[tuple[Path, tuple[int, int] | None]], int]:
    """All that can be checked before models are loaded -> the images with their sizes, and the seed.

    Raises UserError.
    """
    images = runs.find_images(args.image_dir)
    if directory.resolve() == args.image_dir.resolve():
        raise UserError(f"{directory}: would overwrite the inputs")
    utils.check_directory(directory)
    defend.check_knobs(args)
    recorded = runs.read_record(directory)
    if args.seed == -1 and recorded is not None:
        raise UserError(f"{directory} was begun with --seed {recorded.get('seed')}; give that, not -1")
    return [(image, utils.image_size(image)) for image in images], utils.draw_seed(args.seed)


if __name__ == "__main__":
    sys.exit(main())
