"""What the evaluation scripts share: finding edits, pairing them by file stem, scoring, intervals, tables.

Directories, as main_edit.py makes them: a *row* of a table is a directory that holds
`seed{S}/prompt{i}/NAME.png`. A given directory may be such a one, one above it (each matching child is a
row), or a `seed{S}` itself. A metric is a pure function of two batches; files are read here, each once.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

# The scripts of this folder run as `python eval_psnr.py` in it and as `python evaluation/eval_psnr.py`
# above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import runs
import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 9999
FEW_IMAGES = 30  # below this a bootstrap interval is only a hint
# Recorded flags that may well differ between the edits of one table
SEPARATE = runs.FREE | {"src_dir", "clean_edit_dir", "cheat"}


@dataclass(frozen=True)
class Row:
    """One line of a table: the edits of one method at one budget."""

    method: str
    directory: Path  # holds seed{S}


class Key(NamedTuple):
    """Which edit: the same one in every row."""

    seed: int
    prompt: int
    name: str  # the files' stem


Values = dict[Key, float]  # of one row


@dataclass(frozen=True)
class Edits:
    """All that is to be scored, paired by stem."""

    rows: list[Row]
    clean: Row | None  # the edits of the unprotected images, if they are given; may be one of the rows
    files: dict[Row, dict[Key, Path]]  # of the rows and of `clean`; the same keys in each
    sizes: dict[Path, tuple[int, int] | None]  # (H, W) of those files, None if the header can't be read
    sources: dict[str, Path]  # by stem; empty if none are given
    texts: dict[int, str]  # the instructions, where they are known
    baseline: Row | None  # one of the rows

    @property
    def keys(self) -> list[Key]:
        return list(self.files[self.rows[0]])

    @property
    def prompts(self) -> list[int]:
        return sorted({key.prompt for key in self.keys})


# ---------------------------------------------------------------------------------------------------------
# flags


def make_parser(doc: str, metric: str, *, sources: bool, clean: bool) -> argparse.ArgumentParser:
    """The flags of every evaluation script.

    metric: names its CSV file. sources, clean: whether --src_dir and --clean_edit_dir are needed; where the
    sources are, --clean_edit_dir can be given in any case.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=utils.HelpFormatter)
    if sources:
        parser.add_argument("--src_dir", type=Path, required=True, help="the source images")
    if sources or clean:
        row = ": the row 'clean'" if sources else ""
        parser.add_argument(
            "--clean_edit_dir", type=Path, required=clean, help=f"edits of the unprotected images{row}"
        )
    parser.add_argument(
        "--defend_edit_dirs",
        type=Path,
        nargs="+",
        required=True,
        help="edits of protected images: each holds seed{S}/, or holds directories that do",
    )
    parser.add_argument(
        "--seed", type=utils.known_seed, nargs="+", required=True, help="the S of seed{S}, one or more"
    )
    add_prompt_arguments(parser)
    parser.add_argument(
        "--common", action="store_true", help="score the images that all directories have and name the rest"
    )
    parser.add_argument("--baseline", metavar="ROW", help="a row that the others are compared with, in pairs")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"where the table goes (default: {metric}_metric.csv in the working directory)",
    )
    parser.add_argument("--per_image", type=Path, metavar="FILE", help="a CSV with one line an edit, too")
    parser.add_argument(
        "--batch_size", type=utils.positive_int, default=16, help="images that are scored together"
    )
    return parser


