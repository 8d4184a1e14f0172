"""What made the files of a directory of results: run.json and the manifest, and what of it is still true.

run.json holds the settings that decide about pixels. The manifest has a line a file: its source's hash, its
own, and a hash of the settings. So "there already" can mean: the result of this source and these settings.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from images import readable_suffixes
from utils import UserError, first_line, warn, write_file

PACKAGES = [
    "accelerate", "diffusers", "facenet-pytorch", "lpips", "numpy",
    "pillow", "scikit-image", "torch", "torchvision", "transformers",
]  # fmt: skip
MANIFEST = "manifest.jsonl"
NAMED = 5  # files that a message names before it counts the rest


def versions() -> dict[str, str]:
    """Reads the versions of Python and of what decides about pixels."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
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


def code_of(function: Callable[..., Any]) -> str:
    """Gives the code of a function and of all that it names, in its module or beside it, without comments.

    A result is stale if a constant or a helper of its method changed, not if a docstring was reworded.
    """
    home, found = inspect.getmodule(function), {}
    waiting = [(function.__name__, home)]
    while waiting:
        name, module = waiting.pop()
        value = getattr(module, name, None)
        if inspect.isfunction(value) and Path(value.__code__.co_filename).parent == Path(__file__).parent:
            module = inspect.getmodule(value)
        if (key := (name, module.__name__)) in found:
            continue
        if isinstance(value, int | float | str | tuple):
            found[key] = f"{name} = {value!r}"
        elif inspect.isfunction(value) and value.__module__ == module.__name__:
            text = re.sub(r'"""[\s\S]*?"""|#.*', "", inspect.getsource(value))
            found[key] = " ".join(text.split())
            waiting += [(word, module) for word in re.findall(r"[A-Za-z_]\w*", text)]
    return "\n".join(found[key] for key in sorted(found))


def hash_of(thing: Any) -> str:
    """Hashes anything that JSON can write."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# run.json


def read_record(directory: Path) -> dict[str, Any] | None:
    """Reads run.json of a directory, None if there is none. Raises UserError if it is damaged."""
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


def differences(old: dict[str, Any] | None, settings: dict[str, Any], prompts: dict[int, str]) -> list[str]:
    """Lists in words where a recorded run had other settings or texts; what it doesn't know is left."""
    if old is None:
        return []
    before = {"seed": old.get("seed"), **old["arguments"]}
    before |= {f"prompt {number}": text for number, text in old.get("prompts", {}).items()}
    now = settings | {f"prompt {number}": text for number, text in prompts.items()}
    return [
        f"{key}: {before[key]!r} there, {value!r} now"
        for key, value in sorted(now.items())
        if key in before and before[key] != value
    ]


