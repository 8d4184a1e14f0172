"""The paper's experiment on a folder of portraits: its methods or others, one table, the pictures.

    python experiment.py --models=mini --image_dir=assets/portraits/mini --output_dir=experiment \\
        --budgets 0.06 --prompts=0,4,11,13,19,23
    python experiment.py --image_dir=portraits --output_dir=experiment --budgets 0.02 --step_size=0.003
    python experiment.py --image_dir=portraits --output_dir=purified --methods facelock \\
        --purify jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
    python experiment.py --image_dir=portraits --output_dir=transfer --methods facelock \\
        --edit_models instruct-pix2pix flux2-klein

Writes OUTPUT_DIR/protected/METHOD/budget_{B}/, OUTPUT_DIR/edits/clean and METHOD/budget_{B}, the table of all
metrics (all_metric.csv and .md, per_image.csv) and figure.png; for each of --purify the same below
OUTPUT_DIR/purified/, and purified.csv, .md and .png; for the second and further of --edit_models the same
below OUTPUT_DIR/editors/, and transfer.csv and .md; all of it as a page, report.html. Run again, it goes on
where it was. What fails for single portraits is named and left out, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent / "evaluation"))  # its files find each other by name

import eval_all
import figure
import outputs
import purify
import report
import summary
from pairing import Edits, find_edits

import runs
import utils
from defend import BUDGET_HELP, add_method_arguments, settings_of
from loops import Run
from main_defend import protect_directory
from main_edit import edit_directory
from methods import METHODS
from models.config import (
    MODEL_SETS,
    NAME_HELP,
    ModelConfig,
    ModelSettings,
    add_clip_argument,
    add_edit_arguments,
    add_face_arguments,
    add_perceptual_argument,
    resolve,
    resolve_editor,
)
from models.editors import unload
from protection import Protector
from utils import UserError

PAPER = ("noise", "encoder", "vae", "cw", "facelock")  # the methods of its tables
SOME_PROMPTS = (0, 4, 11, 13, 19, 23)  # of the picture, where all were used
OF_TABLE = ("all_metric.csv", "all_metric.md", "all_metric_protected.csv", "per_image.csv", "figure.png")
OF_ALL = ("purified.csv", "purified.md", "purified.png", "transfer.csv", "transfer.md", "report.html")
SLOW = 0.002  # s a unit of work; a part that took less was there already and says nothing of the rest


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="directory of portraits")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where everything goes")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_at,
        metavar="METHOD[@B]",
        help=f"all, or some of {', '.join(METHODS)}; @B: at a budget of its own (default: {' '.join(PAPER)})",
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
    text = f"who edits what is protected against --model; several show what carries over: {NAME_HELP}"
    parser.add_argument("--edit_models", nargs="+", metavar="EDITOR", default=[], help=text)
    add_method_arguments(parser)
    runs.add_run_arguments(parser)
    parser.set_defaults(batch_size=8)
    add_face_arguments(parser)
    add_perceptual_argument(parser)
    add_clip_argument(parser)
    add_edit_arguments(parser)
    return parser.parse_args(argv)


def method_at(text: str) -> tuple[str, float | None]:
    """argparse type: `facelock@0.06` -> a method or `all`, and its own budget; None: those of --budgets."""
    name, at, budget = text.partition("@")
    if name not in ("all", *METHODS):
        raise argparse.ArgumentTypeError(f"{name!r} is none of all, {', '.join(METHODS)}")
    return name, utils.budget_size(budget) if at else None


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
    image_dir: Path
    prompts: dict[int, str]
    prompt_file: Path | None
    seeds: Sequence[int]

    def edits(self, row: str) -> Path:
        """Gives the directory of a row's edits."""
        return self.root / "edits" / row

    def found(self) -> Edits:
        """Pairs the edits; what failed in one row is left out of all. Raises UserError."""
        rows = [self.edits(row) for row in self.pictures if row != "clean"]
        return find_edits(
            rows,
            self.seeds,
            clean_edit_dir=self.edits("clean"),
            src_dir=self.image_dir,
            prompts=list(self.prompts),
            prompt_file=self.prompt_file,
            common=True,
        )


