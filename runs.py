"""What main_defend.py and main_edit.py share: inputs, batches, processes, resume, run.json, the summary.

Items are anything with a `source` path, an `output` path and a `size` (H, W); pixels are none of this file's
business.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import models
from utils import (
    IMAGE_SUFFIXES,
    UserError,
    first_line,
    images_by_stem,
    one_line,
    pick_device,
    positive_int,
    write_file,
)

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

# Flags that don't change pixels beyond rounding: a run may be resumed with other values of these.
FREE = {
    "batch_size", "check", "checkpointing", "compile", "debug", "device",
    "edit_dir", "judge", "output_dir", "overwrite"
}  # fmt: skip
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
        text = f"{directory}: sub-directories are not searched: {', '.join(folders)}"
        print(one_line(text), file=sys.stderr)
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
    prompts = record.get("prompts", {})
    if not isinstance(prompts, dict) or not all(key.isdecimal() for key in prompts):
        raise UserError(f"{path}: not a record of a run (its prompts are not numbered)")
    return record


def check_record(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Compares a run with the one that the directory holds -> the record to be written.

    An old record stays as it is, since it tells what made the files; prompts are added. Texts of prompts are
    compared for the numbers that both have. Raises UserError listing what differs, if it changes pixels, and
    for a directory that has images and no record: nobody knows what made them.
    """
    old = read_record(directory)
    if old is None:
        if any(directory.glob("*.png")) or any(directory.glob("*/*.png")):
            raise UserError(f"{directory} has images, but no run.json that says what made them")
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
# processes

Made = TypeVar("Made")
Batch = TypeVar("Batch")

LONGEST_WAIT = datetime.timedelta(days=30)  # of a process that is done for one that is not


@dataclass(frozen=True)
class Team:
    """The processes that share a run: one, or those that torchrun or accelerate launch started."""

    rank: int = 0
    size: int = 1
    parent: int = 0  # the launcher's process number

    @classmethod
    def gather(cls, args: argparse.Namespace) -> Team:
        """Joins the other processes, if a launcher started any. Raises UserError for a bad --device."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        from accelerate import PartialState

        # Without cpu=, processes on CPUs don't see each other. Without a timeout of ours, one that is done
        # waits for half an hour (on GPUs ten minutes), and then all are stopped.
        state = PartialState(cpu=pick_device(args.device).type == "cpu", timeout=LONGEST_WAIT)
        return cls(state.process_index, size, os.getppid())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone: then nobody waits for this process any more."""
        return self.size > 1 and os.getppid() != self.parent

    def share(self, work_list: Sequence[Batch], is_done: Callable[[Batch], bool]) -> list[Batch]:
        """This process's part: what is to be done is dealt out evenly, and so is what is done already.

        The first process decides what is done, since others may be writing when a slower one looks.
        """
        done = self.once(lambda: [is_done(batch) for batch in work_list])
        finished = [batch for batch, is_so in zip(work_list, done, strict=True) if is_so]
        waiting = [batch for batch, is_so in zip(work_list, done, strict=True) if not is_so]
        return [*finished[self.rank :: self.size], *waiting[self.rank :: self.size]]

    def once(self, work: Callable[[], Made]) -> Made:
        """Does it in the first process alone and gives what comes of it to all; a UserError there ends all,
        with one line.
        """
        if self.size == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None]
        if self.is_first:
            try:
                message = [(work(), None)]
            except UserError as error:
                message = [(None, str(error))]
        broadcast_object_list(message)
        made, error = message[0]
        if error is None:
            return made
        if self.is_first:
            raise UserError(error)
        sys.exit(1)

    def all(self, mine: Made) -> list[Made]:
        """Everybody's, in order of the processes."""
        if self.size == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])


