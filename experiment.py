"""The paper's experiment on a folder of portraits: its methods or others, one table, the pictures.

    python experiment.py --models=mini --image_dir=assets/portraits/mini --output_dir=experiment \\
        --budgets 0.06 --prompts=0,4,11,13,19,23
    python experiment.py --image_dir=portraits --output_dir=experiment --budgets 0.02 --step_size=0.003
    python experiment.py --image_dir=portraits --output_dir=purified --methods facelock \\
        --purify jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10

Writes OUTPUT_DIR/protected/METHOD/budget_{B}/, OUTPUT_DIR/edits/clean and METHOD/budget_{B}, the table of all
metrics (all_metric.csv and .md, per_image.csv) and figure.png; for each of --purify the same below
OUTPUT_DIR/purified/, and purified.png; all of it as a page, report.html. Run again, it goes on where it was.
What fails for single portraits is told and left out of the table, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent / "evaluation"))  # its files find each other by name

import eval_all
import figure
import outputs
import purify
import report
from pairing import Edits, find_edits

import runs
import utils
from defend import BUDGET_HELP, add_method_arguments
from main_defend import protect_directory
from main_edit import edit_directory
from methods import METHODS, Run
from models import sets
from protection import Protector

PAPER = ("noise", "encoder", "vae", "cw", "facelock")  # the methods of its tables
SOME_PROMPTS = (0, 4, 11, 13, 19, 23)  # of the picture, where all were used
SLOW = 0.002  # s a unit of work; a part that took less was there already and says nothing of the rest


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="directory of portraits")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where everything goes")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=("all", *METHODS),
        default=PAPER,
        metavar="METHOD",
        help=f"all, or some of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--budgets", nargs="+", type=utils.budget_size, default=[Run.budget], metavar="B", help=BUDGET_HELP
    )
    parser.add_argument(
        "--prompts", type=utils.number_list, metavar="I,J,...", help="numbers of instructions (default: all)"
    )
    parser.add_argument("--prompt_file", type=utils.path, help="one's own instructions, as in main_edit.py")
    parser.add_argument(
        "--purify",
        nargs="+",
        type=purifier,
        default=[],
        metavar="STEPS",
        help="what is done to the pictures before they are edited, as in evaluation/purify.py",
    )
    parser.add_argument(
        "--seed",
        nargs="+",
        type=utils.known_seed,
        default=[0],
        help="of the editor's noise, one or more; the first is the random start's, too",
    )
    add_method_arguments(parser)
    runs.add_run_arguments(parser)
    parser.set_defaults(batch_size=8)
    sets.add_face_arguments(parser)
    sets.add_perceptual_argument(parser)
    sets.add_clip_argument(parser)
    sets.add_edit_arguments(parser)
    return parser.parse_args(argv)


def purifier(text: str) -> tuple[str, list[purify.Step]]:
    """argparse type: `jpeg:75+resize:0.5` -> the name of its directory, and its steps."""
    return text.replace(":", "-"), purify.chain(text)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


@dataclass
class Parts:
    """The parts of an experiment in order, with what each will probably cost."""

    parts: list[tuple[str, float, Callable[[], int]]] = field(default_factory=list)

    def add(self, name: str, weight: float, work: Callable[[], int]) -> None:
        """Adds a part. weight: its passes through a network, so that only ratios count."""
        self.parts.append((name, weight, work))

    def run(self) -> int:
        """Goes through all parts and says how long it will still take -> the worst exit status."""
        status, spent, done = 0, 0.0, 0.0
        for place, (name, weight, work) in enumerate(self.parts):
            left = sum(part[1] for part in self.parts[place:]) * spent / done / 60 if done else 0
            about = f" (about {left:.0f} minutes left)" if left >= 1 else ""
            print(f"[{place + 1}/{len(self.parts)}] {name}{about}", flush=True)
            began = time.perf_counter()
            status = max(status, work())
            took = time.perf_counter() - began
            if status > 128:  # stopped by a signal
                return status
            if took > SLOW * weight:
                spent, done = spent + took, done + weight
        return status


@dataclass(frozen=True)
class Rows:
    """The rows of one table: where their pictures and edits are, and how they come about."""

    root: Path  # of the table
    pictures: dict[str, Path]  # by row: `clean`, METHOD/budget_{B}; what is edited
    seeds: Sequence[int]

    def edits(self, row: str) -> Path:
        """Gives the directory of a row's edits."""
        return self.root / "edits" / row

    def found(self, image_dir: Path, prompts: dict[int, str], prompt_file: Path | None) -> Edits:
        """Pairs the edits; what failed in one row is left out of all. Raises UserError."""
        rows = [self.edits(row) for row in self.pictures if row != "clean"]
        return find_edits(
            rows,
            self.seeds,
            clean_edit_dir=self.edits("clean"),
            src_dir=image_dir,
            prompts=list(prompts),
            prompt_file=prompt_file,
            common=True,
        )