def run(args: argparse.Namespace) -> int:
    """Makes what the flags ask for and isn't there yet, and says what came out -> exit status."""
    began = time.perf_counter()
    prompts = utils.choose_prompts(args.prompts, args.prompt_file)
    n_images = len(runs.find_images(args.image_dir))
    utils.check_directory(args.output_dir)
    wanted = dict.fromkeys(
        (method, budget)
        for name, own in args.methods or map(method_at, PAPER)
        for method in (METHODS if name == "all" else [name])
        for budget in ([own] if own else args.budgets)
    )
    settings = settings_of(args)
    protectors = {
        f"{method}/budget_{budget}": Protector(settings, method=method, budget=budget, seed=args.seed[0])
        for method, budget in sorted(wanted, key=lambda pair: pair[1])
    }
    for protector in protectors.values():
        protector.preload()
    wanted = ModelSettings.of(args)
    named = [resolve_editor(wanted, name) for name in args.edit_models]
    config, *others = named or [resolve(wanted)]
    editors = {name_of(editor): editor for editor in [config, *others]}
    if len(editors) <= len(others):
        raise UserError(f"--edit_models: one of them twice ({' '.join(args.edit_models)})")
    if not config.judges:
        raise UserError("the attack sees all the judges: name others with --judge")
    config.load_editor()
    for editor in others:
        editor.check_editor()
    judged = dataclasses.replace(config, dtype=utils.pick_dtype("fp32", config.device))
    options = runs.Options.of(args)
    some = list(prompts) if args.prompts else [i for i in SOME_PROMPTS if i in prompts] or list(prompts)[:6]
    asked = {"image_dir": args.image_dir, "prompts": prompts, "prompt_file": args.prompt_file}
    rows_of = partial(Rows, **asked, seeds=args.seed)
    parts = Parts()
    roots = [args.output_dir, *(args.output_dir / "purified" / name for name, _ in args.purify)]
    roots += [args.output_dir / "editors" / name_of(editor) for editor in others]
    files = [root / name for root in roots for name in OF_TABLE]
    files += [args.output_dir / name for name in OF_ALL]
    outputs.check_outputs(files, suffixes=(".csv", ".md", ".png", ".html"))

    def add_rows(rows: Rows, editor: ModelConfig = config) -> None:
        """Adds the edits of all rows, their table, and the picture beside it."""
        edit_passes = n_images * len(prompts) * len(args.seed) * editor.settings["num_inference_steps"]
        for row, pictures in rows.pictures.items():
            for seed in args.seed:
                where = rows.edits(row) / f"seed{seed}"
                runs.check_ours(where)
                parts.add(
                    f"edit {row}" + (f" by {name_of(editor)}" if others else ""),
                    edit_passes / len(args.seed),
                    partial(edit_directory, pictures, where, prompts, seed, editor, options),
                )
        score = partial(make_table, rows, judged, some, is_protected=rows.root == args.output_dir)
        parts.add("score", len(rows.pictures) * edit_passes / 20, score)

    protected = {row: args.output_dir / "protected" / row for row in protectors}
    for row, protector in protectors.items():
        passes = n_images * (1 + 4 * protector.run.num_iters * bool(protector.method.reads))
        runs.check_ours(protected[row])
        utils.check_own(protected[row] / "report.csv")
        work = partial(protect_directory, args.image_dir, protected[row], protector, options)
        parts.add(f"protect {row}", passes, work)
    add_rows(rows_of(args.output_dir, {"clean": args.image_dir, **protected}))
    for name, steps in args.purify:
        root = args.output_dir / "purified" / name
        pictures = {}
        for row, source in {"clean": args.image_dir, **protected}.items():
            pictures[row] = root / "pictures" / row
            runs.check_ours(pictures[row])
            work = partial(
                purify.purify_directory, source, pictures[row], steps, args.seed[0], config, options
            )
            parts.add(f"purify {row}: {name}", n_images, work)
        add_rows(rows_of(root, pictures))
    roots = {name_of(config): args.output_dir}
    for editor in others:
        roots[name_of(editor)] = root = args.output_dir / "editors" / name_of(editor)
        parts.add(f"make room for {name_of(editor)}", 0, partial(make_room, protectors.values()))
        add_rows(rows_of(root, {"clean": args.image_dir, **protected}), editor)
    status = parts.run()
    if status > 128:
        return status
    if others:
        attacked = {row: protector for row, protector in protectors.items() if "vae" in protector.needs}
        names = {row: " + ".join(map(name_of, one.attacked)) for row, one in attacked.items()}
        print(summary.transfer(roots, names, args.output_dir / "transfer.csv"))
    plots: list[Callable[[], object]] = []
    if args.purify:
        roots = {name: args.output_dir / "purified" / name for name, _ in args.purify}
        roots = {"none": args.output_dir, **roots}
        print(summary.purified(roots, args.output_dir / "purified.csv"))
        files = {name: root / "all_metric.csv" for name, root in roots.items()}
        plots.append(partial(figure.make_plot, files, args.output_dir / "purified.png", "left"))
    print(summary.verdict(args.output_dir, judged.models, (time.perf_counter() - began) / 60))
    plots.append(partial(report.make_report, args.output_dir, args.output_dir / "report.html"))
    return max(status, *map(beside, plots))


