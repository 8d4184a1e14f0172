"""The loop over a directory that every batch script has: inputs, batches, resume, and what became of them.

Pixels are none of this file's business: a script gives it items, and two functions that load and make them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import records
from images import HEIF, images_by_stem, readable_suffixes
from processes import Lock, Stop, Team
from utils import UserError, first_line, one_line, positive_int, warn

T = TypeVar("T")
Loaded = TypeVar("Loaded")
Facts = list[dict[str, Any]]  # of each file that was made, for the manifest

ALONE = Team()
OWN_SUFFIXES = (".json", ".jsonl", ".csv")  # of what the scripts write beside images


@dataclass(frozen=True)
class Item:
    """One file to be made."""

    source: Path
    output: Path
    size: tuple[int, int] | None  # (H, W) of the source, None if its header can't be read
    label: str  # names it on the screen
    prompt: str | None = None  # the instruction, of an edit


@dataclass(frozen=True)
class Options:
    """How a run goes; nothing here decides about pixels."""

    batch_size: int = 1
    overwrite: bool = False
    verify: bool = False
    debug: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Takes them from a script's flags."""
        return cls(getattr(args, "batch_size", 1), args.overwrite, args.verify, args.debug)


USUAL = Options()


def add_run_arguments(parser: argparse.ArgumentParser, batches: bool = True) -> None:
    """Adds --batch_size (where there are batches), --overwrite and --verify."""
    if batches:
        text = "images of one size worked on together"
        parser.add_argument("--batch_size", type=positive_int, default=1, help=text)
    text = "make files again that are there, but not as the result of these sources, settings and code"
    parser.add_argument("--overwrite", action="store_true", help=text)
    text = "read finished files, too, to see that they are as written"
    parser.add_argument("--verify", action="store_true", help=text)


def find_images(directory: Path) -> list[Path]:
    """Lists the image files of a directory, sorted by name; hidden ones and sub-directories are left.

    Files of kinds that aren't read are counted on stderr. Raises UserError: no such directory, no images, or
    two files with the same stem, whose outputs would be one file.
    """
    images = list(images_by_stem(directory).values())
    others = [entry for entry in sorted(directory.iterdir()) if entry.name[0] != "." and entry not in images]
    folders = [entry.name for entry in others if entry.is_dir()]
    if not images:
        budgets = any(name.startswith("budget_") for name in folders)
        hint = "; it holds budget_{B}, give one of them" if budgets else ""
        raise UserError(f"{directory}: no image files in it ({' '.join(sorted(readable_suffixes()))}){hint}")
    if folders:
        warn(f"{directory}: sub-directories are not searched: {', '.join(folders)}")
    if unread := [entry for entry in others if entry.is_file() and entry.suffix not in OWN_SUFFIXES]:
        heic = any(entry.suffix.lower() in HEIF for entry in unread)
        hint = "; HEIC is read once pillow-heif is installed" if heic else ""
        warn(f"{directory}: {len(unread)} files of other kinds are left out ({records.listed(unread)}){hint}")
    return images


def batches(items: Sequence[T], batch_size: int, size: Callable[[T], Any]) -> list[list[T]]:
    """Cuts items into batches of one image size, in order of their first item.

    It is the full list that is cut, whatever is finished already: so a resumed run computes the same batches.
    """
    cut: list[list[T]] = []
    last: dict[Any, list[T]] = {}  # batch of each size
    for item in items:
        if len(last.get(size(item), ())) in (0, batch_size):
            last[size(item)] = []
            cut.append(last[size(item)])
        last[size(item)].append(item)
    return cut


@dataclass
class Summary:
    """What became of the items of a run."""

    made: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    signal: int = 0  # that stopped it

    @property
    def status(self) -> int:
        """The exit status: 1 if anything failed, 128 + n after signal n."""
        return 128 + self.signal if self.signal else 1 if self.failed else 0

    def __str__(self) -> str:
        parts = [f"{self.made} written", f"{self.skipped} there already", f"{len(self.failed)} failed"]
        return f"{', '.join(parts)}{'; stopped' if self.signal else ''}"