def run(args: argparse.Namespace) -> int:
    """Makes what the flags ask for and isn't there yet, and says what came out -> exit status."""
    began = time.perf_counter()
    prompts = utils.choose_prompts(args.prompts, args.prompt_file)
    n_images = len(runs.find_images(args.image_dir))
    utils.check_directory(args.output_dir)
    protectors = {
        f"{method}/budget_{budget}": Protector(
            argparse.Namespace(
                **vars(args) | {"defend_method": method, "attack_budget": budget, "seed": args.seed[0]}
            )
        )
        for budget in sorted(set(args.budgets))
        for method in dict.fromkeys(METHODS if "all" in args.methods else args.methods)
    }
    for protector in protectors.values():
        protector.preload()
    chosen = sets.choose(args)
    chosen.load_editor()
    judged = dataclasses.replace(chosen, dtype=utils.pick_dtype("fp32", chosen.device))
    options = runs.Options.of(args)
    edit_passes = n_images * len(prompts) * len(args.seed) * chosen.settings["num_inference_steps"]
    parts = Parts()

    def add_rows(rows: Rows) -> None:
        """Adds the edits of all rows, their table, and the picture beside it."""
        for row, pictures in rows.pictures.items():
            for seed in args.seed:
                where = rows.edits(row) / f"seed{seed}"
                parts.add(
                    f"edit {row}",
                    edit_passes / len(args.seed),
                    partial(edit_directory, pictures, where, prompts, seed, chosen, options),
                )
        score = partial(make_table, rows, args, prompts, judged)
        parts.add("score", len(rows.pictures) * edit_passes / 20, score)

    protected = {row: args.output_dir / "protected" / row for row in protectors}
    for row, protector in protectors.items():
        passes = n_images * (1 + 4 * protector.run.num_iters * bool(protector.method.reads))
        work = partial(protect_directory, args.image_dir, protected[row], protector, options, runs.ALONE)
        parts.add(f"protect {row}", passes, work)
    add_rows(Rows(args.output_dir, {"clean": args.image_dir, **protected}, args.seed))
    for name, steps in args.purify:
        root = args.output_dir / "purified" / name
        pictures = {}
        for row, source in {"clean": args.image_dir, **protected}.items():
            pictures[row] = root / "pictures" / row
            work = partial(
                purify.purify_directory, source, pictures[row], steps, args.seed[0], chosen, options
            )
            parts.add(f"purify {row}: {name}", n_images, work)
        add_rows(Rows(root, pictures, args.seed))
    status = parts.run()
    if status > 128:
        return status
    if args.purify:
        files = {"none": args.output_dir / "all_metric.csv"}
        for name, _ in args.purify:
            files[name] = args.output_dir / "purified" / name / "all_metric.csv"
        figure.make_plot(files, args.output_dir / "purified.png", "facial_judge")
    print(verdict(args.output_dir, judged.models, (time.perf_counter() - began) / 60))
    report.make_report(args.output_dir, args.output_dir / "report.html")
    return status


def make_table(
    rows: Rows, args: argparse.Namespace, prompts: dict[int, str], judged: sets.Chosen
) -> int:
    """Scores all rows of a table and draws its picture -> exit status. Raises UserError."""
    edits = rows.found(args.image_dir, prompts, args.prompt_file)
    protected = [pictures for row, pictures in rows.pictures.items() if row != "clean"]
    plain = rows.root == args.output_dir  # purified pictures may be anywhere beyond the budget
    status = eval_all.evaluate(
        edits,
        judged,
        rows.root / "all_metric.csv",
        per_image=rows.root / "per_image.csv",
        protected_dirs=protected if plain else (),
    )
    some = list(prompts) if args.prompts else [i for i in SOME_PROMPTS if i in prompts]
    names = edits.names[: 2 if len(protected) == 1 else 1]
    shown = find_edits(
        [row.directory for row in edits.rows],
        args.seed[:1],
        clean_edit_dir=edits.clean.directory,
        src_dir=args.image_dir,
        prompts=some or list(prompts)[:6],
        prompt_file=args.prompt_file,
        names=names,
    )
    titles = ["" if len(protected) == 1 else row for row in rows.pictures if row != "clean"]
    figure.make_grid(shown, protected, rows.root / "figure.png", names, titles, len(protected) == 1)
    return status


def verdict(output_dir: Path, models: str, minutes: float) -> str:
    """Says in words what came out, from the table that was written."""
    table = outputs.read_csv(output_dir / "all_metric.csv").set_index("method")
    table.index = [row.removeprefix(f"{output_dir / 'edits'}/") for row in table.index]
    lines = []
    for row, line in table.iterrows():
        lines.append(f"  {row}")
        for who, by in (("recogniser", ""), ("judge", "_judge")):
            found, nearest = (line[f"{what}{by}"] for what in ("recognised", "identified"))
            taken = "no threshold" if math.isnan(found) else f"recognised in {found:.0%} of the edits"
            lines.append(f"    {who}: FR {line[f'facial{by}']:.2f}, {taken}, identified in {nearest:.0%}")
    worth = "Weigh the judge's lines: the attack knows the recogniser, and others are not known to it."
    if models == "mini":
        worth = "The mini models are a stand-in: this tells nothing about how well a real photo is protected."
    return f"""
How much of the person is left in the edits, by the recogniser, which facelock attacks, and by a judge, which
no attack sees. FR is 1 for the same face and 0 for a stranger's; recognised: above the threshold for one
person; identified: nearest to its own source among all sources. All of it is better when it is lower:
{chr(10).join(lines)}
Look at {output_dir / "figure.png"}: a protected portrait should look like its source, and its edits
should show somebody else than the edits of the source (clean). Don't expect ruined pictures, nor that each
face is gone; what the judge still finds, others may find, too.
{worth}
It took {minutes:.1f} minutes; all metrics are in {output_dir / "all_metric.md"}.
Next: python defend.py --input_path=PHOTO, or every method in one table: make table IMAGES=DIR"""


if __name__ == "__main__":
    sys.exit(main())
