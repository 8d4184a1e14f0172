"""What made the files of a directory of results: run.json and the manifest, and what of it is still true.

run.json holds the settings that decide about pixels. The manifest has a line a file: its source's hash, its
own, and a hash of the settings. So "there already" can mean: the result of this source and these settings.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from images import readable_suffixes
from utils import UserError, first_line, warn, write_file

PACKAGES = [
    "accelerate", "diffusers", "facenet-pytorch", "lpips", "numpy",
    "pillow", "scikit-image", "torch", "torchvision", "transformers",
]  # fmt: skip
MANIFEST = "manifest.jsonl"
ABSENT = {"budget_mask": "none", "vae_ids": None}  # settings that are recorded only where they are not this
NAMED = 5  # files that a message names before it counts the rest


def versions() -> dict[str, str]:
    """Reads the versions of Python and of what decides about pixels."""
    found = {"python": platform.python_version(), **dict.fromkeys(PACKAGES, "not installed")}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
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


def code_of(function: Callable[..., Any], classes: bool = False) -> str:
    """Gives a function's code and of all that it names, in its module or beside it, without comments.

    classes: whether the module's classes count, too; `function` may then be one.
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
        elif (
            inspect.isfunction(value) or classes and inspect.isclass(value)
        ) and value.__module__ == module.__name__:
            text = re.sub(r'"""[\s\S]*?"""|#.*', "", inspect.getsource(value))
            found[key] = " ".join(text.split())
            waiting += [(word, module) for word in re.findall(r"[A-Za-z_]\w*", text)]
    return "\n".join(found[key] for key in sorted(found))


def hash_of(thing: Any) -> str:
    """Hashes anything that JSON can write."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def settings_of_file(settings: dict[str, Any], prompt: str | None) -> str:
    """Hashes the settings for a file's line; `networks_code`, which old lines lack, is left to run.json."""
    return hash_of([{key: value for key, value in settings.items() if key != "networks_code"}, prompt])


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
    before = {"seed": old.get("seed"), **ABSENT, **old["arguments"]}
    before |= {f"prompt {number}": text for number, text in old.get("prompts", {}).items()}
    now = ABSENT | settings | {f"prompt {number}": text for number, text in prompts.items()}
    other = sorted(key for key in now if key in before and before[key] != now[key])
    return [f"{key}: {before[key]!r} there, {now[key]!r} now" for key in other]


def write_record(directory: Path, settings: dict[str, Any], prompts: dict[int, str], sources: Path) -> None:
    """Writes run.json: settings, prompts and versions, and where the sources were, which isn't compared.

    What a run of the same settings recorded stays, its versions as a first entry. Raises UserError.
    """
    old, now = read_record(directory), versions()
    arguments = {key: value for key, value in settings.items() if key != "seed"}
    record = {"seed": settings.get("seed"), "arguments": arguments, "sources": str(sources.resolve())}
    record |= {"command": sys.argv, "versions": now}
    texts = {str(number): text for number, text in prompts.items()}
    if old is not None and not differences(old, settings, prompts):
        texts = {**old.get("prompts", {}), **texts}
        before, later = old.get("versions", now), old.get("later_versions", [])
        if now not in [before, *later]:
            changed = [name for name in now if before.get(name) != now[name]]
            words = "; ".join(f"{name} {before.get(name)}, now {now[name]}" for name in changed)
            warn(f"{directory} was begun with other versions: {words}")
            later = [*later, now]
        record["versions"] = before
        record |= {"later_versions": later} if later else {}
    record |= {"prompts": texts} if texts else {}
    write_file(directory / "run.json", (json.dumps(record, indent=2) + "\n").encode())


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the last line on each file of a directory, by its path there; half-written lines are left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in [directory / MANIFEST, *sorted(directory.glob("manifest.*.jsonl"))]:
        with contextlib.suppress(OSError):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    found[entry["output"]] = entry
    return found


def gather_manifest(directory: Path) -> None:
    """Makes one file of the manifest and what the processes of a run have added. Raises UserError."""
    if parts := sorted(directory.glob("manifest.*.jsonl")):
        lines = [json.dumps(entry) + "\n" for entry in read_manifest(directory).values()]
        write_file(directory / MANIFEST, "".join(lines).encode())
    for part in parts:
        part.unlink(missing_ok=True)


def note(directory: Path, rank: int, output: Path, source: str, settings: str, **facts: Any) -> None:
    """Adds a line to one process's part of a manifest; without the facts of `made`, a file isn't finished."""
    line = {"output": str(output.relative_to(directory)), "source": source, "settings": settings, **facts}
    with open(directory / f"manifest.{rank}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def made(output: Path) -> dict[str, Any]:
    """Gives the facts that say of a file that it is finished."""
    return {"sha256": digest(output), "bytes": output.stat().st_size}


def make_plan(
    directory: Path,
    outputs: Sequence[tuple[Path, Path, str | None]],
    settings: dict[str, Any],
    prompts: dict[int, str],
    *,
    overwrite: bool,
    verify: bool,
) -> tuple[dict[Path, str], list[Path]]:
    """Compares a directory with what a run would make: (output, source, instruction) of each file.

    An output is there already if settings, source and bytes (size; with `verify` its hash) are those in the
    manifest. Returns what is to be made, with the reason if it is there, and what is there unexplained.
    Raises UserError: without `overwrite`, for reasons and other settings; for images without a run.json, and
    for files that would stay behind under other settings.
    """
    record, entries = read_record(directory), read_manifest(directory)
    others = differences(record, settings, prompts)
    wanted, unknown = {}, []
    for output, source, prompt in outputs:
        entry = entries.get(str(output.relative_to(directory)))
        if not output.exists():
            wanted[output] = ""
        elif not output.is_file():
            wanted[output] = "not a file"
        elif entry is None and others:
            wanted[output] = "other settings"
        elif entry is None and output.stat().st_size == 0:
            wanted[output] = "empty"
        elif entry is None:
            unknown.append(output)
        elif "sha256" not in entry:
            wanted[output] = ""  # the one in flight when a run was killed
        elif entry["settings"] != settings_of_file(settings, prompt):
            wanted[output] = "other settings or instruction"
        elif entry["source"] != digest(source):
            wanted[output] = "its source has changed"
        elif entry["bytes"] != output.stat().st_size or (verify and entry["sha256"] != digest(output)):
            wanted[output] = "not the file that was written"
    files, suffixes = [*directory.glob("*"), *directory.glob("prompt*/*")], readable_suffixes()
    there = sorted(path for path in files if path.suffix.lower() in suffixes and path.name[0] != ".")
    if record is None and there:
        raise UserError(f"{directory} has images ({listed(there)}), but no run.json that says what made them")
    made_otherwise = f"{directory} was made with other arguments ({'; '.join(others)})"
    if others and (left := sorted({*there} - {output for output, _, _ in outputs})):
        why = f"and this run doesn't make all of its files again ({listed(left)})"
        raise UserError(f"{made_otherwise}, {why}")
    if others and there and not overwrite:
        raise UserError(f"{made_otherwise}; --overwrite makes its files again")
    if (stale := [path for path, why in wanted.items() if why]) and not overwrite:
        names = listed(stale, lambda path: f"{path.relative_to(directory)}: {wanted[path]}")
        raise UserError(f"{directory}: not the results of this run: {names}; --overwrite makes them again")
    return wanted, unknown


def listed(paths: Iterable[Path], text: Any = lambda path: path.name) -> str:
    """Names the first few files and counts the rest."""
    names = [text(path) for path in paths]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
