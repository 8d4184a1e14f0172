"""Records what made the files of a directory: settings in run.json, and a manifest with one line per file.

run.json holds all settings that determine pixels. A line of the manifest holds the hashes of a file and of
its source; a line without a hash stands for a file that was being made when a run ended.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from utils import (
    MOST_TEXT,
    NOT_OURS,
    UserError,
    first_line,
    is_special,
    parse_json,
    read_plain,
    warn,
    write_file,
)

MANIFEST = "manifest.jsonl"
PACKAGES = [
    "accelerate", "diffusers", "facenet-pytorch", "lpips", "numpy",
    "pillow", "scikit-image", "torch", "torchvision", "transformers",
]  # fmt: skip
LINE = {"output": str, "source": str, "sha256": str, "bytes": int}  # of the manifest


@functools.cache
def versions() -> dict[str, str]:
    """Reads the versions of Python and of the packages that affect pixels, and the commit of this project."""
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
    """Hashes a file's bytes (SHA-256), again only if it has changed; empty if it can't be read."""
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
    """Reads the run.json of a directory; None if there is none. Raises UserError if it is damaged."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record = parse_json(read_plain(path, MOST_TEXT))
        prompts, later = record.get("prompts", {}), record.get("later_versions", [])
        texts = [record.get("sources", ""), *prompts.values(), *record.get("versions", {}).values()]
        is_sound = isinstance(record["arguments"], dict) and all(isinstance(text, str) for text in texts)
        is_sound &= isinstance(later, list) and all(isinstance(entry, dict) for entry in later)
        if not (is_sound and all(key.isdecimal() and len(key) < 10 for key in prompts)):
            raise ValueError("a value of the wrong kind")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a record of a run ({first_line(error)})") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: not a record of a run (unexpected keys or values)") from None
    return record


def differences(old: dict[str, Any] | None, settings: dict[str, Any], prompts: dict[int, str]) -> list[str]:
    """Lists where a recorded run had other settings, or other instructions under the same numbers."""
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

    Prompts and versions of an earlier run with the same settings stay; warns if the versions have changed.
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
    record = {
        "seed": settings.get("seed"),
        "arguments": {key: value for key, value in settings.items() if key != "seed"},
        "sources": str(sources.resolve()),
        "command": sys.argv,
        "versions": first,
        "later_versions": later,
        "prompts": old.get("prompts", {}) | {str(number): text for number, text in prompts.items()},
    }
    write_file(directory / "run.json", (json.dumps(record, indent=2) + "\n").encode())


def check_ours(directory: Path) -> None:
    """Refuses a directory with somebody else's run.json, or a manifest without one. Raises UserError."""
    record, known = read_record(directory), {"python", "diffusers", "facenet-pytorch"}
    if record is not None and not known <= record.get("versions", {}).keys():  # nobody else records these
        raise UserError(f"{directory / 'run.json'}: {NOT_OURS}")
    for path in manifests(directory) if record is None else ():
        if path.stat().st_size:
            raise UserError(f"{path}: {NOT_OURS}")


def manifests(directory: Path) -> list[Path]:
    """Lists the manifest, if there is one, and the parts that the processes of a run write."""
    parts = sorted(directory.glob("manifest.[0-9]* on ?*.jsonl"))
    return [path for path in [directory / MANIFEST, *parts] if path.exists()]


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the last line about each file of a directory, by its path in it; skips damaged lines."""
    found: dict[str, dict[str, Any]] = {}
    for path in manifests(directory):
        with contextlib.suppress(OSError):
            for line in [] if is_special(path) else path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):
                    entry = parse_json(line)
                    if is_line(entry):
                        found[entry["output"]] = entry
    return found


def is_line(entry: Any) -> bool:
    """Returns whether this is a line of a manifest: a flipped bit may have turned it into something else."""
    if not isinstance(entry, dict) or "output" not in entry:
        return False
    is_whole = "sha256" not in entry or LINE.keys() <= entry.keys()
    return is_whole and all(isinstance(entry.get(key, kind()), kind) for key, kind in LINE.items())


def note(directory: Path, lines: list[dict[str, Any]]) -> None:
    """Adds lines to this process's part of the manifest."""
    with open(directory / f"manifest.{os.getpid()} on {socket.gethostname()}.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_manifest(directory: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Writes the lines of a manifest, and removes its parts. Raises UserError."""
    write_file(directory / MANIFEST, "".join(json.dumps(line) + "\n" for line in entries.values()).encode())
    for path in manifests(directory):
        if path.name != MANIFEST:
            path.unlink(missing_ok=True)
