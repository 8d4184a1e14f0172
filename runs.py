"""The loop over a directory that every batch script has, and the record of what made the files there.

A script gives it items and two functions that load and make them; pixels are none of this file's business.
run.json holds the settings that decide about pixels, and the manifest one line per file, with the hashes of
its source and of the file itself: a file is finished if it is the result of this source and these settings.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from images import HEIF, images_by_stem, readable_suffixes
from utils import (
    MOST_TEXT,
    NOT_OURS,
    UserError,
    first_line,
    is_special,
    one_line,
    parse_json,
    pick_device,
    positive_int,
    read_plain,
    warn,
    write_file,
)

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
Facts = list[dict[str, Any]]  # about each file that was made, for the manifest

MANIFEST = "manifest.jsonl"
PART = re.compile(r"manifest\.(\d+ on .+)\.jsonl", re.DOTALL)  # what one process adds
OWN_SUFFIXES = (".json", ".jsonl", ".csv")  # of what the scripts write beside images
KINDS = {"prompts": dict, "versions": dict, "later_versions": list, "sources": str}  # of a run.json
LINE = {"output": str, "source": str, "sha256": str, "bytes": int}  # of a manifest
NAMED = 5  # files that a message names before it counts the rest
PACKAGES = [
    "accelerate", "diffusers", "facenet-pytorch", "lpips", "numpy",
    "pillow", "scikit-image", "torch", "torchvision", "transformers",
]  # fmt: skip
PARENT = os.getppid()  # the launcher's process number, if there is one
LONGEST_WAIT = datetime.timedelta(days=30)  # of a process that is done for one that is not


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
    text = "make files again that are there, but not as the result of these sources, settings and methods"
    add("--overwrite", help=text, **flag)
    add("--verify", help="read finished files, too, to see that they are as written", **flag)


def find_images(directory: Path) -> list[Path]:
    """Lists the image files of a directory, sorted by name, and warns of what is not read.

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
        warn(f"{directory}: {len(unread)} files of other kinds are left out ({listed(unread)}){hint}")
    return images


def listed(paths: Iterable[Any], text: Callable[[Any], str] = lambda path: path.name) -> str:
    """Names the first few files and counts the rest."""
    names = [text(path) for path in paths]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


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


# ---------------------------------------------------------------------------------------------------------
# run.json and the manifest


@functools.cache
def versions() -> dict[str, str]:
    """Reads the versions of Python and of what decides about pixels, and the commit of this project."""
    found = {"python": platform.python_version(), **dict.fromkeys(PACKAGES, "not installed")}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    here, quiet = Path(__file__).resolve().parent, subprocess.DEVNULL
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without history
        found["commit"] = subprocess.check_output(command, cwd=here, stderr=quiet, text=True).strip()
    return found


def digest(path: Path) -> str:
    """Hashes a file's bytes (SHA-256); empty if it can't be read. Known files are not read again."""
    try:
        status = os.stat(path)
        return _digest(path, status.st_mtime_ns, status.st_size, status.st_ino)
    except OSError:
        return ""


