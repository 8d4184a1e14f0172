"""Checks that sources, protected images and edits belong together, by the hashes that the scripts recorded.

A picture may have come by several steps (protected, purified, edited); each directory's manifest tells one.
Where nothing is recorded, nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from directories import Row
from pairing import Edits, Key

from images import images_by_stem
from records import digest, listed, read_manifest, read_record
from utils import UserError, warn

MOST_STEPS = 9  # of a chain; directories that were made of each other would have no end


class Manifests:
    """What the manifests of directories of results say; each is read once."""

    def __init__(self) -> None:
        self._entries, self._sources, self._files = map(cache, (read_manifest, _sources_of, _files_of))

    def entry(self, directory: Path, output: str) -> dict[str, Any] | None:
        """Gives the line about a file, by its path in the directory; None if there is none."""
        return self._entries(directory).get(output)

    def source(self, directory: Path, output: str) -> Path | None:
        """Finds the file that a result was made of, where it was; None if there is none now."""
        folder = self._sources(directory)
        if folder and re.fullmatch(r"prompt\d+", folder.name):  # cheats.py's: made of edits, prompt by prompt
            folder = folder.with_name(Path(output).parent.name)
        return self._files(folder).get(Path(output).stem) if folder else None

    def origins(self, directory: Path, output: str) -> list[str]:
        """Lists the hashes of what a file was made of, of what that was made of, and so on."""
        found: list[str] = []
        while (entry := self.entry(directory, output)) and len(found) < MOST_STEPS:
            if found and entry.get("sha256") != found[-1]:  # another file has taken its place since
                break
            found.append(entry.get("source", ""))
            if (source := self.source(directory, output)) is None:
                break
            directory, output = source.parent, source.name
        return found

    def foreign(self, edits: Edits, row: Row, files: dict[str, Path]) -> Iterator[str]:
        """Finds the images whose edits in this row were made of others than these files."""
        for key in edits.keys:
            origins = self.origins(*place(edits, row, key))
            if origins and digest(files[key.name]) not in ("", *origins):  # "": who reads it will say so
                yield key.name


def _sources_of(directory: Path) -> Path | None:
    """Where a directory's sources were, as run.json says; that may be somebody's own."""
    with suppress(UserError):
        sources = (read_record(directory) or {}).get("sources")
        return Path(sources) if isinstance(sources, str) else None


def _files_of(directory: Path) -> dict[str, Path]:
    """The images of a directory by stem; none of one that is not there any more."""
    with suppress(UserError):
        return images_by_stem(directory)
    return {}


def place(edits: Edits, row: Row, key: Key) -> tuple[Path, str]:
    """Gives the directory whose manifest tells of an edit, and the edit's path in it."""
    directory = row.directory / f"seed{key.seed}"
    return directory, edits.path(row, key).relative_to(directory).as_posix()


def check_edits(edits: Edits, manifests: Manifests) -> None:
    """Refuses edits whose sources have changed since, and clean ones of others than the sources given.

    Rows of which nothing is recorded are warned of in one line. Raises UserError.
    """
    unknown = {}
    for row in edits.every_row:
        changed: dict[str, Path] = {}
        for key in edits.keys:
            found = place(edits, row, key)
            entry, source = manifests.entry(*found), manifests.source(*found)
            if entry is None:
                unknown[row] = str(row.directory)
            elif source and digest(source) not in ("", entry.get("source")):
                changed.setdefault(key.name, source)
        if changed:
            where = next(iter(changed.values())).parent
            other = f"other pictures than those that {where} holds now ({listed(changed, str)})"
            raise UserError(f"{row.directory} holds edits of {other}")
    if edits.clean and edits.sources:
        check_pair(edits, edits.clean, edits.sources, manifests)
    if unknown:
        rows = listed(unknown.values(), str)
        warn(f"nothing tells what these edits were made of, so that can't be checked: {rows}")


def check_pair(edits: Edits, row: Row, files: dict[str, Path], manifests: Manifests, hint: str = "") -> None:
    """Refuses a row whose edits are recorded to be of other pictures than these. Raises UserError."""
    if foreign := list(dict.fromkeys(manifests.foreign(edits, row, files))):
        other = f"other pictures than those in {files[foreign[0]].parent} ({listed(foreign, str)})"
        raise UserError(f"{row.directory} holds edits of {other}{hint}")


def check_protected(edits: Edits, directory: Path, files: dict[str, Path], manifests: Manifests) -> None:
    """Refuses protected images that were made of other sources, were changed since, or that no row edits.

    Raises UserError.
    """
    other, changed = [], []
    for name in edits.names:
        entry = manifests.entry(directory, files[name].name)
        if entry is None:
            continue
        if digest(edits.sources[name]) not in ("", *manifests.origins(directory, files[name].name)):
            other.append(name)
        elif digest(files[name]) not in ("", entry.get("sha256")):
            changed.append(name)
    if other:
        pictures = f"other pictures than those in {edits.sources[other[0]].parent} ({listed(other, str)})"
        raise UserError(f"{directory} was made from {pictures}")
    if changed:
        raise UserError(f"{directory}: not the files that main_defend.py wrote ({listed(changed, str)})")
    if all(next(manifests.foreign(edits, row, files), None) for row in edits.rows):
        closest = min(edits.rows, key=lambda row: len(list(manifests.foreign(edits, row, files))))
        check_pair(edits, closest, files, manifests, ", and so do all other rows")
