"""What main_defend.py and main_edit.py share: finding inputs, batches, resume, run.json, the summary.

Items are anything with a `source` path, an `output` path and a `size` (H, W); pixels are none of this file's
business.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import models
from utils import IMAGE_SUFFIXES, UserError, first_line, images_by_stem, positive_int, write_file

# Flags that don't change pixels beyond rounding: a run may be resumed with other values of these.
FREE = {"batch_size", "check", "debug", "device", "edit_dir", "judge", "output_dir", "overwrite"}
# Recorded beside the arguments, in a form of their own
ELSEWHERE = {"seed", "prompts", "prompt_file"}
PACKAGES = [
    "accelerate", "diffusers", "facenet-pytorch", "lpips", "numpy",
    "pillow", "scikit-image", "torch", "torchvision", "transformers",
]  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One file to be made."""

    source: Path
    output: Path
    size: tuple[int, int] | None  # (H, W) of the source, None if its header can't be read
    label: str  # names it on the screen
    prompt: str | None = None  # the instruction, of an edit


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """--batch_size and --overwrite."""
    parser.add_argument(
        "--batch_size", type=positive_int, default=1, help="images of one size that are worked on together"
    )
    parser.add_argument("--overwrite", action="store_true", help="make finished files again")


def find_images(directory: Path) -> list[Path]:
    """The image files of a directory, sorted by name; other files, hidden ones and sub-directories are left.

    Raises UserError: no such directory, no images, or two files with the same stem, whose outputs would be
    one file.
    """
    images = list(images_by_stem(directory).values())
    if not images:
        raise UserError(f"{directory}: no image files in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    folders = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if folders:
        print(f"{directory}: sub-directories are not searched: {', '.join(folders)}", file=sys.stderr)
    return images


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Cuts items into batches of one image size, in order of their first item.

    It is the full list that is cut, whatever is finished already: so a resumed run computes the same batches.
    An item whose size is not known is alone.
    """
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(item.size or item.output, []).append(item)
    cut = [
        group[first : first + batch_size]
        for group in groups.values()
        for first in range(0, len(group), batch_size)
    ]
    order = {item.output: place for place, item in enumerate(items)}
    return sorted(cut, key=lambda batch: order[batch[0].output])


# ---------------------------------------------------------------------------------------------------------
# run.json


def record_of(
    args: argparse.Namespace, chosen: models.ModelSet, dtype: Any, in_effect: dict[str, Any]
) -> dict[str, Any]:
    """What made the files of a directory: seed, arguments as they took effect, versions.

    in_effect: replaces flags by what they come to; None for those that nothing reads.
    """
    resolved = {
        "lpips" if key == "perceptual" else key: value for key, value in dataclasses.asdict(chosen).items()
    }
    arguments = {}
    for key, value in sorted(vars(args).items()):
        if key in ELSEWHERE:
            continue
        value = in_effect[key] if key in in_effect else resolved.get(key) if value is None else value
        if value is None:
            continue
        if isinstance(value, Path):  # the same directory however it was written
            value = str(value.resolve())
        arguments[key] = models.shown(value) if isinstance(value, str) else value
    arguments["dtype"] = str(dtype).removeprefix("torch.")
    arguments["model_id"] = models.shown(chosen.editors[args.model])
    return {"seed": args.seed, "arguments": arguments, "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and of what decides about pixels."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_record(directory: Path) -> dict[str, Any] | None:
    """run.json of a directory, None if there is none. Raises UserError if it is damaged."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a record of a run ({first_line(error)})") from None
    if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
        raise UserError(f"{path}: not a record of a run (no arguments in it)")
    return record


def check_record(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Compares a run with the one that the directory holds -> the record to be written.

    An old record stays as it is, since it tells what made the files; prompts are added. Texts of prompts are
    compared for the numbers that both have. Raises UserError listing what differs, if it changes pixels.
    """
    old = read_record(directory)
    if old is None:
        return record
    before, now = _pixels(old), _pixels(record)
    differing = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    prompts = old.get("prompts", {})
    differing += [
        f"prompt {key}: {prompts[key]!r} there, {text!r} now"
        for key, text in record.get("prompts", {}).items()
        if prompts.get(key, text) != text
    ]
    if differing:
        raise UserError(f"{directory} was made with other arguments ({'; '.join(differing)})")
    return {**old, "prompts": {**prompts, **record["prompts"]}} if prompts else old


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Writes run.json. Raises UserError."""
    write_file(directory / "run.json", (json.dumps(record, indent=2) + "\n").encode())


def _pixels(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that decides about pixels."""
    arguments = {key: value for key, value in record["arguments"].items() if key not in FREE}
    return {**arguments, "seed": record.get("seed")}


# ---------------------------------------------------------------------------------------------------------
# the loop

Loaded = TypeVar("Loaded")


@dataclass
class Summary:
    """What became of the items of a run."""

    made: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)

    def print(self, where: Path) -> int:
        """Prints it and returns the exit status: 1 if anything failed."""
        parts = [f"{self.made} written", f"{self.skipped} there already", f"{len(self.failed)} failed"]
        print(f"{where}: {', '.join(parts)}")
        for line in self.failed:
            print(f"  failed: {line}", file=sys.stderr)
        return 1 if self.failed else 0


def run_batches(
    work_list: Sequence[Sequence[Item]],
    load: Callable[[Item], Loaded],
    work: Callable[[list[Item], list[Loaded], list[bool]], None],
    *,
    overwrite: bool,
    debug: bool,
    unit: str,
) -> Summary:
    """Goes through batches, carries on past what fails, and counts.

    A batch of which any file is missing is computed whole, so its arithmetic is that of an undisturbed run;
    `work(items, loaded, wanted)` writes those that are wanted. A file that `load` can't read drops out of its
    batch alone; an error in `work` fails the whole batch.
    """
    from tqdm import tqdm

    summary = Summary()
    with tqdm(total=sum(map(len, work_list)), unit=unit) as bar:
        for batch in work_list:
            wanted = {item.output for item in batch if overwrite or not item.output.exists()}
            summary.skipped += len(batch) - len(wanted)
            items, loaded = [], []
            for item in batch if wanted else ():
                try:
                    loaded.append(load(item))
                    items.append(item)
                except Exception as error:  # a bad file, or a detector out of memory: the others may still do
                    if debug:
                        raise
                    if item.output in wanted:
                        _note(summary, item, error, bar)
            try:
                if any(item.output in wanted for item in items):
                    work(items, loaded, [item.output in wanted for item in items])
                    summary.made += sum(item.output in wanted for item in items)
            except Exception as error:  # out of memory, a full disk...: the other batches may still do
                if debug:
                    raise
                for item in items:
                    if item.output in wanted:
                        _note(summary, item, error, bar)
            bar.update(len(batch))
    return summary


def _note(summary: Summary, item: Item, error: Exception, bar: Any) -> None:
    text = (
        first_line(error)
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {first_line(error)}"
    )
    line = text if str(item.source) in text else f"{item.label}: {text}"
    summary.failed.append(line)
    bar.write(f"failed: {line}", file=sys.stderr)