def beside(draw: Callable[[], object]) -> int:
    """Draws what stands beside the tables; what goes wrong with it costs nothing else -> exit status."""
    try:
        draw()
    except Exception as error:  # of matplotlib, jinja2, a font...
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(utils.one_line(f"error: not drawn: {name}{utils.first_line(error)}"), file=sys.stderr)
        return 1
    return 0


def make_room(protectors: Iterable[Protector]) -> int:
    """Forgets the editors that are loaded, whoever holds them -> exit status."""
    for protector in protectors:
        protector.denoisers.clear()
    unload()
    return 0


def make_table(rows: Rows, judged: ModelConfig, prompts: Sequence[int], is_protected: bool) -> int:
    """Scores all rows of a table and draws its picture -> exit status. Raises UserError.

    prompts: of the picture; is_protected: whether the rows' pictures must be within their budgets.
    """
    edits = rows.found()
    protected = [pictures for row, pictures in rows.pictures.items() if row != "clean"]
    status = eval_all.evaluate(
        edits,
        judged,
        rows.root / "all_metric.csv",
        per_image=rows.root / "per_image.csv",
        protected_dirs=protected if is_protected else (),
    )
    return max(status, beside(partial(draw_grid, rows, prompts, edits, protected)))


def draw_grid(rows: Rows, prompts: Sequence[int], edits: Edits, protected: list[Path]) -> None:
    """Draws the picture beside a table. Raises UserError."""
    names = edits.names[: 2 if len(protected) == 1 else 1]
    shown = find_edits(
        [row.directory for row in edits.rows],
        rows.seeds[:1],
        clean_edit_dir=edits.clean.directory,
        src_dir=rows.image_dir,
        prompts=prompts,
        prompt_file=rows.prompt_file,
        names=names,
    )
    titles = ["" if len(protected) == 1 else row for row in rows.pictures if row != "clean"]
    figure.make_grid(shown, protected, rows.root / "figure.png", names, titles, len(protected) == 1)


def name_of(editor: ModelConfig) -> str:
    """Names an editor in a table and a directory: its kind, and its id where that is not the set's own."""
    own = MODEL_SETS[editor.models].editors.get(editor.kind)
    return editor.kind if editor.model_id == own else f"{editor.kind}-{Path(editor.model_id).name}"


if __name__ == "__main__":
    sys.exit(main())
