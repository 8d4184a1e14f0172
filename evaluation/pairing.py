"""Pairing the edits of all rows, and their sources, by file stem; and whether they belong together.

A picture may have come by several steps (protected, purified, edited); each directory's manifest tells one,
by hashes. Where nothing is recorded, nothing is refused.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from directories import Row, clean_row, find_rows, prompts_of

import utils
from images import image_size, images_by_stem
from models.config import EDIT_KNOBS
from runs import digest, listed, read_manifest, read_record
from utils import UserError, warn

EDIT_SETTINGS = ("model", "model_id", "dtype", "resolution", "scheduler", *EDIT_KNOBS)
Size = tuple[int, int]  # (H, W)
MOST_STEPS = 9  # of a chain; directories that were made of each other would have no end


class Key(NamedTuple):
    """Says which edit: the same one in every row."""

    seed: int
    prompt: int
    name: str  # the files' stem


@dataclass(frozen=True)
class Edits:
    """All that is to be scored, paired by stem."""

    rows: list[Row]  # without the clean edits, unless they were asked for as a row
    clean: Row | None  # the edits of the unprotected images, if they are given
    files: dict[tuple[Row, int, int], dict[str, Path]]  # by row, seed and prompt: files by stem
    keys: list[Key]  # sorted
    sizes: dict[Key, Size | None]  # of the edit, the same in every row; None if its header can't be read
    sources: dict[str, Path]  # by stem; empty if none are given
    texts: dict[int, str]  # the instructions, where they are known
    gallery: dict[str, Path] = field(default_factory=dict)  # portraits beside the sources, by stem
    references: dict[str, list[Path]] = field(default_factory=dict)  # other photos of each person

    @property
    def every_row(self) -> list[Row]:
        """The rows with the clean edits first."""
        return [self.clean, *self.rows] if self.clean else self.rows

    @property
    def prompts(self) -> list[int]:
        """The numbers of the instructions."""
        return sorted({key.prompt for key in self.keys})

    @property
    def names(self) -> list[str]:
        """The images' stems."""
        return sorted({key.name for key in self.keys})

    def path(self, row: Row, key: Key) -> Path:
        """Gives the file of an edit."""
        return self.files[row, key.seed, key.prompt][key.name]

    def check_texts(self) -> None:
        """Refuses prompts whose instruction is not known. Raises UserError."""
        if unknown := [f"prompt{number}" for number in self.prompts if number not in self.texts]:
            raise UserError(f"{', '.join(unknown)}: the instruction is not known; give --prompt_file")


def find_edits(
    edit_dirs: Sequence[Path],
    seeds: Sequence[int],
    *,
    clean_edit_dir: Path | None = None,
    src_dir: Path | None = None,
    prompts: Sequence[int] | None = None,
    prompt_file: Path | None = None,
    names: Sequence[str] | None = None,
    common: bool = False,
    gallery_dir: Path | None = None,
    reference_dir: Path | None = None,
) -> Edits:
    """Finds edits, pairs them by stem and checks all that can be checked without reading pixels.

    Every directory must have every stem that any has (or all of `names`); with `common` the rest is named and
    left out. Raises UserError naming what is missing or doesn't fit.
    """
    seeds = sorted(set(seeds))
    rows = find_rows(edit_dirs, seeds, common)
    clean = clean_row(clean_edit_dir, seeds) if clean_edit_dir else None
    if clean:  # it may lie beside the others, in a directory given for all of them
        hidden = {clean.directory.resolve()} - {path.resolve() for path in edit_dirs}
        rows = [row for row in rows if row.directory.resolve() not in hidden]
    if not rows:
        raise UserError(f"{edit_dirs[0]}: no edits in it but the clean ones")
    every_row = [clean, *rows] if clean else rows
    numbers = prompts_of(every_row, seeds, prompts)
    files, there = {}, {}
    for row, seed, prompt in product(every_row, seeds, numbers):
        folder = row.directory / f"seed{seed}" / f"prompt{prompt}"
        files[row, seed, prompt] = there[folder] = images_by_stem(folder)
    there |= {src_dir: images_by_stem(src_dir)} if src_dir else {}
    shared = shared_names(there, common, names)
    keys = [Key(*key) for key in product(seeds, numbers, shared)]
    texts = texts_of(every_row, seeds, numbers, prompt_file)
    sources = {name: there[src_dir][name] for name in shared} if src_dir else {}
    sizes = sizes_of(every_row, files, keys)
    gallery = images_by_stem(gallery_dir) if gallery_dir else {}
    references = references_of(reference_dir, sources) if reference_dir else {}
    return Edits(rows, clean, files, keys, sizes, sources, texts, gallery, references)


