"""Makes a directory of results: skips finished files, records settings, splits work, stops at Ctrl-C.

A script gives a `Job` its items and two functions that load and make them; nothing here touches pixels. A
file is finished if it is the result of this source and these settings (provenance.py).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decoding import HEIF, readable_suffixes
from images import images_by_stem
from provenance import (
    MANIFEST,
    check_ours,
    differences,
    digest,
    manifests,
    note,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from utils import UserError, first_line, one_line, pick_device, positive_int, warn

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
Facts = list[dict[str, Any]]  # about each file that was made, for the manifest

OWN_SUFFIXES = (".json", ".jsonl", ".csv")  # of files that the scripts write beside images
NAMED = 5  # files that a message names before it counts the rest
PARENT = os.getppid()  # the launcher's process number, if there is one
LONGEST_WAIT = datetime.timedelta(days=30)  # that a finished process waits for the others


@dataclass(frozen=True)
class Item:
    """Describes one file to be made."""

    source: Path
    output: Path
    size: tuple[int, int] | None  # (H, W) of the source, None if its header can't be read
    label: str  # its name on the screen
    prompt: str | None = None  # an edit's instruction


@dataclass(frozen=True)
class Options:
    """Sets how a run goes; nothing here changes pixels."""

    batch_size: int = 1
    overwrite: bool = False
    verify: bool = False
    debug: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Reads the options from a script's flags."""
        return cls(getattr(args, "batch_size", 1), args.overwrite, args.verify, args.debug)


USUAL = Options()


def add_run_arguments(parser: argparse.ArgumentParser, batches: bool = True) -> None:
    """Adds --batch_size (where there are batches), --overwrite and --verify."""
    if batches:
        text = "images of one size that are processed together"
        parser.add_argument("--batch_size", type=positive_int, default=1, help=text)
    text = "make files again that are not the result of these sources, settings and methods"
    parser.add_argument("--overwrite", action="store_true", help=text)
    text = "also read the finished files, to check that they are as they were written"
    parser.add_argument("--verify", action="store_true", help=text)


def find_images(directory: Path) -> list[Path]:
    """Lists the image files of a directory, sorted by name, and warns about the rest.

    Raises UserError for a missing directory, no images, or two files of one stem, whose outputs would clash.
    """
    images = list(images_by_stem(directory).values())
    others = [entry for entry in sorted(directory.iterdir()) if entry.name[0] != "." and entry not in images]
    folders = [entry.name for entry in others if entry.is_dir()]
    unread = [entry for entry in others if entry.is_file() and entry.suffix not in OWN_SUFFIXES]
    if not images:
        has_budgets = any(name.startswith("budget_") for name in folders)
        hint = "; it holds budget_{B}: give one of those" if has_budgets else ""
        raise UserError(f"{directory}: no image files in it ({' '.join(sorted(readable_suffixes()))}){hint}")
    if folders:
        warn(f"{directory}: sub-directories are not searched: {', '.join(folders)}")
    if unread:
        has_heic = any(entry.suffix.lower() in HEIF for entry in unread)
        hint = "; HEIC is read once pillow-heif is installed" if has_heic else ""
        warn(f"{directory}: {len(unread)} files of other kinds are left out ({listed(unread)}){hint}")
    return images


def listed(paths: Iterable[Any], text: Callable[[Any], str] = lambda path: path.name) -> str:
    """Names the first few files and counts the rest."""
    names = [text(path) for path in paths]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def batches(items: Sequence[T], batch_size: int, size: Callable[[T], Any]) -> list[list[T]]:
    """Cuts items, finished ones too, into batches of one size, so that a resumed run has the same batches."""
    cut: list[list[T]] = []
    last: dict[Any, list[T]] = {}  # the latest batch of each size
    for item in items:
        if len(last.get(size(item), ())) in (0, batch_size):
            last[size(item)] = []
            cut.append(last[size(item)])
        last[size(item)].append(item)
    return cut


# ---------------------------------------------------------------------------------------------------------
# several processes, and Ctrl-C


def processes(device: str = "auto") -> PartialState:
    """Joins the processes that torchrun or accelerate launched, if any; the first call decides how.

    Raises UserError for a device that is not available.
    """
    from accelerate import PartialState

    # Without cpu=, processes on CPUs don't see each other. Without a longer timeout, a process that has
    # finished waits for half an hour (on GPUs ten minutes), and then all are stopped.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return PartialState(cpu=alone or pick_device(device).type == "cpu", timeout=LONGEST_WAIT)


