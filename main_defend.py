"""Protects every portrait of a directory.

    python main_defend.py --image_dir=portraits --output_dir=protected/facelock --defend_method=facelock
    python main_defend.py --image_dir=portraits --output_dir=protected/cw --defend_method=cw \\
        --attack_budget=0.02
    python main_defend.py --image_dir=assets/portraits/mini --output_dir=protected/mini --models=mini

Writes OUTPUT_DIR/budget_{B}/NAME.png, run.json and manifest.jsonl, which record how, and report.csv, which
measures each file. A second run skips finished files. With --batch_size=1 each portrait gets exactly what
defend.py gives it; in larger batches the arithmetic differs in the last bits, which sign steps can amplify.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import runs
import utils
from defend import add_defense_arguments, progress_bar, settings_of
from images import image_size
from methods import METHODS
from protection import Protector, Subject
from utils import UserError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="directory of portraits")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where budget_{B}/ is created")
    add_defense_arguments(parser)
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Protects the directory that the flags name -> exit status."""
    runs.processes(args.device)
    budget = METHODS[args.method].run.budget if args.budget is None else args.budget
    directory = runs.once(lambda: budget_directory(args.output_dir, budget))
    args.seed = runs.once(lambda: settle_seed(args.seed, directory))
    protector = Protector(settings_of(args))
    if protector.needs and runs.processes().is_main_process:
        protector.config.warn_of_cpu(args.device)
    return protect_directory(args.image_dir, directory, protector, runs.Options.of(args))


def budget_directory(parent: Path, budget: float) -> Path:
    """Names a budget's directory as the authors' release does; one with an older, shorter name is kept."""
    short = parent / f"budget_{budget:g}"
    record = runs.read_record(short)
    is_there = record and record["arguments"].get("attack_budget") == budget
    return short if is_there else parent / f"budget_{budget}"


def settle_seed(seed: int, directory: Path) -> int:
    """Replaces a seed of -1 with a random one. Raises UserError if the directory has a seed already."""
    if seed == -1 and (record := runs.read_record(directory)):
        raise UserError(f"{directory} was begun with --seed {record.get('seed')}; give that, not -1")
    return utils.draw_seed(seed)


def protect_directory(
    image_dir: Path, directory: Path, protector: Protector, options: runs.Options = runs.USUAL
) -> int:
    """Protects the portraits of one directory into another -> exit status. Raises UserError."""
    from tqdm import tqdm

    images = runs.once(lambda: [(path, image_size(path)) for path in runs.find_images(image_dir)])
    if directory.resolve() == image_dir.resolve():
        raise UserError(f"{directory}: would overwrite the inputs")
    utils.check_directory(directory)
    runs.once(lambda: utils.check_own(directory / "report.csv"))
    items = [runs.Item(path, directory / f"{path.stem}.png", size, path.name) for path, size in images]
    is_first = runs.processes().is_main_process
    if is_first:
        protector.config.warn_of(size for _, size in images)

    def load(item: runs.Item) -> Subject:
        return protector.load(item.source)

    def work(batch: list[runs.Item], subjects: list[Subject], wanted: list[bool]) -> runs.Facts:
        outputs = [item.output if is_wanted else None for item, is_wanted in zip(batch, wanted, strict=True)]
        with progress_bar(protector.num_iters, protector.name, shown=is_first) as step:
            reports = protector.save(subjects, outputs, step)
        for report in reports:
            tqdm.write(str(report))
        sys.stdout.flush()
        return [report.facts() for report in reports]

    settings, prepare = protector.settings(), protector.preload
    job = runs.Job(items, load, work, directory, settings, options, prepare=prepare, unit="portrait")
    status = job.run()
    if is_first:
        write_report(directory)
    return status


def write_report(directory: Path) -> None:
    """Writes report.csv: each file's measurements, taken when it was written. Raises UserError."""
    import pandas as pd

    lines = [entry for entry in runs.read_manifest(directory).values() if "linf" in entry]
    if not lines:
        return
    table = pd.DataFrame(lines).drop(columns=["source", "sha256", "bytes"])
    table.insert(0, "name", table.pop("output").map(lambda output: utils.csv_name(Path(output).stem)))
    text = table.sort_values("name").to_csv(index=False, float_format="%.6g")
    utils.write_own(directory / "report.csv", text.encode(errors="surrogateescape"))


if __name__ == "__main__":
    sys.exit(main())