def check_outputs(*paths: Path | None) -> None:
    """Refuses tables that can't be written or would overwrite each other, before any work.

    Raises UserError.
    """
    given = [path for path in paths if path]
    for path in given:
        if path.is_dir():
            raise UserError(f"{path}: is a directory")
        utils.check_directory(path.absolute().parent)
    if len({path.resolve() for path in given}) < len(given):
        raise UserError(f"one table would overwrite the other: {' '.join(map(str, given))}")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompts and --prompt_file, of whatever reads edits."""
    parser.add_argument(
        "--prompts",
        type=utils.number_list,
        metavar="I,J,...",
        help="numbers of the instructions (default: all that were edited)",
    )
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="the instructions' texts, one a line (default: as the run.json of the edits has them, "
        "else the paper's)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """models.add_model_arguments, but in float32 on any device: a metric is not the place to save."""
    models.add_model_arguments(parser)
    parser.set_defaults(dtype="fp32")


# ---------------------------------------------------------------------------------------------------------
# directories


def find_rows(directories: Sequence[Path], seeds: Sequence[int]) -> list[Row]:
    """The rows that the given directories stand for; one that is named twice is one row.

    Raises UserError if a directory holds no seed{S}, or not all of them.
    """
    rows = []
    for given in directories:
        if not given.is_dir():
            raise UserError(f"{given}: no such directory")
        if re.fullmatch(r"seed\d+", given.resolve().name):
            if [int(given.resolve().name[4:])] != list(seeds):
                raise UserError(f"{given}: holds other edits than --seed {' '.join(map(str, seeds))}")
            rows.append(Row(_method(given), given.resolve().parent))
            continue
        if _holds_seeds(given, seeds):
            rows.append(Row(_method(given), given))
            continue
        children = [child for child in sorted(given.iterdir()) if child.is_dir()]
        found = [child for child in children if _holds_seeds(child, seeds)]
        if not found:
            wanted = ", ".join(f"seed{seed}" for seed in seeds)
            deeper = [str(child) for child in children if any(child.glob("*/seed*"))]
            hint = f", but in those of {', '.join(deeper)}" if deeper else ""
            raise UserError(f"{given}: no {wanted} in it or in its sub-directories{hint}")
        rows += [Row(_method(child), child) for child in found]
    return list({row.directory.resolve(): row for row in reversed(rows)}.values())[::-1]


def protected_rows(given: Sequence[Path]) -> list[Path]:
    """Directories of protected images: each given one, or its budget_{B}. Raises UserError."""
    found = []
    for directory in given:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        budgets = sorted(child for child in directory.glob("budget_*") if child.is_dir())
        found += budgets or [directory]
    return found


def _method(directory: Path) -> str:
    """A row's name: the path as it was given. `clean` alone is the unprotected edits'."""
    return "./clean" if str(directory) == "clean" else str(directory)


def clean_row(directory: Path, seeds: Sequence[int]) -> Row:
    """The row `clean`: the edits of the unprotected images.

    Raises UserError unless the directory is one row.
    """
    rows = find_rows([directory], seeds)
    if len(rows) > 1:
        found = ", ".join(row.method for row in rows)
        raise UserError(f"{directory}: which are the clean edits? ({found})")
    return Row("clean", rows[0].directory)


def _holds_seeds(directory: Path, seeds: Sequence[int]) -> bool:
    """Whether it holds seed{S}. Raises UserError if it holds some of them and not the others."""
    lacking = [f"seed{seed}" for seed in seeds if not (directory / f"seed{seed}").is_dir()]
    if lacking and len(lacking) < len(seeds):
        raise UserError(f"{directory}: {', '.join(lacking)} is missing")
    return not lacking


def prompts_of(rows: Sequence[Row], seeds: Sequence[int], asked: Sequence[int] | None) -> list[int]:
    """The prompts to score: those asked for, else all that any row has.

    Raises UserError if a row lacks one.
    """
    there = {
        (row, seed): {
            int(found[1])
            for child in (row.directory / f"seed{seed}").iterdir()
            if (found := re.fullmatch(r"prompt(\d+)", child.name)) and child.is_dir()
        }
        for row in rows
        for seed in seeds
    }
    prompts = sorted(set(asked) if asked is not None else set().union(*there.values()))
    if not prompts:
        raise UserError(f"{rows[0].directory}: no prompt folders in seed{seeds[0]}")
    lacking = [
        f"{row.directory}/seed{seed}: {', '.join(f'prompt{i}' for i in prompts if i not in numbers)}"
        for (row, seed), numbers in there.items()
        if not numbers.issuperset(prompts)
    ]
    if lacking:
        raise UserError(f"prompts are missing: {'; '.join(lacking)}")
    return prompts


def find_edits(
    args: argparse.Namespace, *, clean_is_row: bool, smallest: int = 0, needs_texts: bool = False
) -> Edits:
    """Finds what the flags name, pairs it by stem and checks all that can be checked without reading pixels.

    Every directory must have every stem that any has; with --common only those that all have are scored, and
    the rest is named on stderr. smallest: for metrics that compare with the clean edits, the side in px that
    they need; then edits must have the clean ones' size. needs_texts: whether each instruction must be known.
    Raises UserError naming what is missing or doesn't fit.
    """
    seeds = sorted(set(args.seed))
    rows = find_rows(args.defend_edit_dirs, seeds)
    clean = clean_row(args.clean_edit_dir, seeds) if args.clean_edit_dir else None
    if clean:  # it may lie beside the others, in a directory given for all of them
        given = {path.resolve() for path in args.defend_edit_dirs}
        rows = [
            row
            for row in rows
            if row.directory.resolve() in given or row.directory.resolve() != clean.directory.resolve()
        ]
    if not rows:
        raise UserError(f"{args.defend_edit_dirs[0]}: no edits in it but the clean ones")
    every_row = [clean, *rows] if clean else rows
    prompts = prompts_of(every_row, seeds, args.prompts)
    texts = texts_of(every_row, seeds, prompts, args.prompt_file)
    unknown = [f"prompt{number}" for number in prompts if number not in texts]
    if needs_texts and unknown:
        raise UserError(f"{', '.join(unknown)}: the instruction is not known; give --prompt_file")
    folders = {
        (row, seed, prompt): utils.images_by_stem(row.directory / f"seed{seed}" / f"prompt{prompt}")
        for row in every_row
        for seed in seeds
        for prompt in prompts
    }
    src_dir = getattr(args, "src_dir", None)
    sources = utils.images_by_stem(src_dir) if src_dir else {}
    there = {row.directory / f"seed{s}" / f"prompt{i}": set(found) for (row, s, i), found in folders.items()}
    names = shared_names(there | ({src_dir: set(sources)} if src_dir else {}), args.common)
    rows = every_row if clean_is_row else rows
    files = {
        row: {
            Key(seed, prompt, name): folders[row, seed, prompt][name]
            for seed in seeds
            for prompt in prompts
            for name in names
        }
        for row in every_row
    }
    edits = Edits(
        rows=rows,
        clean=clean,
        files=files,
        sizes={path: utils.image_size(path) for found in files.values() for path in found.values()},
        sources={name: sources[name] for name in names} if src_dir else {},
        texts=texts,
        baseline=find_row(rows, args.baseline) if args.baseline else None,
    )
    if smallest:
        _check_sizes(edits, smallest)
    return edits


def _check_sizes(edits: Edits, smallest: int) -> None:
    for row in edits.rows:
        for key, path in edits.files[row].items():
            reference = edits.files[edits.clean][key]
            size, wanted = edits.sizes[path], edits.sizes[reference]
            if size is None or wanted is None:  # not an image; whoever reads it says so
                continue
            if size != wanted:
                raise UserError(
                    f"{path} is {size[1]}x{size[0]}, but {reference} is {wanted[1]}x{wanted[0]}"
                )
            if min(size) < smallest:
                raise UserError(f"{path} is {size[1]}x{size[0]}; sides of at least {smallest} px are needed")


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row of this name, or with it in its path. Raises UserError unless there is just one."""
    exact = [row for row in rows if name in (row.method, str(row.directory))]
    matching = exact or [row for row in rows if f"/{name.strip('/')}/" in f"/{row.method}/"]
    if len(matching) != 1:
        known = ", ".join(row.method for row in rows)
        raise UserError(f"--baseline {name}: {len(matching)} rows are called so ({known})")
    return matching[0]


