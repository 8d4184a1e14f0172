"""The paper's experiment on a folder of portraits: its methods or others, one table, the pictures.

    python experiment.py --models=mini --image_dir=assets/portraits/mini --output_dir=experiment \\
        --budgets 0.06 --prompts=0,4,11,13,19,23
    python experiment.py --image_dir=portraits --output_dir=experiment --budgets 0.02 --step_size=0.003
    python experiment.py --image_dir=portraits --output_dir=purified --methods facelock \\
        --purify jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
    python experiment.py --image_dir=portraits --output_dir=transfer --methods facelock \\
        --edit_models instruct-pix2pix flux2-klein

Writes OUTPUT_DIR/protected/METHOD/budget_{B}/, OUTPUT_DIR/edits/clean and METHOD/budget_{B}, the table of all
metrics (all_metric.csv, .md and .json, per_image.csv) and figure.png; for each of --purify the same below
OUTPUT_DIR/purified/, and purified.csv, .md and .png; for the second and further of --edit_models the same
below OUTPUT_DIR/editors/, and transfer.csv and .md; all of it as a page, report.html. Run again, it resumes
where it stopped. Portraits that fail are named and left out, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import runs
import utils
from defend import BUDGET_HELP, add_method_arguments, settings_of
from evaluation import eval_all, figure, leaderboard, purify, report, summary, tables
from evaluation.features import people_of
from evaluation.pairing import Edits, find_edits, find_references
from evaluation.scoring import LATEX_HELP
from images import images_by_stem
from main_defend import protect_directory
from main_edit import edit_directory
from methods import METHODS
from models.config import (
    ATTACK,
    MODEL_SETS,
    NAME_HELP,
    ModelConfig,
    ModelSettings,
    add_model_arguments,
    prompts_of,
    resolve,
    resolve_editor,
)
from models.editors import EDITORS, unload
from protection import Protector, methods_for
from provenance import versions
from utils import UserError

PAPER = ("noise", "encoder", "vae", "cw", "facelock")  # the methods of its tables
SOME_PROMPTS = (0, 4, 11, 13, 19, 23)  # shown in the picture, if all were used
OF_TABLE = ("all_metric.csv", "all_metric.md", "all_metric.json", "per_image.csv", "figure.png")
OF_TABLE += ("all_metric_protected.csv", "all_metric_minus_baseline.csv")
OF_ALL = ("purified.csv", "purified.md", "purified.png", "transfer.csv", "transfer.md", "report.html")
OF_LATEX = ("all_metric.tex", "purified.tex", "transfer.tex")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    add = parser.add_argument
    add("--image_dir", type=utils.path, required=True, help="directory of portraits")
    add("--output_dir", type=utils.path, required=True, help="where everything goes")
    text = f"all (those that suit --model), or some of {', '.join(METHODS)}; @B: at its own budget B"
    text = f"{text} (default: {' '.join(PAPER)})"
    add("--methods", nargs="+", type=method_at, metavar="METHOD[@B]", help=text)
    text = f"{BUDGET_HELP} (default: each method's own)"
    add("--budgets", nargs="+", type=utils.budget_size, metavar="B", help=text)
    utils.add_prompt_arguments(parser)
    text = "what is done to the pictures before they are edited: jpeg:75, or one after the other "
    text += "jpeg:75+resize:0.5; for the full list: evaluation/purify.py --help"
    add("--purify", nargs="+", type=purifier, default=[], metavar="STEPS", help=text)
    text = "seeds of the editor's noise, one or more; the first also seeds the random start"
    add("--seed", nargs="+", type=utils.known_seed, default=[0], help=text)
    text = f"editors to try on what is protected against --model; several show transfer: {NAME_HELP}"
    add("--edit_models", nargs="+", metavar="EDITOR", default=[], help=text)
    text = "other photos of the people, NAME.* or NAME/*, to compare faces with instead of the sources"
    add("--reference_dir", type=utils.path, help=text)
    text = "a method, METHOD@B or clean, to compare the others with, in pairs"
    add("--baseline", metavar="METHOD[@B]", help=text)
    add("--latex", action="store_true", help=LATEX_HELP)
    text = "a Markdown file, to whose leaderboard the methods' rows are added; created if missing"
    add("--leaderboard", type=utils.path, metavar="FILE", help=text)
    add_method_arguments(parser)
    runs.add_run_arguments(parser)
    parser.set_defaults(batch_size=8)
    add_model_arguments(parser, "edit", *ATTACK, "clip")
    return parser.parse_args(argv)


def method_at(text: str) -> tuple[str, float | None]:
    """argparse type: `facelock@0.06` -> a method or `all`, and its own budget; None: those of --budgets."""
    name, at, budget = text.partition("@")
    if name not in ("all", *METHODS):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of all, {', '.join(METHODS)}")
    return name, utils.budget_size(budget) if at else None


def purifier(text: str) -> tuple[str, list[purify.Step]]:
    """argparse type: `jpeg:75+resize:0.5` -> the name of its directory, and its steps."""
    return text.replace(":", "-"), purify.chain(text)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


Part = tuple[str, Callable[[], int]]  # its name, and what makes it -> exit status


@dataclass(frozen=True)
class Table:
    """Describes one table: its folder, what each row edits (`clean`, METHOD/budget_{B}), and its editor."""

    root: Path
    pictures: dict[str, Path]
    editor: ModelConfig

    @property
    def edits(self) -> dict[str, Path]:
        """Returns the directory of each row's edits."""
        return {row: self.root / "edits" / row for row in self.pictures}