def once(work: Callable[[], T]) -> T:
    """Calls a function in the first process and shares its result; a UserError there ends all processes."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            result[0] = work()
        except (UserError, OSError) as error:
            result[1] = error
    made, error = broadcast_object_list(result)
    if error is None:
        return made
    if processes().is_main_process:
        raise error
    sys.exit(1)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second run out of a directory while any process of the first one lives.

    Each process holds a lock, which the system releases however it ends; the first process tries all locks.
    Raises UserError if another run is at work there.
    """
    from filelock import FileLock, Timeout

    state = processes()
    own = FileLock(directory / f".facelock.{state.process_index}.lock")

    def acquire() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            own.acquire(timeout=0)
            for other in directory.glob(".facelock.[1-9]*.lock") if state.is_main_process else ():
                with FileLock(other, timeout=0):
                    pass
        except Timeout:
            parts = [path for path in manifests(directory) if path.name != MANIFEST]
            who = ", ".join(path.stem.removeprefix("manifest.") for path in parts)
            who = f" (process {who})" if who else ""
            text = f"{directory}: another run is writing into it{who}; wait until it ends, or stop it"
            raise UserError(text) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise UserError(f"{own.lock_file}: can't be locked ({error.strerror})") from None
            warn(f"{own.lock_file} can't be locked ({error.strerror}), so a second run is not kept out")

    try:
        once(acquire)
        if not state.is_main_process:
            acquire()
        state.wait_for_everyone()
        yield
    finally:
        own.release()


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Collects signals: the first Ctrl-C or SIGTERM ends the run after its batch, the next at once."""
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        if heard:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        heard.append(number)
        print("stopping after this batch (press again to stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------
# the run


@dataclass
class Job:
    """Describes what a directory of results should hold, how it is made, and what this process has made.

    settings: all that determines pixels. `prepare` loads what `work` needs, before anything is written, if
    there is anything to do. `load(item)` reads one item; `work(items, loaded, wanted)` writes the wanted ones
    and returns facts about them.
    """

    items: Sequence[Item]
    load: Callable[[Item], Any]
    work: Callable[[list[Item], list[Any], list[bool]], Facts]
    directory: Path
    settings: dict[str, Any]
    options: Options = USUAL
    prompts: dict[int, str] = field(default_factory=dict)
    prepare: Callable[[], Any] = lambda: None
    unit: str = "image"
    wanted: dict[Path, str] = field(init=False)  # what is to be made -> why, if a file is there
    made: int = field(default=0, init=False)
    failed: list[str] = field(default_factory=list, init=False)

    def run(self) -> int:
        """Makes what the directory lacks, and prints a summary -> exit status.

        Raises UserError before any work, also if another run is at work there.
        """
        from accelerate.utils import gather_object

        state = processes()
        if once(lambda: bool(self.plan())):
            self.prepare()
        with locked(self.directory), listening() as heard:
            self.wanted = once(self.begin)
            cut = batches(self.items, self.options.batch_size, lambda item: item.size or item.output)
            todo = [batch for batch in cut if any(item.output in self.wanted for item in batch)]
            self.go_through(todo[state.process_index :: state.num_processes], heard)
            parts = gather_object([(heard, self.made, self.failed)])
            if state.is_main_process:
                with contextlib.suppress(UserError):  # on a full disk, the next run does it
                    write_manifest(self.directory, read_manifest(self.directory))
        signals = [number for heard, _, _ in parts for number in heard]
        failed = [line for _, _, lines in parts for line in lines]
        if state.is_main_process:
            made, there = sum(made for _, made, _ in parts), len(self.items) - len(self.wanted)
            text = f"{made} written, {there} there already, {len(failed)} failed"
            print(one_line(f"{self.directory}: {text}{'; stopped' if signals else ''}"), flush=True)
            for line in failed:
                print(f"  failed: {line}", file=sys.stderr)
        return 128 + signals[0] if signals else int(bool(failed))

    def plan(self) -> dict[Path, str]:
        """Compares what should be there with what is -> what to make, and why if a file is there.

        Raises UserError: without --overwrite for files that are not the results of this run; always for
        images without a run.json, and for files that would stay behind under other settings.
        """
        directory, redo = self.directory, self.options.overwrite
        check_ours(directory)
        record, entries = read_record(directory), read_manifest(directory)
        files, suffixes = [*directory.glob("*"), *directory.glob("prompt*/*")], readable_suffixes()
        there = {path for path in files if path.suffix.lower() in suffixes and path.name[0] != "."}
        if record is None and there:
            names = listed(sorted(there))
            raise UserError(f"{directory} has images ({names}), but no run.json that says what made them")
        if others := differences(record, self.settings, self.prompts):
            text = f"{directory} was made with other arguments ({'; '.join(others)})"
            if left := listed(sorted(there - {item.output for item in self.items})):
                raise UserError(f"{text}, and this run doesn't make all of its files again ({left})")
            if there and not redo:
                raise UserError(f"{text}; --overwrite makes its files again")
            return {item.output: "other settings" * item.output.exists() for item in self.items}
        whys = {item.output: self.why(item, entries.get(self.name(item.output))) for item in self.items}
        stale = listed((path for path in whys if whys[path]), lambda path: f"{self.name(path)}: {whys[path]}")
        if stale and not redo:
            text = f"{directory}: not the results of this run: {stale}"
            raise UserError(f"{text}; --overwrite makes them again")
        return {path: why for path, why in whys.items() if why is not None}

    def why(self, item: Item, entry: dict[str, Any] | None) -> str | None:
        """Returns why a file has to be made: empty if it doesn't exist; None if it is finished."""
        output = item.output
        if not output.exists() or (entry and "sha256" not in entry):
            return ""  # or it was being made when a run was killed
        if entry is None and output.is_file() and output.stat().st_size:
            return None  # made by hand
        if entry and entry["source"] != digest(item.source):
            return "its source has changed"
        is_same = entry and entry["bytes"] == output.stat().st_size
        if not is_same or (self.options.verify and entry["sha256"] != digest(output)):
            return "not the file that was written"
        return None

    def name(self, output: Path) -> str:
        """Returns a file's name in the manifest."""
        return str(output.relative_to(self.directory))

    def begin(self) -> dict[Path, str]:
        """Records what will be made, and removes what a killed run left. Raises UserError."""
        wanted = self.plan()  # again, now that nobody else can write
        entries, record = read_manifest(self.directory), read_record(self.directory)
        finished = [item.output for item in self.items if item.output not in wanted]
        if unknown := listed(path for path in finished if self.name(path) not in entries):
            warn(f"{self.directory}: no record says what made {unknown}; they are kept as they are")
        for path in self.directory.rglob(".facelock-*-*[0-9].tmp"):
            if path.is_file():
                path.unlink(missing_ok=True)
        stale = {self.name(path) for path, why in wanted.items() if why}
        if differences(record, self.settings, self.prompts):
            stale |= entries.keys()
        # if this run is killed, the next one doesn't take the old files for its own
        write_manifest(self.directory, entries | {name: {"output": name} for name in stale})
        write_record(self.directory, self.settings, self.prompts, self.items[0].source.parent)
        return wanted

    def go_through(self, own: list[list[Item]], heard: list[int]) -> None:
        """Makes this process's batches, whatever fails in them, until a signal comes."""
        from accelerate.utils.memory import clear_device_cache
        from tqdm import tqdm

        state, largest = processes(), self.options.batch_size
        bar = tqdm(total=sum(map(len, own)), unit=self.unit, disable=not (own and state.is_main_process))
        for batch in own:
            if state.num_processes > 1 and os.getppid() != PARENT:
                heard.append(signal.SIGTERM)  # the launcher is gone: nobody needs the results
            if heard:
                break
            todo = self.read(batch)  # all of it, so that its arithmetic is that of a run without a break
            while part := todo[:largest]:
                if self.make(part):
                    todo = todo[largest:]
                else:
                    largest = (len(part) + 1) // 2
                    bar.write(f"out of memory with {len(part)} at a time; going on with {largest}")
                    clear_device_cache(garbage_collection=True)
            bar.update(len(batch))
        bar.close()

    def read(self, batch: list[Item]) -> list[tuple[Item, str, Any]]:
        """Reads a batch -> the items that could be read, with each source's hash, taken before reading."""
        found = []
        for item in batch:
            try:
                found.append((item, digest(item.source), self.load(item)))
            except Exception as error:  # a bad file, or a detector out of memory: the others may work
                self.fail(item, error)
        return found

    def make(self, part: list[tuple[Item, str, Any]]) -> bool:
        """Makes the wanted files of a batch -> False if a smaller batch may fit into memory."""
        from accelerate.utils.memory import should_reduce_batch_size

        items, _, loaded = map(list, zip(*part, strict=True))
        wanted = [item.output in self.wanted for item in items]
        lines = [{"output": self.name(item.output), "source": source} for item, source, _ in part]
        lines = list(itertools.compress(lines, wanted))
        try:
            note(self.directory, lines)  # without sha256: not finished
            for line, facts in zip(lines, self.work(items, loaded, wanted) if lines else (), strict=True):
                output = self.directory / line["output"]
                line |= {"sha256": digest(output), "bytes": output.stat().st_size}
                note(self.directory, [line | facts])
            self.made += len(lines)
        except Exception as error:  # a full disk...: the other batches may work
            if len(part) > 1 and (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                return False
            for item in items:
                self.fail(item, error)
        return True

    def fail(self, item: Item, error: Exception) -> None:
        """Notes that a wanted file could not be made, and reports it. Raises the error with --debug."""
        from tqdm import tqdm

        if self.options.debug:
            raise error
        if item.output in self.wanted:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = name + first_line(error)
            self.failed.append(one_line(text if str(item.source) in text else f"{item.label}: {text}"))
            tqdm.write(f"failed: {self.failed[-1]}", file=sys.stderr)