def shared_names(there: dict[Path, set[str]], common: bool) -> list[str]:
    """The stems that all directories have, sorted. Raises UserError naming what some lack, unless `common`:
    then it is named on stderr.
    """
    shared = set.intersection(*there.values())
    lacking = {
        name: [str(directory) for directory, names in there.items() if name not in names]
        for name in sorted(set.union(*there.values()) - shared)
    }
    if lacking:
        text = "; ".join(
            f"{name} in {', '.join(places[:3])}" + (f" and {len(places) - 3} more" if places[3:] else "")
            for name, places in lacking.items()
        )
        if not common:
            raise UserError(f"images are missing: {text} (--common scores those that all have)")
        print(utils.one_line(f"left out, not in every directory: {text}"), file=sys.stderr)
    if not shared:
        raise UserError("no image is in every directory")
    return sorted(shared)


def texts_of(
    rows: Sequence[Row], seeds: Sequence[int], prompts: Sequence[int], file: Path | None
) -> dict[int, str]:
    """The instructions by number: the file's, else what main_edit.py recorded, else the paper's.

    Raises UserError if a record tells another text than the file or than another record: then the same
    number is not the same edit. Other settings that differ (guidance, steps, weights) are warned of.
    """
    texts = utils.choose_prompts(None, file) if file else {}
    origin = dict.fromkeys(texts, file)
    settings: dict[str, tuple[object, Path]] = {}
    differing: dict[str, str] = {}
    for directory in [row.directory / f"seed{seed}" for row in rows for seed in seeds]:
        record = runs.read_record(directory) or {}
        for number, text in ((int(key), text) for key, text in record.get("prompts", {}).items()):
            if number in prompts and texts.setdefault(number, text) != text:
                raise UserError(
                    f"prompt{number} is {texts[number]!r} in {origin[number]}, but {text!r} in {directory}"
                )
            origin.setdefault(number, directory)
        for flag, value in record.get("arguments", {}).items():
            known, where = settings.setdefault(flag, (value, directory))
            if flag not in SEPARATE and known != value:
                differing.setdefault(flag, f"--{flag} was {known} for {where}, {value} for {directory}")
    for warning in differing.values():
        print(utils.one_line(f"warning: {warning}"), file=sys.stderr)
    return texts or dict(utils.edit_prompts)