@functools.lru_cache(maxsize=100_000)
def _digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(directory: Path) -> dict[str, Any] | None:
    """Reads run.json of a directory, None if there is none. Raises UserError if it is damaged."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record = parse_json(read_plain(path, MOST_TEXT))
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            raise TypeError("no arguments in it")
        for key, kind in KINDS.items():
            if not isinstance(record.get(key, kind()), kind):
                raise TypeError(f"its {key} are {record[key]!r}")
        prompts, later = record.get("prompts", {}), record.get("later_versions", [])
        if not all(key.isdecimal() and len(key) < 10 for key in prompts):
            raise ValueError("its prompts are not numbered")
        texts = [*prompts.values(), *record.get("versions", {}).values()]
        if {*map(type, texts)} - {str} or {*map(type, later)} - {dict}:
            raise ValueError("a text in it is none")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a record of a run ({first_line(error)})") from None
    return record


def differences(old: dict[str, Any] | None, settings: dict[str, Any], prompts: dict[int, str]) -> list[str]:
    """Lists in words where a recorded run had other settings, or other texts of the same numbers."""
    if old is None:
        return []
    before, texts = {"seed": old.get("seed"), **old["arguments"]}, old.get("prompts", {})
    if "method_version" in settings.keys() - before.keys():
        return ["by an older FaceLock, which recorded no method_version"]
    pairs = [(key, before.get(key), settings[key]) for key in sorted(settings)]
    pairs += [(f"prompt {key}", texts.get(str(key), text), text) for key, text in prompts.items()]
    return [f"{key}: {there!r} there, {now!r} now" for key, there, now in pairs if there != now]


def write_record(directory: Path, settings: dict[str, Any], prompts: dict[int, str], sources: Path) -> None:
    """Writes run.json: settings, prompts and versions, and where the sources were, which isn't compared.

    Prompts and versions of an earlier run of the same settings stay; warns if the versions are other ones.
    """
    old, now = read_record(directory), versions()
    if old is None or differences(old, settings, prompts):
        old = {}
    first, later = old.get("versions", now), old.get("later_versions", [])
    if now not in [first, *later]:
        changed = [name for name in now if first.get(name, now[name]) != now[name]]
        if words := "; ".join(f"{name} {first[name]}, now {now[name]}" for name in changed):
            warn(f"{directory} was begun with other versions: {words}")
        later = [*later, now]
    arguments = {key: value for key, value in settings.items() if key != "seed"}
    record = {"seed": settings.get("seed"), "arguments": arguments, "sources": str(sources.resolve())}
    record |= {"command": sys.argv, "versions": first, "later_versions": later}
    record["prompts"] = old.get("prompts", {}) | {str(number): text for number, text in prompts.items()}
    kept = {key: value for key, value in record.items() if value or key not in ("later_versions", "prompts")}
    write_file(directory / "run.json", (json.dumps(kept, indent=2) + "\n").encode())


def is_ours(record: dict[str, Any] | None) -> bool:
    """Tells whether a run.json is of this project: nobody else records these versions."""
    versions = record.get("versions") if record else None
    return isinstance(versions, dict) and {"python", "diffusers", "facenet-pytorch"} <= versions.keys()


def check_ours(directory: Path) -> None:
    """Refuses a directory where somebody else's files have the names of a run's. Raises UserError."""
    record, lock = directory / "run.json", directory / ".lock"
    if record.exists() and not is_ours(read_record(directory)):
        raise UserError(f"{record}: {NOT_OURS}")
    for path in [] if record.exists() else [directory / MANIFEST, *parts_in(directory)]:
        if path.exists() and path.stat().st_size:
            raise UserError(f"{path}: {NOT_OURS}")
    for path in [lock, *directory.glob(".lock.[0-9]*")]:
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            raise UserError(f"{path}: is not empty, so it is no lock of this script; move it")


def parts_in(directory: Path) -> list[Path]:
    """Lists the parts of the manifest that the processes of a run have added to."""
    return [path for path in sorted(directory.glob("manifest.*.jsonl")) if PART.fullmatch(path.name)]


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the last line on each file of a directory, by its path there; damaged lines are left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in [directory / MANIFEST, *parts_in(directory)]:
        with contextlib.suppress(OSError):
            for line in [] if is_special(path) else path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):
                    entry = parse_json(line)
                    if is_line(entry):
                        found[entry["output"]] = entry
    return found


def is_line(entry: Any) -> bool:
    """Tells whether this is a line of a manifest: one flipped bit may have made it another thing."""
    if not isinstance(entry, dict) or "output" not in entry:
        return False
    is_whole = "sha256" not in entry or LINE.keys() <= entry.keys()
    return is_whole and all(isinstance(entry.get(key, kind()), kind) for key, kind in LINE.items())


def write_manifest(directory: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Writes the lines of a manifest in the place of its parts. Raises UserError."""
    write_file(directory / MANIFEST, "".join(json.dumps(line) + "\n" for line in entries.values()).encode())
    for part in parts_in(directory):
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# several processes, and Ctrl-C


def processes(device: str = "auto") -> PartialState:
    """Joins the processes that torchrun or accelerate launched, if any; the first call decides how.

    Raises UserError for a device that is not there.
    """
    from accelerate import PartialState

    # Without cpu=, processes on CPUs don't see each other. Without a timeout of ours, one that is done
    # waits for half an hour (on GPUs ten minutes), and then all are stopped.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return PartialState(cpu=alone or pick_device(device).type == "cpu", timeout=LONGEST_WAIT)