@dataclass(frozen=True)
class Experiment:
    """Holds what the flags ask for."""

    image_dir: Path
    output_dir: Path
    prompts: dict[int, str]
    prompt_file: Path | None
    shown: Sequence[int]  # the numbers of the prompts in the pictures
    seeds: Sequence[int]
    protectors: dict[str, Protector]  # by row
    config: ModelConfig  # of the first editor
    others: Sequence[ModelConfig]
    purifiers: Sequence[tuple[str, list[purify.Step]]]
    options: runs.Options
    reference_dir: Path | None = None  # other photos of the people
    baseline: str | None = None  # a row
    latex: bool = False
    leaderboard: Path | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Experiment:
        """Reads the flags, and loads the models. Raises UserError."""
        wanted = ModelSettings.of(args)
        named = [resolve_editor(wanted, name) for name in args.edit_models]
        config, *others = named or [resolve(wanted)]
        if len({one.editor.by_words for one in (config, *others)}) > 1:
            raise UserError("--edit_models: edits by words and round trips can't share a table")
        prompts = prompts_of(config.kind, args.prompts, args.prompt_file)
        runs.find_images(args.image_dir)
        utils.check_directory(args.output_dir)
        if len({name_of(editor) for editor in named}) < len(named):
            raise UserError(f"--edit_models: an editor is named twice ({' '.join(args.edit_models)})")
        if not config.judges:
            raise UserError("the attack sees every judge: name others with --judge")
        protectors = protectors_of(args)
        baseline = find_baseline(args.baseline, list(protectors)) if args.baseline else None
        for protector in protectors.values():
            protector.preload()
        config.load_editor()
        for editor in others:
            editor.check_editor()
        shown = [number for number in SOME_PROMPTS if number in prompts] or list(prompts)[:6]
        shown = list(prompts) if args.prompts else shown
        asked = args.image_dir, args.output_dir, prompts, args.prompt_file, shown, args.seed
        how = runs.Options.of(args), args.reference_dir, baseline, args.latex, args.leaderboard
        return cls(*asked, protectors, config, others, args.purify, *how)

    @property
    def protected(self) -> dict[str, Path]:
        """Returns the directory of each row's protected portraits."""
        return {row: self.output_dir / "protected" / row for row in self.protectors}

    def tables(self) -> list[Table]:
        """Lists the tables: the main one, one for each purifier, one for each further editor."""
        pictures = {"clean": self.image_dir, **self.protected}
        found = [Table(self.output_dir, pictures, self.config)]
        for name, _ in self.purifiers:
            root = self.output_dir / "purified" / name
            found.append(Table(root, {row: root / "pictures" / row for row in pictures}, self.config))
        for editor in self.others:
            found.append(Table(self.output_dir / "editors" / name_of(editor), pictures, editor))
        return found

    def check(self) -> None:
        """Refuses, before any work, to replace somebody else's files. Raises UserError."""
        files = [self.output_dir / name for name in OF_ALL + (OF_LATEX[1:] if self.latex else ())]
        folders = [*self.protected.values()]
        for table in self.tables():
            files += [table.root / name for name in OF_TABLE + (OF_LATEX[:1] if self.latex else ())]
            folders += [path for path in table.pictures.values() if path != self.image_dir]
            folders += [path / f"seed{seed}" for path in table.edits.values() for seed in self.seeds]
        tables.check_outputs(files, suffixes=(".csv", ".md", ".json", ".tex", ".png", ".html"))
        if self.leaderboard:
            leaderboard.read_board(self.leaderboard)
        others = self.reference_dir and find_references(self.reference_dir, images_by_stem(self.image_dir))
        by = eval_all.networks_of(self.config, self.config.editor.by_words) | people_of({}, others or {})
        for table in [] if self.options.overwrite else self.tables():
            way_out = "choose another --output_dir, or --overwrite"
            tables.check_networks(table.root / "all_metric.csv", by, way_out)
        for folder in folders:
            runs.check_ours(folder)
        for row, protector in self.protectors.items():
            if seen := [one for one in self.config.judges if one not in protector.config.judges]:
                text = f"{row}: its network was trained against {', '.join(seen)}, so they can't judge it"
                raise UserError(f"{text}; name others with --judge")
        for folder in self.protected.values():
            utils.check_own(folder / "report.csv")

    def parts(self) -> list[Part]:
        """Lists what has to be done, in order."""
        found: list[Part] = []
        for row, protector in self.protectors.items():
            arguments = self.image_dir, self.protected[row], protector, self.options
            found.append((f"protect {row}", partial(protect_directory, *arguments)))
        main, *others = self.tables()
        found += self.table_parts(main)
        for (name, steps), table in zip(self.purifiers, others, strict=False):
            for row, output in table.pictures.items():
                arguments = main.pictures[row], output, steps, self.seeds[0], self.config, self.options
                found.append((f"purify {row}: {name}", partial(purify.purify_directory, *arguments)))
            found += self.table_parts(table)
        for table in others[len(self.purifiers) :]:
            found.append((f"make room for {name_of(table.editor)}", unload))
            found += self.table_parts(table)
        return found

    def table_parts(self, table: Table) -> list[Part]:
        """Lists the parts of a table: the edits of its rows, its values, and the picture beside it."""
        by = f" by {name_of(table.editor)}" if self.others else ""
        found: list[Part] = []
        for row, pictures in table.pictures.items():
            for seed in self.seeds:
                folder = table.edits[row] / f"seed{seed}"
                arguments = pictures, folder, self.prompts, seed, table.editor, self.options
                found.append((f"edit {row}{by}", partial(edit_directory, *arguments)))
        return [*found, ("score", partial(self.score, table))]

    def pair(self, table: Table, seeds: Sequence[int], prompts: Sequence[int], **how: Any) -> Edits:
        """Pairs the edits of a table's rows. Raises UserError."""
        rows = table.edits
        how |= {"clean_edit_dir": rows.pop("clean"), "src_dir": self.image_dir}
        how |= {"prompts": prompts, "prompt_file": self.prompt_file, "reference_dir": self.reference_dir}
        return find_edits([*rows.values()], seeds, **how)

    def score(self, table: Table) -> int:
        """Scores all rows of a table and draws its picture -> exit status. Raises UserError."""
        edits = self.pair(table, self.seeds, list(self.prompts), common=True)  # only what no row lacks
        judged = replace(self.config, dtype=utils.pick_dtype("fp32", self.config.device))
        how = {"per_image": table.root / "per_image.csv", "latex": self.latex, "overwrite": True}
        if self.baseline:
            how["baseline"] = str(table.edits[self.baseline])
        if table.root == self.output_dir:  # purified pictures keep to no budget
            how["protected_dirs"] = list(self.protected.values())
        status = eval_all.evaluate(edits, judged, table.root / "all_metric.csv", **how)
        return max(status, beside(lambda: self.draw(table, edits.names)))

    def draw(self, table: Table, names: Sequence[str]) -> None:
        """Draws the picture beside a table. Raises UserError."""
        rows = [row for row in table.pictures if row != "clean"]
        is_alone = len(rows) == 1
        shown = self.pair(table, self.seeds[:1], self.shown, names=names[: 2 if is_alone else 1])
        pictures, titles = [table.pictures[row] for row in rows], [""] if is_alone else rows
        figure.make_grid(shown, pictures, table.root / "figure.png", shown.names, titles, is_alone)

    def sum_up(self, minutes: float) -> int:
        """Writes the comparisons of the tables, and the report -> exit status."""
        main, *others = self.tables()
        output, status = self.output_dir, 0
        if self.others:
            attacked = {row: one for row, one in self.protectors.items() if "vae" in one.needs}
            names = {row: " + ".join(map(name_of, one.attacked)) for row, one in attacked.items()}
            roots = {name_of(table.editor): table.root for table in [main, *others[len(self.purifiers) :]]}
            print(summary.transfer(roots, names, output / "transfer.csv", self.latex))
        if self.purifiers:
            roots = {"none": output, **{name: output / "purified" / name for name, _ in self.purifiers}}
            print(summary.purified(roots, output / "purified.csv", self.latex))
            files = {name: root / "all_metric.csv" for name, root in roots.items()}
            status = beside(lambda: figure.make_plot(files, output / "purified.png", "left"))
        if self.leaderboard:
            command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
            about = {"commit": versions().get("commit", ""), "command": f"`{command}`"}
            rows = leaderboard.rows_of(output, bool(self.purifiers), bool(self.others), about)
            leaderboard.add(self.leaderboard, rows)
        print(summary.verdict(output, self.config.models, minutes))
        return max(status, beside(lambda: report.make_report(output, output / "report.html")))