def write_record(directory: Path, settings: dict[str, Any], prompts: dict[int, str], sources: Path) -> None:
    """Writes run.json: the settings, prompts and versions, and where the sources were, which isn't compared.

    What an earlier run of the same settings recorded stays: its prompts, and its versions as a first entry.
    Raises UserError.
    """
    old, now = read_record(directory), versions()
    arguments = {key: value for key, value in settings.items() if key != "seed"}
    record = {"seed": settings.get("seed"), "arguments": arguments, "sources": str(sources.resolve())}
    record |= {"command": sys.argv, "versions": now}
    texts = {str(number): text for number, text in prompts.items()}
    if old is not None and not differences(old, settings, prompts):
        texts = {**old.get("prompts", {}), **texts}
        before = old.get("versions", now)
        later = old.get("later_versions", [])
        if now not in [before, *later]:
            changed = [name for name in now if before.get(name) != now[name]]
            words = "; ".join(f"{name} {before.get(name)}, now {now[name]}" for name in changed)
            warn(f"{directory} was begun with other versions: {words}")
            later = [*later, now]
        record["versions"] = before
        record |= {"later_versions": later} if later else {}
    record |= {"prompts": texts} if texts else {}
    write_file(directory / "run.json", (json.dumps(record, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------
# the manifest


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the last line on each file of a directory, by its path there; half-written lines are left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in _parts(directory):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError:
            continue
        for line in lines:
            try:
                entry = json.loads(line)
                found[entry["output"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _parts(directory: Path) -> list[Path]:
    """The manifest, and what the processes of a run have added since."""
    return [directory / MANIFEST, *sorted(directory.glob("manifest.*.jsonl"))]


def gather_manifest(directory: Path) -> None:
    """Makes one file of the manifest's parts. Raises UserError."""
    whole, *parts = _parts(directory)
    if not parts:
        return
    lines = [json.dumps(entry) + "\n" for entry in read_manifest(directory).values()]
    write_file(whole, "".join(lines).encode())
    for part in parts:
        part.unlink(missing_ok=True)


class Manifest:
    """One process's part of a directory's manifest: whole lines, each on the disk before the next file."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.path = directory / f"manifest.{rank}.jsonl"
        self.file: TextIO | None = None

    def begin(self, output: Path, source: str, settings: str) -> None:
        """Notes that a file is in the making: until `done`, nobody takes it for finished."""
        self._write(output, source=source, settings=settings)

    def done(self, output: Path, source: str, settings: str, facts: dict[str, Any]) -> None:
        """Notes a finished file: its source's hash and its own, its settings', and facts about it."""
        made = {"sha256": digest(output), "bytes": output.stat().st_size}
        self._write(output, source=source, settings=settings, **made, **facts)

    def close(self) -> None:
        """Closes the file, if anything was noted."""
        if self.file:
            with contextlib.suppress(OSError):  # on a full disk, closing fails once more
                self.file.close()

    def _write(self, output: Path, **facts: Any) -> None:
        if self.file is None:
            self.file = open(self.path, "a")  # noqa: SIM115 (open as long as the run goes on)
        self.file.write(json.dumps({"output": str(output.relative_to(self.directory)), **facts}) + "\n")
        self.file.flush()


# ---------------------------------------------------------------------------------------------------------
# what of a directory is still true


@dataclass
class Plan:
    """What a run finds in its directory."""

    wanted: set[Path] = field(default_factory=set)  # outputs to be made
    stale: dict[Path, str] = field(default_factory=dict)  # there, but not this run's results; and why
    unknown: list[Path] = field(default_factory=list)  # there, with nothing that says what made them


def make_plan(
    directory: Path,
    outputs: Iterable[tuple[Path, Path, str | None]],
    settings: dict[str, Any],
    prompts: dict[int, str],
    *,
    overwrite: bool,
    verify: bool,
) -> Plan:
    """Compares a directory with what a run would make: (output, source, instruction) of each file.

    An output is there already if its settings, its source's bytes and its own are those of its line in the
    manifest (its size, with `verify` its hash). With `overwrite` all others are made again. Raises UserError
    listing the others, for images without a run.json, and for files that would stay behind under other
    settings.
    """
    record, entries = read_record(directory), read_manifest(directory)
    others = differences(record, settings, prompts)
    plan, mine = Plan(), set()
    for output, source, prompt in outputs:
        mine.add(output)
        if not output.exists():
            plan.wanted.add(output)
            continue
        if not output.is_file():
            plan.stale[output] = "not a file"
            continue
        entry = entries.get(str(output.relative_to(directory)))
        if entry is None:
            if output.stat().st_size == 0 or others:
                plan.stale[output] = "other settings" if others else "empty"
            else:
                plan.unknown.append(output)
        elif "sha256" not in entry:
            plan.wanted.add(output)  # the one in flight when a run was killed
        elif entry["settings"] != item_key(settings, prompt):
            plan.stale[output] = "other settings or instruction"
        elif entry["source"] != digest(source):
            plan.stale[output] = "its source has changed"
        elif entry["bytes"] != output.stat().st_size or (verify and entry["sha256"] != digest(output)):
            plan.stale[output] = "not the file that was written"
    files, suffixes = [*directory.glob("*"), *directory.glob("prompt*/*")], readable_suffixes()
    there = sorted(path for path in files if path.suffix.lower() in suffixes and path.name[0] != ".")
    if record is None and there:
        raise UserError(f"{directory} has images ({listed(there)}), but no run.json that says what made them")
    made_otherwise = f"{directory} was made with other arguments ({'; '.join(others)})"
    if others and (left_behind := [path for path in there if path not in mine]):
        left = listed(left_behind)
        raise UserError(f"{made_otherwise}, and this run doesn't make all of its files again ({left})")
    if others and there and not overwrite:
        raise UserError(f"{made_otherwise}; --overwrite makes its files again")
    if plan.stale and not overwrite:
        names = listed(plan.stale, lambda path: f"{path.relative_to(directory)}: {plan.stale[path]}")
        raise UserError(f"{directory}: not the results of this run: {names}; --overwrite makes them again")
    plan.wanted |= plan.stale.keys()
    return plan


def item_key(settings: dict[str, Any], prompt: str | None) -> str:
    """Hashes all that decides about one file beside its source."""
    return hash_of([settings, prompt])


def listed(paths: Iterable[Path], text: Any = lambda path: path.name) -> str:
    """Names the first few files and counts the rest."""
    names = [text(path) for path in paths]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
