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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import records
from images import HEIF, images_by_stem, readable_suffixes
from processes import Team, listening, locked
from records import settings_of_file
from utils import UserError, first_line, one_line, positive_int, warn

T = TypeVar("T")
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
    add, flag = parser.add_argument, {"action": "store_true"}
    if batches:
        add("--batch_size", type=positive_int, default=1, help="images of one size worked on together")
    text = "make files again that are there, but not as the result of these sources, settings and code"
    add("--overwrite", help=text, **flag)
    add("--verify", help="read finished files, too, to see that they are as written", **flag)


def find_images(directory: Path) -> list[Path]:
    """Lists the image files of a directory, sorted by name; what isn't read is told.

    Raises UserError: no such directory, no images, or two files of one stem, whose outputs would be one file.
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
    """Cuts items, finished ones too, into batches of one size: so a resumed run computes the same batches."""
    cut: list[list[T]] = []
    last: dict[Any, list[T]] = {}  # batch of each size
    for item in items:
        if len(last.get(size(item), ())) in (0, batch_size):
            last[size(item)] = []
            cut.append(last[size(item)])
        last[size(item)].append(item)
    return cut


def make(
    items: Sequence[Item],
    load: Callable[[Item], T],
    work: Callable[[list[Item], list[T], list[bool]], Facts],
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

    settings: all that decides about pixels. `prepare` loads what `work` needs, before anything is written, if
    there is anything to do. `load(item)` reads one; `work(items, loaded, wanted)` writes the wanted ones and
    gives facts about them. Raises UserError before any work, also if another run is at work there.
    """
    from tqdm import tqdm

    prompts, counts, failed = prompts or {}, Counter(), []
    outputs = [(item.output, item.source, item.prompt) for item in items]
    how = {"overwrite": options.overwrite, "verify": options.verify}
    look = partial(records.make_plan, directory, outputs, settings, prompts, **how)
    note = partial(records.note, directory, team.rank)

    def begin() -> set[Path]:
        wanted, unknown = look()  # again, now that nobody else can write
        if unknown:
            warn(f"{directory}: nothing says what made {records.listed(unknown)}; taken as they are")
        for path in [*directory.glob(".facelock-*.tmp"), *directory.glob("*/.facelock-*.tmp")]:
            if re.fullmatch(r"\.facelock-[0-9a-f]{12}-\d+\.tmp", path.name) and path.is_file():
                path.unlink(missing_ok=True)  # what a killed run left
        records.gather_manifest(directory)
        for output, why in wanted.items():
            if why:  # or, if this run is killed, the next one would find it beside its record
                note(output, "", "")
        records.write_record(directory, settings, prompts, items[0].source.parent)
        return set(wanted)

    def read(batch: list[Item]) -> list[tuple[Item, str, T]]:
        """A batch of which any file is wanted: all of it, so that its arithmetic is an undisturbed run's."""
        found, n_wanted = [], sum(item.output in wanted for item in batch)
        counts["skipped"] += len(batch) - n_wanted
        for item in batch if n_wanted else ():
            try:  # the hash is the source's before it is read
                found.append((item, records.digest(item.source), load(item)))
            except Exception as error:  # a bad file, or a detector out of memory: the others may still do
                fail(item, error)
        return found

    def finish(part: list[tuple[Item, str, T]]) -> None:
        """Makes what was read, with its lines in the manifest."""
        mine = [(item, source) for item, source, _ in part if item.output in wanted]
        lines = [(one.output, source, settings_of_file(settings, one.prompt)) for one, source in mine]
        for line in lines:
            note(*line)
        items, _, loaded = map(list, zip(*part, strict=True))
        facts = work(items, loaded, [item.output in wanted for item in items]) if lines else []
        for line, of_item in zip(lines, facts, strict=True):
            note(*line, **records.made(line[0]), **of_item)
        counts["made"] += len(lines)

    def fail(item: Item, error: Exception) -> None:
        if options.debug:
            raise error
        if item.output in wanted:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = name + first_line(error)
            failed.append(one_line(text if str(item.source) in text else f"{item.label}: {text}"))
            tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)

    if team.once(lambda: bool(look()[0])):
        prepare()
    with locked(directory, team):
        wanted = team.once(begin)
        cut = batches(items, options.batch_size, lambda item: item.size or item.output)
        own = team.share(cut, lambda batch: not any(item.output in wanted for item in batch))
        parts = team.all((go_through(own, read, finish, fail, unit, team), counts, failed))
        if team.is_first:
            with contextlib.suppress(UserError):  # on a full disk, the next run does it
                records.gather_manifest(directory)
    number, whole = max(heard for heard, _, _ in parts), sum((of for _, of, _ in parts), Counter())
    lines = [line for _, _, of in parts for line in of]
    if team.is_first:
        text = f"{whole['made']} written, {whole['skipped']} there already, {len(lines)} failed"
        print(one_line(f"{directory}: {text}{'; stopped' if number else ''}"), flush=True)
        for line in lines:
            print(f"  failed: {line}", file=sys.stderr)
    return 128 + number if number else int(bool(lines))


def go_through(
    own: list[list[Item]], read: Callable, finish: Callable, fail: Callable, unit: str, team: Team
) -> int:
    """Goes through one process's batches, whatever fails -> the signal that ended it, or 0.

    Where memory doesn't suffice for a batch, it and the following are cut in halves.
    """
    import torch
    from tqdm import tqdm

    largest = max(map(len, own), default=1)
    with tqdm(total=sum(map(len, own)), unit=unit, disable=not team.is_first) as bar, listening() as heard:
        for batch in own:
            if heard or team.is_orphan:
                return heard[0] if heard else signal.SIGTERM
            todo = read(batch)
            while todo:
                part = todo[:largest]
                try:
                    finish(part)
                except Exception as error:  # a full disk...: the other batches may still do
                    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
                    no_memory |= isinstance(error, RuntimeError) and "allocate memory" in str(error)
                    if no_memory and len(part) > 1:
                        largest = (len(part) + 1) // 2
                        bar.write(f"out of memory with {len(part)} at a time; going on with {largest}")
                        gc.collect()
                        torch.cuda.empty_cache()
                        continue
                    for item, _, _ in part:
                        fail(item, error)
                todo = todo[largest:]
            bar.update(len(batch))
    return 0