# ---------------------------------------------------------------------------------------------------------
# scoring


class Scorer(Protocol):
    """A metric of an edit and its source, by embeddings: the sources' are computed once and kept."""

    problems: list[str]  # why some edits can't be measured

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        """A source (H, W, 3) uint8 at the edits' size."""

    def __call__(self, images: np.ndarray, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Edits (B, H, W, 3) uint8 -> metric -> (B,); NaN where it can't be measured."""


AgainstClean = Callable[["Tensor", "Tensor"], "Tensor"]  # two (B, 3, H, W) in [-1, 1] -> (B,)
ClipMetric = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]  # of edit, source, text: (B, D) each -> (B,)


@dataclass
class Results:
    """Values by metric and row, and what could not be read."""

    values: dict[str, dict[Row, Values]]
    damaged: list[str]
    n_edits: int  # of each row, that should have been scored
    n_left_out: int  # of them, since they or their source can't be read in some row

    def exit_status(self) -> int:
        """Names and counts the damaged images; 1 if there are any."""
        for line in self.damaged:
            print(utils.one_line(f"damaged: {line}"), file=sys.stderr)
        if self.n_left_out:
            print(f"{self.n_left_out} of {self.n_edits} edits are left out of every row", file=sys.stderr)
        return 1 if self.damaged else 0


def score(
    edits: Edits,
    against_clean: dict[str, AgainstClean],
    scorers: Sequence[Scorer],
    batch_size: int,
    on_source: Callable[[str, np.ndarray], None] | None = None,
) -> Results:
    """Reads each file once and gives it to all metrics.

    against_clean: metrics of an edit and the edit of the unprotected image. An image that can't be read is
    left out of every row alike. on_source: gets each source's name and pixels, too. Raises UserError if
    nothing can be scored.
    """
    import numpy as np
    from tqdm import tqdm

    damaged: list[str] = []
    keys = _learn_sources(edits, scorers, damaged, on_source)
    n_scored = 0
    values = defaultdict(lambda: {row: {} for row in edits.rows})
    with tqdm(total=len(keys), unit="edit", leave=False) as bar:
        for batch in _batches(edits, keys, batch_size):
            loaded, images = [], {row: [] for row in edits.files}
            for key in batch:
                found = {}
                for row, files in edits.files.items():
                    try:
                        found[row] = utils.load_image(files[key]).pixels
                    except UserError as error:
                        damaged.append(str(error))
                if len(found) == len(edits.files):
                    loaded.append(key)
                    for row, pixels in found.items():
                        images[row].append(pixels)
            bar.update(len(batch))
            n_scored += len(loaded)
            if not loaded:
                continue
            clean = utils.to_tensor(np.stack(images[edits.clean])) if against_clean else None
            for row in edits.rows:
                pixels = np.stack(images[row])  # (B, H, W, 3)
                found = {}
                if against_clean and row != edits.clean:
                    tensor = utils.to_tensor(pixels)
                    found = {name: metric(tensor, clean) for name, metric in against_clean.items()}
                for scorer in scorers:
                    found |= scorer(pixels, loaded)
                for name, column in found.items():
                    pairs = zip(loaded, column.tolist(), strict=True)
                    values[name][row] |= {key: value for key, value in pairs if not math.isnan(value)}
    if not any(any(rows.values()) for rows in values.values()):
        reasons = damaged + [problem for scorer in scorers for problem in scorer.problems]
        raise UserError(f"nothing could be scored: {'; '.join(reasons[:3])}")
    return Results(dict(values), damaged, len(edits.keys), len(edits.keys) - n_scored)