def make(
    items: Sequence[Item],
    load: Callable[[Item], Loaded],
    work: Callable[[list[Item], list[Loaded], list[bool]], Facts],
    directory: Path,
    settings: dict[str, Any],
    *,
    options: Options = USUAL,
    prompts: dict[int, str] | None = None,
    prepare: Callable[[], Any] = lambda: None,
    unit: str = "image",
    team: Team = ALONE,
) -> int:
    """Makes what a directory of results lacks, and tells what became of it -> exit status.

    settings: all that decides about pixels, with the seed. `prepare` loads what `work` needs, before anything
    is written, if there is anything to do. `load(item)` reads one; `work(items, loaded, wanted)` writes those
    that are wanted and gives facts about each of them. Raises UserError before any work: for what
    `records.make_plan` refuses, and if another run is at work there.
    """
    prompts = prompts or {}
    outputs = [(item.output, item.source, item.prompt) for item in items]
    how = {"overwrite": options.overwrite, "verify": options.verify}
    look = partial(records.make_plan, directory, outputs, settings, prompts, **how)

    def begin() -> set[Path]:
        plan = look()  # again, now that nobody else can write
        if plan.unknown:
            names = records.listed(plan.unknown)
            warn(f"{directory}: nothing says what made {names}; taken as they are")
        clean_up(directory)
        records.gather_manifest(directory)
        for output in plan.stale:  # or, if this run is killed, the next one would find them beside its record
            records.note(directory, team.rank, output, "", "")
        records.write_record(directory, settings, prompts, items[0].source.parent)
        return plan.wanted

    if team.once(lambda: bool(look().wanted)):
        prepare()
    lock = Lock(directory)
    try:
        lock.take(team)
        wanted = team.once(begin)
        cut = batches(items, options.batch_size, lambda item: item.size or item.output)
        own = team.share(cut, lambda batch: not any(item.output in wanted for item in batch))
        parts = team.all(go_through(own, load, work, wanted, directory, settings, options.debug, unit, team))
        if team.is_first:
            with contextlib.suppress(UserError):  # on a full disk, the next run does it
                records.gather_manifest(directory)
    finally:
        lock.release()
    made, skipped, failed, signals = zip(*(vars(part).values() for part in parts), strict=True)
    whole = Summary(sum(made), sum(skipped), [line for part in failed for line in part], max(signals))
    if team.is_first:
        print(one_line(f"{directory}: {whole}"), flush=True)
        for line in whole.failed:
            print(f"  failed: {line}", file=sys.stderr)
    return whole.status


def clean_up(directory: Path) -> None:
    """Removes the temporary files that a killed run left in a directory of results, or one below."""
    for path in [*directory.glob(".facelock-*.tmp"), *directory.glob("*/.facelock-*.tmp")]:
        if re.fullmatch(r"\.facelock-[0-9a-f]{12}-\d+\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def go_through(
    own: Sequence[list[Item]],
    load: Callable[[Item], Loaded],
    work: Callable[[list[Item], list[Loaded], list[bool]], Facts],
    wanted: set[Path],
    directory: Path,
    settings: dict[str, Any],
    debug: bool,
    unit: str,
    team: Team,
) -> Summary:
    """Goes through one process's batches for `make`, carries on past what fails, and counts.

    A batch of which any file is wanted is computed whole, so its arithmetic is that of an undisturbed run. A
    file that can't be read drops out of its batch alone; an error in `work` fails the whole batch. Where
    memory doesn't suffice for a batch, it and the following are cut in halves.
    """
    import torch
    from tqdm import tqdm

    summary, stop, note = Summary(), Stop(), partial(records.note, directory, team.rank)

    def fail(item: Item, error: Exception) -> None:
        if debug:
            raise error
        if item.output in wanted:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = name + first_line(error)
            line = one_line(text if str(item.source) in text else f"{item.label}: {text}")
            summary.failed.append(line)
            bar.write(f"failed: {line}", file=sys.stderr)

    def finish(part: list[tuple[Item, str, Loaded]]) -> None:
        """Makes items that are loaded, with their lines in the manifest."""
        mine = [
            (item.output, source, records.item_key(settings, item.prompt))
            for item, source, _ in part
            if item.output in wanted
        ]
        for line in mine:
            note(*line)
        items, _, loaded = map(list, zip(*part, strict=True))
        facts = work(items, loaded, [item.output in wanted for item in items]) if mine else []
        for line, of_item in zip(mine, facts, strict=True):
            note(*line, **records.made(line[0]), **of_item)
        summary.made += len(mine)

    largest = max(map(len, own), default=1)
    with tqdm(total=sum(map(len, own)), unit=unit, disable=not team.is_first) as bar, stop.listening():
        for batch in own:
            if stop.signal or team.is_orphan:
                summary.signal = stop.signal or signal.SIGTERM
                break
            n_wanted = sum(item.output in wanted for item in batch)
            summary.skipped += len(batch) - n_wanted
            todo = []
            for item in batch if n_wanted else ():
                try:  # the source's hash is of before it is read
                    todo.append((item, records.digest(item.source), load(item)))
                except Exception as error:  # a bad file, or a detector out of memory: the others may still do
                    fail(item, error)
            while todo:
                part = todo[:largest]
                try:
                    finish(part)
                except Exception as error:  # a full disk...: the other batches may still do
                    if out_of_memory(error) and len(part) > 1:
                        largest = (len(part) + 1) // 2
                        bar.write(f"out of memory with {len(part)} at a time; going on with {largest}")
                        gc.collect()
                        torch.cuda.empty_cache()
                        continue
                    for item, _, _ in part:
                        fail(item, error)
                todo = todo[largest:]
            bar.update(len(batch))
    return summary


def out_of_memory(error: Exception) -> bool:
    """Tells whether an error says that a device or the machine has no memory left."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