def references_of(directory: Path, sources: dict[str, Path]) -> dict[str, list[Path]]:
    """Finds other photos of each person, NAME.* or NAME/*. Raises UserError where there is none."""
    own, found = images_by_stem(directory), {}
    for name, source in sources.items():
        paths = [own[name]] if name in own else []
        paths += images_by_stem(directory / name).values() if (directory / name).is_dir() else []
        found[name] = [path for path in paths if digest(path) != digest(source)]
    if lacking := [name for name, paths in found.items() if not paths]:
        raise UserError(f"{directory}: no other photo of {', '.join(lacking)} (NAME.* or NAME/*)")
    return found


def shared_names(there: dict[Path, dict[str, Path]], common: bool, wanted: Sequence[str] | None) -> list[str]:
    """Lists the stems (of the wanted) that all directories have. Raises UserError naming what some lack."""
    shared = set.intersection(*map(set, there.values()))
    union = set(wanted) if wanted else set().union(*there.values())
    lacking = []
    for name in sorted(union - shared):
        places = [str(directory) for directory, names in there.items() if name not in names]
        more = f" and {len(places) - 3} more" if places[3:] else ""
        lacking.append(f"{name} in {', '.join(places[:3])}{more}")
    if lacking and not common:
        raise UserError(f"images are missing: {'; '.join(lacking)} (--common scores those that all have)")
    if lacking:
        print(utils.one_line(f"left out, not in every directory: {'; '.join(lacking)}"), file=sys.stderr)
    if not shared & union:
        raise UserError("no image is in every directory")
    return sorted(shared & union)


def sizes_of(
    rows: Sequence[Row], files: dict[tuple[Row, int, int], dict[str, Path]], keys: Sequence[Key]
) -> dict[Key, Size | None]:
    """Reads each edit's size. Raises UserError if it is not the same in all rows."""
    sizes = {}
    for key in keys:
        first, *others = [files[row, key.seed, key.prompt][key.name] for row in rows]
        size = sizes[key] = image_size(first)
        for path in others:
            other = image_size(path)
            if size and other and size != other:  # None: not an image; whoever reads it says so
                raise UserError(f"{path} is {other[1]}x{other[0]}, but {first} is {size[1]}x{size[0]}")
    return sizes


def texts_of(
    rows: Sequence[Row], seeds: Sequence[int], prompts: Sequence[int], file: Path | None
) -> dict[int, str]:
    """Gives the instructions by number: the file's, else what main_edit.py recorded, else the paper's.

    Warns of other settings that differ. Raises UserError for two texts of a number: it is not the same edit.
    """
    texts = utils.choose_prompts(None, file) if file else {}
    origin = dict.fromkeys(texts, file)
    settings, differing = {}, {}
    for directory in [row.directory / f"seed{seed}" for row in rows for seed in seeds]:
        record = read_record(directory) or {}
        for number, text in ((int(key), text) for key, text in record.get("prompts", {}).items()):
            if number in prompts and texts.setdefault(number, text) != text:
                raise UserError(
                    f"prompt{number} is {texts[number]!r} in {origin[number]}, but {text!r} in {directory}"
                )
            origin.setdefault(number, directory)
        for flag, value in record.get("arguments", {}).items():
            known, where = settings.setdefault(flag, (value, directory))
            if flag in EDIT_SETTINGS and known != value:
                differing.setdefault(flag, f"--{flag} was {known} for {where}, {value} for {directory}")
    for warning in differing.values():
        warn(warning)
    return texts or dict(utils.edit_prompts)


class Manifests:
    """What the manifests of directories of results say; each is read once."""

    def __init__(self) -> None:
        readers = (read_manifest, _or_empty(read_record), _or_empty(images_by_stem))
        self._entries, self._records, self._files = map(cache, readers)

    def entry(self, directory: Path, output: str) -> dict[str, Any] | None:
        """Gives the line about a file, by its path in the directory; None if there is none."""
        return self._entries(directory).get(output)

    def source(self, directory: Path, output: str) -> Path | None:
        """Finds the file that a result was made of, where it was; None if there is none now."""
        sources = self._records(directory).get("sources")
        folder = Path(sources) if isinstance(sources, str) else None
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


def _or_empty(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Makes a reader give {} for a UserError: of what is somebody's own, or not there any more."""

    def reading(directory: Path) -> Any:
        with suppress(UserError):
            return read(directory) or {}
        return {}

    return reading


def place(edits: Edits, row: Row, key: Key) -> tuple[Path, str]:
    """Gives the directory whose manifest tells of an edit, and the edit's path in it."""
    directory = row.directory / f"seed{key.seed}"
    return directory, edits.path(row, key).relative_to(directory).as_posix()


def check_edits(edits: Edits, manifests: Manifests) -> None:
    """Refuses edits whose sources changed, and clean ones of others; warns of unknown. Raises UserError."""
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
    """Refuses protected images of other sources, changed, or edited in no row. Raises UserError."""
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