def _learn_sources(
    edits: Edits,
    scorers: Sequence[Scorer],
    damaged: list[str],
    on_source: Callable[[str, np.ndarray], None] | None,
) -> list[Key]:
    """Shows every source to the scorers, at the sizes of its edits -> the keys whose source can be read."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    wanted = defaultdict(set)
    for row in edits.rows:
        for key, path in edits.files[row].items():
            wanted[key.name].add(edits.sizes[path])
    unread = set()
    for name, path in tqdm(edits.sources.items(), unit="source", leave=False, disable=not edits.sources):
        try:
            pixels = utils.load_image(path).pixels
        except UserError as error:
            damaged.append(str(error))
            unread.add(name)
            continue
        if on_source:
            on_source(name, pixels)
        for size in sorted(wanted[name] - {None}):
            at_size = pixels
            if size != pixels.shape[:2]:
                at_size = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            for scorer in scorers:
                scorer.add_source(name, np.array(at_size))
    return [key for key in edits.keys if key.name not in unread]


def _batches(edits: Edits, keys: Sequence[Key], batch_size: int) -> Iterator[list[Key]]:
    """Keys whose edits have one size, row by row."""
    groups = defaultdict(list)
    for key in keys:
        groups[tuple(edits.sizes[files[key]] for files in edits.files.values())].append(key)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


class ClipScorer:
    """What CLIP-S and CLIP-I share: each image is embedded once."""

    def __init__(self, clip: models.Clip, metrics: dict[str, ClipMetric], texts: dict[int, str]) -> None:
        self.clip = clip
        self.metrics = metrics
        self.problems: list[str] = []
        self.texts = dict(zip(texts, clip.embed_texts(list(texts.values())), strict=True))
        self.sources: dict[tuple[str, tuple[int, int]], Tensor] = {}

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        (self.sources[name, pixels.shape[:2]],) = self.clip.embed_images(pixels[None])

    def __call__(self, images: np.ndarray, keys: Sequence[Key]) -> dict[str, Tensor]:
        import torch

        edits = self.clip.embed_images(images)  # (B, D)
        sources = torch.stack([self.sources[key.name, images.shape[1:3]] for key in keys])
        texts = torch.stack([self.texts[key.prompt] for key in keys])
        return {name: metric(edits, sources, texts) for name, metric in self.metrics.items()}


def clip_scorer(args: argparse.Namespace, edits: Edits, metrics: dict[str, ClipMetric]) -> ClipScorer:
    """Loads CLIP. Raises UserError."""
    clip = models.load_clip(models.choose(args).clip, *models.set_up(args))
    return ClipScorer(clip, metrics, {number: edits.texts.get(number, "") for number in edits.prompts})


def run_against_clean(
    args: argparse.Namespace, name: str, load: Callable[[], AgainstClean], smallest: int
) -> int:
    """What a script of one metric against the clean edits does -> exit status.

    load: makes the metric, once all that is cheap has been checked. smallest: as in find_edits.
    """
    check_outputs(args.output, args.per_image)
    edits = find_edits(args, clean_is_row=False, smallest=smallest)
    results = score(edits, {name: load()}, [], args.batch_size)
    report(results, name, args, edits.baseline)
    return results.exit_status()


def run_clip(args: argparse.Namespace, name: str, metric: ClipMetric, needs_texts: bool) -> int:
    """What a script of one CLIP metric does -> exit status."""
    check_outputs(args.output, args.per_image)
    edits = find_edits(args, clean_is_row=True, needs_texts=needs_texts)
    results = score(edits, {}, [clip_scorer(args, edits, {name: metric})], args.batch_size)
    report(results, name, args, edits.baseline)
    return results.exit_status()


# ---------------------------------------------------------------------------------------------------------
# statistics


@dataclass(frozen=True)
class Mean:
    """A mean over images with its interval; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int  # images
    n_inf: int  # values left out because they are infinite

    def interval(self) -> str:
        """For the screen."""
        return "-" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"

    def cells(self) -> list[str]:
        """For a CSV: value, both ends, n."""
        return [*map(number, (self.value, self.low, self.high)), str(self.n)]


def image_means(values: Values) -> dict[str, float]:
    """Each image's mean over its prompts and seeds, of the finite values: prompts of one image are not
    independent. By name, so the order of samples, which the bootstrap sees, is always the same.
    """
    per_image: dict[str, list[float]] = {}
    for key, value in values.items():
        if math.isfinite(value):
            per_image.setdefault(key.name, []).append(value)
    return {name: sum(per_image[name]) / len(per_image[name]) for name in sorted(per_image)}