def protectors_of(args: argparse.Namespace) -> dict[str, Protector]:
    """Makes the protectors that the flags ask for, by row, the smallest budget first. Raises UserError."""
    wanted = dict.fromkeys(
        (method, budget)
        for name, own in args.methods or map(method_at, PAPER)
        for method in (methods_for(EDITORS[args.model]) if name == "all" else [name])
        for budget in ([own] if own else args.budgets or [None])
    )
    settings = replace(settings_of(args), seed=args.seed[0])
    made = [Protector(settings, method=method, budget=budget) for method, budget in wanted]
    made.sort(key=lambda one: one.run.budget)
    return {f"{one.name}/budget_{one.run.budget}": one for one in made}


def find_baseline(wanted: str, rows: Sequence[str]) -> str:
    """Finds the one row that --baseline names: METHOD, METHOD@B or clean. Raises UserError."""
    name = wanted.replace("@", "/budget_")
    found = [row for row in ["clean", *rows] if name in (row, row.partition("/")[0])]
    if len(found) != 1:
        known = " ".join(row.replace("/budget_", "@") for row in rows)
        called = f"{len(found)} rows have" if found else "no row has"
        raise UserError(f"--baseline {wanted}: {called} this name (there are clean {known})")
    return found[0]


def run(args: argparse.Namespace) -> int:
    """Makes what the flags ask for, unless it exists already, and prints the result -> exit status."""
    began = time.perf_counter()
    experiment = Experiment.of(args)
    experiment.check()
    status = go_through(experiment.parts())
    if status > 128:
        return status
    return max(status, experiment.sum_up((time.perf_counter() - began) / 60))


def go_through(parts: Sequence[Part]) -> int:
    """Makes all parts, or as many as a signal allows -> the worst exit status."""
    from tqdm import tqdm

    status = 0
    bar = tqdm(parts, unit="part")
    for name, work in bar:
        bar.set_description(name)
        status = max(status, work())
        if status > 128:  # stopped by a signal
            break
    return status


def beside(draw: Callable[[], object]) -> int:
    """Draws an addition to the tables; if that fails, it prints why and the rest goes on -> exit status."""
    try:
        draw()
    except Exception as error:  # of matplotlib, jinja2, a font...
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(utils.one_line(f"error: not drawn: {name}{utils.first_line(error)}"), file=sys.stderr)
        return 1
    return 0


def name_of(editor: ModelConfig) -> str:
    """Names an editor in tables and directories: its kind, and its id unless it is the set's own."""
    if editor.vae_id:  # attacked in place of the editor's own
        return Path(editor.vae_id).name
    own = MODEL_SETS[editor.models].editors.get(editor.kind)
    return editor.kind if editor.model_id == own else f"{editor.kind}-{Path(editor.model_id).name}"


if __name__ == "__main__":
    sys.exit(main())