class Lock:
    """Keeps a second run out of a directory while any process of the first one lives.

    A shared flock on DIRECTORY/.lock, once an exclusive one has shown that nobody else has it: the system
    gives it up when a process ends, however it ends. The file says who they are.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / ".lock"
        self.file = open(self.path, "a+")  # noqa: SIM115 (open as long as it is held)

    def take(self, team: Team) -> None:
        """To be called by every process. Raises UserError if another run is at work there."""
        team.once(self._begin)
        if not team.is_first:
            self._flock(exclusive=False)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)
        team.all(None)  # nobody goes on before all have it

    def _begin(self) -> None:
        self._flock(exclusive=True)
        self.file.truncate(0)
        self._flock(exclusive=False)

    def _flock(self, exclusive: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            who = ", ".join(self.file.read().splitlines())
            raise UserError(
                f"{self.path.parent}: another run is writing into it ({who}); wait for its end, or stop it"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {self.path} can't be locked ({error.strerror})", file=sys.stderr)


@contextlib.contextmanager
def writing(directory: Path, record: dict[str, Any], team: Team) -> Iterator[None]:
    """Locks a directory of results, removes what a killed run left and writes run.json.

    Raises UserError, as Lock and check_record do.
    """
    lock = Lock(directory)

    def begin() -> None:
        clean_up(directory)
        write_record(directory, check_record(directory, record))

    with lock.file:
        lock.take(team)
        team.once(begin)
        yield


def clean_up(directory: Path) -> None:
    """Removes the temporary files that a killed run left in a directory of results, or one below."""
    for path in [*directory.glob(".*.tmp"), *directory.glob("*/.*.tmp")]:
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# the loop

Loaded = TypeVar("Loaded")


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

    def print(self, where: Path) -> None:
        """The last lines of a run."""
        parts = [f"{self.made} written", f"{self.skipped} there already", f"{len(self.failed)} failed"]
        print(one_line(f"{where}: {', '.join(parts)}{'; stopped' if self.signal else ''}"))
        for line in self.failed:
            print(f"  failed: {line}", file=sys.stderr)


def finish(summary: Summary, team: Team, where: Path) -> int:
    """Adds up what the processes did and prints it once -> the exit status, the same for all."""
    whole = Summary()
    for part in team.all(summary):
        whole.made += part.made
        whole.skipped += part.skipped
        whole.failed += part.failed
        whole.signal = max(whole.signal, part.signal)
    if team.is_first:
        whole.print(where)
    return whole.status


class Stop:
    """Ctrl-C or SIGTERM once: the current batch is finished and saved. Again: at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping after this batch (once more: at once)", file=sys.stderr)


def run_batches(
    work_list: Sequence[Sequence[Item]],
    load: Callable[[Item], Loaded],
    work: Callable[[list[Item], list[Loaded], list[bool]], None],
    *,
    overwrite: bool,
    debug: bool,
    unit: str,
    team: Team = Team(),
) -> Summary:
    """Goes through this process's batches, carries on past what fails, and counts.

    A batch of which any file is missing is computed whole, so its arithmetic is that of an undisturbed run;
    `work(items, loaded, wanted)` writes those that are wanted. A file that `load` can't read drops out of its
    batch alone; an error in `work` fails the whole batch. Where memory doesn't suffice for a batch, it and
    the following are cut in halves.
    """
    from tqdm import tqdm

    own = team.share(
        work_list, lambda batch: not overwrite and all(item.output.exists() for item in batch)
    )
    stop = Stop()
    summary = Summary()
    largest = max(map(len, own), default=1)
    with tqdm(total=sum(map(len, own)), unit=unit, disable=not team.is_first) as bar, stop.listening():
        for batch in own:
            if stop.signal or team.is_orphan:
                summary.signal = stop.signal or signal.SIGTERM
                break
            wanted = {item.output for item in batch if overwrite or not item.output.exists()}
            summary.skipped += len(batch) - len(wanted)
            todo: list[tuple[Item, Loaded]] = []
            for item in batch if wanted else ():
                try:
                    todo.append((item, load(item)))
                except Exception as error:  # a bad file, or a detector out of memory: the others may still do
                    if debug:
                        raise
                    if item.output in wanted:
                        _note(summary, item, error, bar)
            while todo:
                part = todo[:largest]
                items, loaded = map(list, zip(*part, strict=True))
                mine = [item for item in items if item.output in wanted]
                too_many = False
                try:
                    if mine:
                        work(items, loaded, [item.output in wanted for item in items])
                        summary.made += len(mine)
                except Exception as error:  # out of memory, a full disk...: the other batches may still do
                    too_many = out_of_memory(error) and len(part) > 1
                    if debug and not too_many:
                        raise
                    for item in mine if not too_many else ():
                        _note(summary, item, error, bar)
                if too_many:
                    largest = (len(part) + 1) // 2
                    bar.write(f"out of memory with {len(part)} at a time; going on with {largest}")
                    free_memory()
                    continue
                todo = todo[len(part) :]
            bar.update(len(batch))
    return summary


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def free_memory() -> None:
    """Gives back what the failed attempt still holds."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _note(summary: Summary, item: Item, error: Exception, bar: Any) -> None:
    text = (
        first_line(error)
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {first_line(error)}"
    )
    line = one_line(text if str(item.source) in text else f"{item.label}: {text}")
    summary.failed.append(line)
    bar.write(f"failed: {line}", file=sys.stderr)