def mean_of(values: Values) -> Mean:
    """The mean over images with a 95 % BCa bootstrap interval over images (Efron 1987, by scipy)."""
    means = list(image_means(values).values())
    infinite = sum(not math.isfinite(value) for value in values.values())
    return Mean(average(means), *bootstrap(means), len(means), infinite)


def difference_of(values: Values, baseline: Values) -> Mean:
    """The mean paired difference, edit by edit, where both are finite; an interval over images as above."""
    pairs = {key: (value, baseline[key]) for key, value in values.items() if key in baseline}
    return mean_of({key: a - b for key, (a, b) in pairs.items() if math.isfinite(a) and math.isfinite(b)})


def average(samples: Sequence[float]) -> float:
    """Their mean; NaN for none."""
    return sum(samples) / len(samples) if samples else math.nan


def bootstrap(samples: Sequence[float]) -> tuple[float, float]:
    """The ends of the interval; NaN for fewer than two samples or all equal,
    where there is nothing to resample.

    Equal up to rounding, that is: the interval of rounding errors would say nothing.
    """
    import numpy as np
    from scipy import stats

    if len(samples) < 2 or max(samples) - min(samples) <= 1e-6 * max(map(abs, samples)):
        return math.nan, math.nan
    interval = stats.bootstrap(
        (np.asarray(samples),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


# ---------------------------------------------------------------------------------------------------------
# tables


def report(results: Results, metric: str, args: argparse.Namespace, baseline: Row | None) -> None:
    """Writes one metric's CSV (and --per_image) and prints its table."""
    of_rows = results.values[metric]
    rows = list(of_rows)
    prompts = sorted({key.prompt for values in of_rows.values() for key in values})
    means = {row: mean_of(values) for row, values in of_rows.items()}
    differences = {
        row: difference_of(of_rows[row], of_rows[baseline]) for row in rows if baseline and row != baseline
    }
    header = ["method", *(f"prompt{i}" for i in prompts), "mean", "ci_low", "ci_high", "n"]
    header += ["n_inf"] if metric == "psnr" else []
    header += ["diff", "diff_low", "diff_high", "diff_n"] if baseline else []
    lines = []
    for row, values in of_rows.items():
        mean = means[row]
        of_prompts = [{key: v for key, v in values.items() if key.prompt == i} for i in prompts]
        columns = [average(list(image_means(part).values())) for part in of_prompts]
        line = [row.method, *map(number, (*columns, mean.value, mean.low, mean.high)), str(mean.n)]
        line += [str(mean.n_inf)] if metric == "psnr" else []
        if baseline:
            line += differences[row].cells() if row in differences else [""] * 4
        lines.append(line)
    path = args.output or Path(f"{metric}_metric.csv")
    write_csv(path, header, lines)
    if args.per_image:
        write_csv(
            args.per_image,
            ["method", "seed", "prompt", "name", "value"],
            [
                [row.method, str(key.seed), str(key.prompt), key.name, number(value)]
                for row, values in of_rows.items()
                for key, value in sorted(values.items())
            ],
        )
    print_table(metric, means, differences, baseline)
    print(f"{path}: {len(prompts)} prompts, {len(lines)} rows")


def print_table(
    metric: str, means: dict[Row, Mean], differences: dict[Row, Mean], baseline: Row | None
) -> None:
    """The table as a person reads it: mean, interval, n, difference to the baseline."""
    lines = [["method", metric, f"{CONFIDENCE:.0%} interval", "n"]]
    lines[0] += ["inf"] if metric == "psnr" else []
    lines[0] += [f"minus {baseline.method}"] if baseline else []
    for row, mean in means.items():
        line = [row.method, shown(mean.value), mean.interval(), str(mean.n)]
        line += [str(mean.n_inf)] if metric == "psnr" else []
        if baseline:
            found = differences.get(row)
            line.append(f"{shown(found.value, '+')} ({found.interval()})" if found else "")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())
    warn_of_few(means.values())


def warn_of_few(means: Iterable[Mean]) -> None:
    """Says so where there are too few images for an exact interval."""
    if any(mean.n < FEW_IMAGES for mean in means):
        print(f"(fewer than {FEW_IMAGES} images: the intervals are approximate)")


def shown(value: float, sign: str = "") -> str:
    """A value as it stands on the screen."""
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


def number(value: float) -> str:
    """A value as it stands in a CSV: six digits, empty for NaN."""
    return "" if math.isnan(value) else f"{value:.6g}"


def write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Writes a CSV file, whole or not at all. Raises UserError."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    utils.write_file(path, buffer.getvalue().encode(errors="surrogateescape"))