def once(work: Callable[[], T]) -> T:
    """Calls a function in the first process, for all; a UserError ends all of them, with status 1."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]
    is_first = processes().is_main_process
    if is_first:
        try:
            result[0] = work()
        except UserError as error:
            result[1] = str(error)
    made, error = broadcast_object_list(result)
    if error is None:
        return made
    if is_first:
        raise UserError(error)
    sys.exit(1)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second run out of a directory while any process of the first one lives.

    Each process holds a lock, which the system takes back however it ends; the first one tries those of all.
    Raises UserError if another run is at work there.
    """
    from filelock import FileLock, Timeout

    state = processes()
    own = FileLock(directory / (".lock" if state.is_main_process else f".lock.{state.process_index}"))

    def acquire() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            own.acquire(timeout=0)
            for other in directory.glob(".lock.[0-9]*") if state.is_main_process else ():
                FileLock(other).acquire(timeout=0).lock.release()
        except Timeout:
            names = [PART.fullmatch(part.name)[1] for part in parts_in(directory)]
            who = f" (process {', '.join(names)})" if names else ""
            text = f"{directory}: another run is writing into it{who}; wait for its end, or stop it"
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
    """Gives the signals heard: Ctrl-C or SIGTERM once, to end after the current batch; again ends at once."""
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        if heard and number == signal.SIGTERM:
            sys.exit(128 + number)
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        print("stopping after this batch (once more: at once)", file=sys.stderr)

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
    """What a directory of results shall hold, how it is made, and what became of it in this process.

    settings: all that decides about pixels. `prepare` loads what `work` needs, before anything is written, if
    there is anything to do. `load(item)` reads one; `work(items, loaded, wanted)` writes the wanted ones and
    gives facts about them.
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
        """Makes what the directory lacks, and tells what became of it -> exit status.

        Raises UserError before any work, also if another run is at work there.
        """
        from accelerate.utils import gather_object

        state = processes()
        if once(lambda: bool(self.plan()[0])):
            self.prepare()
        with locked(self.directory):
            self.wanted = once(self.begin)
            cut = batches(self.items, self.options.batch_size, lambda item: item.size or item.output)
            todo = [batch for batch in cut if any(item.output in self.wanted for item in batch)]
            heard = self.go_through(todo[state.process_index :: state.num_processes])
            parts = gather_object([(heard, self.made, self.failed)])
            if state.is_main_process:
                with contextlib.suppress(UserError):  # on a full disk, the next run does it
                    write_manifest(self.directory, read_manifest(self.directory))
        number, made = max(heard for heard, _, _ in parts), sum(made for _, made, _ in parts)
        failed = [line for _, _, lines in parts for line in lines]
        if state.is_main_process:
            text = f"{made} written, {len(self.items) - len(self.wanted)} there already, {len(failed)} failed"
            print(one_line(f"{self.directory}: {text}{'; stopped' if number else ''}"), flush=True)
            for line in failed:
                print(f"  failed: {line}", file=sys.stderr)
        return 128 + number if number else int(bool(failed))

    def plan(self) -> tuple[dict[Path, str], list[Path]]:
        """Compares what shall be there with what is -> what is to be made, and what nothing explains.

        Raises UserError: without --overwrite for files that are not the results of this run; always for
        images without a run.json, and for files that would stay behind under other settings.
        """
        directory, entries = self.directory, read_manifest(self.directory)
        check_ours(directory)
        record = read_record(directory)
        others = differences(record, self.settings, self.prompts)
        wanted, unknown = {}, []
        for item in self.items:
            output, entry = item.output, entries.get(str(item.output.relative_to(directory)))
            if not output.exists():
                wanted[output] = ""
            elif others:
                wanted[output] = "other settings"
            elif entry is None and output.is_file() and output.stat().st_size:
                unknown.append(output)
            elif entry and "sha256" not in entry:
                wanted[output] = ""  # it was being made when a run was killed
            elif entry and entry["source"] != digest(item.source):
                wanted[output] = "its source has changed"
            elif not entry or not self._is_whole(output, entry):
                wanted[output] = "not the file that was written"
        files, suffixes = [*directory.glob("*"), *directory.glob("prompt*/*")], readable_suffixes()
        there = {path for path in files if path.suffix.lower() in suffixes and path.name[0] != "."}
        left = listed(sorted(there - {item.output for item in self.items}))
        stale = [path for path, why in wanted.items() if why]
        otherwise = f"{directory} was made with other arguments ({'; '.join(others)})"
        if record is None and there:
            names = listed(sorted(there))
            raise UserError(f"{directory} has images ({names}), but no run.json that says what made them")
        if others and left:
            raise UserError(f"{otherwise}, and this run doesn't make all of its files again ({left})")
        if others and there and not self.options.overwrite:
            raise UserError(f"{otherwise}; --overwrite makes its files again")
        if stale and not self.options.overwrite:
            names = listed(stale, lambda path: f"{path.relative_to(directory)}: {wanted[path]}")
            text = f"{directory}: not the results of this run: {names}"
            raise UserError(f"{text}; --overwrite makes them again")
        return wanted, unknown

    def _is_whole(self, output: Path, entry: dict[str, Any]) -> bool:
        """Tells whether a file still is what its line in the manifest says, by its size or all its bytes."""
        same = entry["bytes"] == output.stat().st_size
        return same and not (self.options.verify and entry["sha256"] != digest(output))

    def begin(self) -> dict[Path, str]:
        """Writes down what is to be made, and removes what a killed run left. Raises UserError."""
        wanted, unknown = self.plan()  # again, now that nobody else can write
        if unknown:
            warn(f"{self.directory}: nothing says what made {listed(unknown)}; taken as they are")
        for path in [*self.directory.glob(".facelock-*.tmp"), *self.directory.glob("*/.facelock-*.tmp")]:
            if re.fullmatch(r"\.facelock-[0-9a-f]{12}-\d+\.tmp", path.name) and path.is_file():
                path.unlink(missing_ok=True)
        entries, record = read_manifest(self.directory), read_record(self.directory)
        stale = {str(path.relative_to(self.directory)) for path, why in wanted.items() if why}
        if differences(record, self.settings, self.prompts):
            stale |= entries.keys()
        # if this run is killed, the next one doesn't take the old files for its own
        write_manifest(self.directory, entries | {name: {"output": name} for name in stale})
        write_record(self.directory, self.settings, self.prompts, self.items[0].source.parent)
        return wanted

    def go_through(self, own: list[list[Item]]) -> int:
        """Makes this process's batches, whatever fails in them -> the signal that ended it, or 0.

        Where memory doesn't suffice for a batch, it and those after it are halved.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
        from tqdm import tqdm

        state, largest = processes(), self.options.batch_size
        bar = tqdm(total=sum(map(len, own)), unit=self.unit, disable=not (own and state.is_main_process))
        with bar, listening() as heard:
            for batch in own:
                if heard:
                    return heard[0]
                if state.num_processes > 1 and os.getppid() != PARENT:
                    return signal.SIGTERM  # the launcher is gone, so nobody waits for this process
                todo = self.read(batch)
                while todo:
                    part, error = todo[:largest], None
                    try:
                        self.finish(part)
                    except Exception as caught:  # a full disk...: the other batches may still do
                        error = caught
                    no_memory = isinstance(error, MemoryError) or should_reduce_batch_size(error)
                    if no_memory and len(part) > 1:
                        largest = (len(part) + 1) // 2
                        bar.write(f"out of memory with {len(part)} at a time; going on with {largest}")
                        del error  # its traceback holds tensors
                        clear_device_cache(garbage_collection=True)
                        continue
                    for item, _, _ in part if error else ():
                        self.fail(item, error)
                    todo = todo[largest:]
                bar.update(len(batch))
        return heard[0] if heard else 0  # in the last batch: what comes after this directory stops

    def read(self, batch: list[Item]) -> list[tuple[Item, str, Any]]:
        """Reads all of a batch, so that its arithmetic is an undisturbed run's -> with each source's hash."""
        found = []
        for item in batch:
            try:  # the hash is the source's before it is read
                found.append((item, digest(item.source), self.load(item)))
            except Exception as error:  # a bad file, or a detector out of memory: the others may still do
                self.fail(item, error)
        return found

    def finish(self, part: list[tuple[Item, str, Any]]) -> None:
        """Makes the wanted files of what was read, with their lines in the manifest."""
        items, sources, loaded = map(list, zip(*part, strict=True))
        wanted = [item.output in self.wanted for item in items]
        lines = [
            {"output": str(item.output.relative_to(self.directory)), "source": source}
            for item, source in zip(items, sources, strict=True)
            if item.output in self.wanted
        ]
        self.note(lines)  # without sha256: not finished
        for line, facts in zip(lines, self.work(items, loaded, wanted) if lines else (), strict=True):
            output = self.directory / line["output"]
            self.note([line | {"sha256": digest(output), "bytes": output.stat().st_size} | facts])
        self.made += len(lines)

    def note(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines to this process's part of the manifest."""
        with open(self.directory / f"manifest.{os.getpid()} on {socket.gethostname()}.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def fail(self, item: Item, error: Exception) -> None:
        """Notes that a wanted file could not be made, and says so. Raises the error with --debug."""
        from tqdm import tqdm

        if self.options.debug:
            raise error
        if item.output in self.wanted:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = name + first_line(error)
            self.failed.append(one_line(text if str(item.source) in text else f"{item.label}: {text}"))
            tqdm.write(f"failed: {self.failed[-1]}", file=sys.stderr)
