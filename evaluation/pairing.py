"""Finds edits, pairs them by file stem, and checks that they belong together.

A *row* of a table is a directory that holds `seed{S}/prompt{i}/NAME.png`, as main_edit.py makes it. A given
directory may be a row, lie one or two folders above rows, or be a row's `seed{S}`.

An edit may be the last of several steps (protected, purified, edited). The manifest of each directory records
one of them, by hashes. Files without a record are not refused.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import utils
from images import image_size, images_by_stem
from models.config import EDIT_KNOBS
from runs import digest, listed, read_manifest, read_record
from utils import UserError, warn

if TYPE_CHECKING:
    import pandas as pd

EDIT_SETTINGS = ("model", "model_id", "dtype", "resolution", "scheduler", *EDIT_KNOBS)
NUMBER = r"\d*\.?\d+(?:e-?\d+)?"  # as in budget_0.03
Size = tuple[int, int]  # (H, W)
MOST_STEPS = 9  # back from an edit, so that directories made from each other don't loop for ever


class Row(NamedTuple):
    """Names one row of a table: the edits of one method at one budget."""

    method: str
    directory: Path  # holds seed{S}


class Key(NamedTuple):
    """Identifies an edit within a row."""

    seed: int
    prompt: int
    name: str  # the file's stem


def parse_row(name: str) -> tuple[str, str]:
    """Splits the name of a row into method and budget: edits/facelock/budget_0.03 -> facelock, 0.03.

    The method is the last part that is neither budget nor seed; the budget is "" if there is none.
    """
    parts = [part for part in Path(name).parts if part != "/"]
    methods = [part for part in parts if not re.fullmatch(f"(budget_|seed){NUMBER}", part)]
    budgets = [part[7:] for part in parts if re.fullmatch(f"budget_{NUMBER}", part)]
    return (methods or [name])[-1], (budgets or [""])[-1]


class Manifests:
    """Reads what directories record about their files, each directory once."""

    def __init__(self) -> None:
        readers = (read_manifest, read_record, images_by_stem)
        self._entries, self._records, self._files = map(cache, readers)

    def entry(self, directory: Path, output: str) -> dict[str, Any] | None:
        """Returns the manifest's line about a file, by its path in the directory; None if there is none."""
        return self._entries(directory).get(output)

    def source(self, directory: Path, output: str) -> Path | None:
        """Finds the file that a result was made from; None if it is no longer there."""
        with suppress(UserError, OSError):  # a directory is gone, or a record is somebody else's
            if sources := (self._records(directory) or {}).get("sources"):
                folder = Path(sources)
                if re.fullmatch(r"prompt\d+", folder.name):  # purified edits: made prompt by prompt
                    folder = folder.with_name(Path(output).parent.name)
                return self._files(folder).get(Path(output).stem)
        return None

    def origins(self, directory: Path, output: str) -> list[str]:
        """Lists the hashes of a file's source, of the source's source, and so on."""
        found: list[str] = []
        while (entry := self.entry(directory, output)) and len(found) < MOST_STEPS:
            if found and entry.get("sha256") != found[-1]:  # replaced by another file since
                break
            found.append(entry.get("source", ""))
            if (source := self.source(directory, output)) is None:
                break
            directory, output = source.parent, source.name
        return found


@dataclass(frozen=True)
class Edits:
    """Holds all edits to be scored, paired by stem."""

    rows: list[Row]  # without the clean edits, unless they were given as a row
    clean: Row | None  # the edits of the unprotected images, if they are given
    files: dict[tuple[Row, int, int], dict[str, Path]]  # by row, seed and prompt: files by stem
    keys: list[Key]  # sorted
    sizes: dict[Key, Size | None]  # the same in every row; None if the header can't be read
    sources: dict[str, Path]  # by stem; empty if none are given
    texts: dict[int, str] = field(default_factory=dict)  # the instructions that are known
    gallery: dict[str, Path] = field(default_factory=dict)  # portraits beside the sources, by stem
    references: dict[str, list[Path]] = field(default_factory=dict)  # other photos of each person
    manifests: Manifests = field(default_factory=Manifests)

    @property
    def every_row(self) -> list[Row]:
        """Lists the rows, with the clean edits first."""
        return [self.clean, *self.rows] if self.clean else self.rows

    @property
    def prompts(self) -> list[int]:
        """Lists the numbers of the instructions."""
        return sorted({key.prompt for key in self.keys})

    @property
    def names(self) -> list[str]:
        """Lists the images' stems."""
        return sorted({key.name for key in self.keys})

    def path(self, row: Row, key: Key) -> Path:
        """Returns the file of an edit."""
        return self.files[row, key.seed, key.prompt][key.name]

    def about(self, rows: Sequence[Row]) -> "pd.DataFrame":
        """Describes rows as `about_rows` does."""
        return about_rows(rows, self.keys[0].seed)

    def place(self, row: Row, key: Key) -> tuple[Path, str]:
        """Returns the directory whose manifest lists an edit, and the edit's path in it."""
        directory = row.directory / f"seed{key.seed}"
        return directory, self.path(row, key).relative_to(directory).as_posix()

    def foreign(self, row: Row, files: dict[str, Path]) -> Iterator[str]:
        """Lists the images whose edits in this row were made from other pictures than these files."""
        for key in self.keys:
            origins = self.manifests.origins(*self.place(row, key))
            if origins and digest(files[key.name]) not in ("", *origins):  # "": reading it will fail
                yield key.name

    def check_texts(self) -> None:
        """Refuses prompts whose instruction is not known. Raises UserError."""
        if unknown := [f"prompt{number}" for number in self.prompts if number not in self.texts]:
            raise UserError(f"{', '.join(unknown)}: the instruction is not known; give --prompt_file")


# ---------------------------------------------------------------------------------------------------------
# what made a row


def made_by(row: Row, seed: int) -> dict[str, str]:
    """Finds method, budget, editor and purifier of a row in the run.json of each step; "" if not known.

    If none has method and budget, the row's name does. What is done after an edit is no purifier.
    """
    method, budget = parse_row(row.method)
    found = {"method": method, "budget": budget, "editor": "", "purifier": ""}
    directory = row.directory / f"seed{seed}"
    if not directory.is_dir():  # protected images have no seed
        directory = row.directory
    for _ in range(MOST_STEPS):
        record = None
        with suppress(UserError, OSError):
            record = read_record(directory)
        if record is None:
            break
        said = record["arguments"]
        if "attack_budget" in said:
            found["method"] = str(said.get("defend_method", method))
            if isinstance(said["attack_budget"], int | float):
                found["budget"] = f"{said['attack_budget']:g}"
        elif "method" in said:
            if found["editor"]:
                found["purifier"] = "+".join(filter(None, (str(said["method"]), found["purifier"])))
        elif "model" in said:
            id_ = re.sub(r" [0-9a-f]{8}$", "", str(said.get("model_id")))  # without the hash
            found["editor"] = f"{said['model']}={id_}"
        directory = Path(record.get("sources", ""))
        if re.fullmatch(r"prompt\d+", directory.name):  # an edit was altered
            directory = directory.parent
    return found


def about_rows(rows: Sequence[Row], seed: int = 0) -> "pd.DataFrame":
    """Describes rows, by their names: method, budget, editor and purifier, all texts.

    No two rows have the same method and budget: the method is named as in run.json; if two rows would be the
    same, after the row's directory; and if they still are, by the row's whole name.
    """
    import pandas as pd

    found, names = [made_by(row, seed) for row in rows], [row.method for row in rows]
    about = pd.DataFrame(found, names, ["method", "budget", "editor", "purifier"], dtype=object)
    whole = [re.sub(f"(?<=.)/budget_{NUMBER}/?$", "", row.method) for row in rows]
    for names in ([parse_row(row.method)[0] for row in rows], whole):
        same = about.duplicated(["method", "budget"], keep=False)
        about["method"] = about["method"].mask(same, pd.Series(names, about.index, dtype=object))
    return about


# ---------------------------------------------------------------------------------------------------------
# rows, seeds and prompts


def find_rows(directories: Sequence[Path], seeds: Sequence[int], common: bool = False) -> list[Row]:
    """Lists the rows in directories, each once; with `common`, rows that lack a seed are left out.

    Raises UserError, also if there is no row.
    """
    rows: dict[Path, Row] = {}
    lacking = []
    for given in directories:
        name = given.resolve().name
        is_seed = re.fullmatch(r"seed\d+", name)
        if is_seed and [name] != [f"seed{seed}" for seed in seeds]:
            raise UserError(f"{given}: doesn't hold the edits of --seed {' '.join(map(str, seeds))}")
        found = {given.resolve().parent: given} if is_seed else {row: row for row in _rows_below(given, 2)}
        if not found:
            text = f"no seed{seeds[0]} in it or in its sub-directories; main_edit.py makes them from pictures"
            raise UserError(f"{given}: {text}")
        for row, named in found.items():
            if missing := [f"seed{seed}" for seed in seeds if not (row / f"seed{seed}").is_dir()]:
                lacking.append(f"{row}: no {', '.join(missing)} (there are {', '.join(_seeds_in(row))})")
            else:  # the row of the unprotected edits is called `clean`
                rows.setdefault(row.resolve(), Row("./clean" if str(named) == "clean" else str(named), row))
    if lacking and not (common and rows):
        raise UserError("; ".join(lacking) + (" (--common leaves such rows out)" if rows else ""))
    if lacking:
        utils.warn(f"left out: {'; '.join(lacking)}")
    return list(rows.values())


def _rows_below(directory: Path, depth: int) -> list[Path]:
    """Lists the directory itself if it holds any seed, else the rows below it."""
    if _seeds_in(directory):
        return [directory]
    return [row for child in folders(directory) for row in _rows_below(child, depth - 1)] if depth else []


def _seeds_in(directory: Path) -> list[str]:
    """Lists the names of its seed folders, including seed00, which is not seed 0's."""
    return [child.name for child in folders(directory) if re.fullmatch(r"seed\d+", child.name)]


def folders(directory: Path) -> list[Path]:
    """Lists the folders in a directory, by name. Raises UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    return sorted(child for child in directory.iterdir() if child.is_dir())


def clean_row(directory: Path, seeds: Sequence[int]) -> Row:
    """Makes the row `clean`: the edits of the unprotected images. Raises UserError unless it is one row."""
    rows = find_rows([directory], seeds)
    if len(rows) > 1:
        found = ", ".join(row.method for row in rows)
        raise UserError(f"{directory}: holds several rows; which are the clean edits? ({found})")
    return Row("clean", rows[0].directory)


def find_row(rows: Sequence[Row], name: str) -> Row:
    """Finds the row of this name, or with it in its path. Raises UserError unless there is exactly one."""
    exact = [row for row in rows if name in (row.method, str(row.directory))]
    matching = exact or [row for row in rows if f"/{name.strip('/')}/" in f"/{row.method}/"]
    if len(matching) != 1:
        known = ", ".join(row.method for row in rows)
        called = f"{len(matching)} rows have" if matching else "no row has"
        raise UserError(f"--baseline {name}: {called} this name (there are {known})")
    return matching[0]


def find_prompts(rows: Sequence[Row], seeds: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    """Lists the prompts to score: the wanted ones, else all. Raises UserError if a row lacks one."""
    places = [row.directory / f"seed{seed}" for row in rows for seed in seeds]
    there = {place: {child.name for child in folders(place)} for place in places}
    numbered = (re.fullmatch(r"prompt(0|[1-9]\d*)", name) for names in there.values() for name in names)
    prompts = sorted(set(wanted) if wanted is not None else {int(found[1]) for found in numbered if found})
    if not prompts:
        raise UserError(f"{next(iter(there))}: no prompt folders in it")
    lacking = [
        f"{folder}: {', '.join(missing)}"
        for folder, names in there.items()
        if (missing := [f"prompt{i}" for i in prompts if f"prompt{i}" not in names])
    ]
    if lacking:
        raise UserError(f"prompts are missing: {'; '.join(lacking)}")
    return prompts


def protected_rows(given: Sequence[Path]) -> list[Path]:
    """Lists the directories of protected images: each given one, or its budget_{B}. Raises UserError."""
    budgets = {place: [child for child in folders(place) if child.name[:7] == "budget_"] for place in given}
    return [row for directory in given for row in budgets[directory] or [directory]]


# ---------------------------------------------------------------------------------------------------------
# pairing


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

    Every directory must have every stem that any of them has (or all of `names`); with `common`, the others
    are named and left out. Raises UserError that names what is missing or doesn't fit.
    """
    seeds = sorted(set(seeds))
    rows = find_rows(edit_dirs, seeds, common)
    clean = clean_row(clean_edit_dir, seeds) if clean_edit_dir else None
    if clean:  # it may lie beside the others, in a directory that was given for all of them
        hidden = {clean.directory.resolve()} - {path.resolve() for path in edit_dirs}
        rows = [row for row in rows if row.directory.resolve() not in hidden]
    if not rows:
        raise UserError(f"{edit_dirs[0]}: no edits in it but the clean ones")
    every_row = [clean, *rows] if clean else rows
    numbers = find_prompts(every_row, seeds, prompts)
    files, there = {}, {}
    for row, seed, prompt in product(every_row, seeds, numbers):
        folder = row.directory / f"seed{seed}" / f"prompt{prompt}"
        files[row, seed, prompt] = there[folder] = images_by_stem(folder)
    there |= {src_dir: images_by_stem(src_dir)} if src_dir else {}
    shared = shared_names(there, common, names)
    keys = [Key(*key) for key in product(seeds, numbers, shared)]
    recorded = [row.directory / f"seed{seed}" for row in every_row for seed in seeds]
    texts = find_texts(recorded, numbers, prompt_file)
    sources = {name: there[src_dir][name] for name in shared} if src_dir else {}
    sizes = find_sizes(every_row, files, keys)
    gallery = images_by_stem(gallery_dir) if gallery_dir else {}
    references = find_references(reference_dir, sources) if reference_dir else {}
    return Edits(rows, clean, files, keys, sizes, sources, texts, gallery, references)


def find_references(directory: Path, sources: dict[str, Path]) -> dict[str, list[Path]]:
    """Finds other photos of each person, NAME.* or NAME/*. Raises UserError if somebody has none."""
    own, found = images_by_stem(directory), {}
    for name, source in sources.items():
        paths = [own[name]] if name in own else []
        paths += images_by_stem(directory / name).values() if (directory / name).is_dir() else []
        found[name] = [path for path in paths if digest(path) != digest(source)]
    if lacking := [name for name, paths in found.items() if not paths]:
        raise UserError(f"{directory}: no other photo of {', '.join(lacking)} (NAME.* or NAME/*)")
    return found


def shared_names(there: dict[Path, dict[str, Path]], common: bool, wanted: Sequence[str] | None) -> list[str]:
    """Lists the (wanted) stems that all directories have. Raises UserError that names what some lack."""
    shared = set.intersection(*map(set, there.values()))
    union = set(wanted) if wanted else set().union(*there.values())
    lacking = []
    for name in sorted(union - shared):
        places = (directory for directory, names in there.items() if name not in names)
        lacking.append(f"{name} in {listed(places, str)}")
    if lacking and not common:
        raise UserError(f"images are missing: {'; '.join(lacking)} (--common scores those that all have)")
    if lacking:
        print(utils.one_line(f"left out, not in every directory: {'; '.join(lacking)}"), file=sys.stderr)
    if not shared & union:
        raise UserError("no image is in every directory")
    return sorted(shared & union)


def find_sizes(
    rows: Sequence[Row], files: dict[tuple[Row, int, int], dict[str, Path]], keys: Sequence[Key]
) -> dict[Key, Size | None]:
    """Reads the size of each edit. Raises UserError if it is not the same in all rows."""
    sizes = {}
    for key in keys:
        first, *others = [files[row, key.seed, key.prompt][key.name] for row in rows]
        size = sizes[key] = image_size(first)
        for path in others:
            other = image_size(path)
            if size and other and size != other:  # None: not an image, which is reported when it is read
                raise UserError(f"{path} is {other[1]}x{other[0]}, but {first} is {size[1]}x{size[0]}")
    return sizes


def find_texts(directories: Sequence[Path], prompts: Sequence[int], file: Path | None) -> dict[int, str]:
    """Returns the instructions by number: the file's, else what main_edit.py recorded, else the paper's.

    Warns of other settings that differ. Raises UserError if a number has two texts: the edits differ.
    """
    texts = utils.choose_prompts(None, file) if file else {}
    origin = dict.fromkeys(texts, file)
    settings, differing = {}, {}
    for directory in directories:
        record = read_record(directory) or {}
        for number, text in ((int(key), text) for key, text in record.get("prompts", {}).items()):
            if number in prompts and texts.setdefault(number, text) != text:
                there, here = f"{texts[number]!r} in {origin[number]}", f"{text!r} in {directory}"
                raise UserError(f"prompt{number} is {there}, but {here}")
            origin.setdefault(number, directory)
        for flag, value in record.get("arguments", {}).items():
            known, where = settings.setdefault(flag, (value, directory))
            if flag in EDIT_SETTINGS and known != value:
                differing.setdefault(flag, f"--{flag} was {known} for {where}, {value} for {directory}")
    for warning in differing.values():
        warn(warning)
    return texts or dict(utils.edit_prompts)


# ---------------------------------------------------------------------------------------------------------
# what was made from what


def check_edits(edits: Edits) -> None:
    """Refuses edits whose sources have changed, and clean edits of other sources. Raises UserError.

    Warns if nothing is recorded.
    """
    unknown = {}
    for row in edits.every_row:
        changed: dict[str, Path] = {}
        for key in edits.keys:
            place = edits.place(row, key)
            entry, source = edits.manifests.entry(*place), edits.manifests.source(*place)
            if entry is None:
                unknown[row] = str(row.directory)
            elif source and digest(source) not in ("", entry.get("source")):
                changed.setdefault(key.name, source)
        if changed:
            where = next(iter(changed.values())).parent
            other = f"other pictures than those now in {where} ({listed(changed, str)})"
            raise UserError(f"{row.directory} holds edits of {other}")
    if edits.clean and edits.sources:
        check_pair(edits, edits.clean, edits.sources)
    if unknown:
        rows = listed(unknown.values(), str)
        warn(f"nothing records what these edits were made from, so that can't be checked: {rows}")


def check_pair(edits: Edits, row: Row, files: dict[str, Path], hint: str = "") -> None:
    """Refuses a row whose edits were made from other pictures than these files. Raises UserError."""
    if foreign := list(dict.fromkeys(edits.foreign(row, files))):
        other = f"other pictures than those in {files[foreign[0]].parent} ({listed(foreign, str)})"
        raise UserError(f"{row.directory} holds edits of {other}{hint}")


def find_protected(given: Sequence[Path], edits: Edits) -> Edits:
    """Pairs protected images with their sources, as if these were edits and clean edits. Raises UserError."""
    rows = [Row(str(directory), directory) for directory in protected_rows(given)]
    sources = Row("source", next(iter(edits.sources.values())).parent)
    files = {(row, 0, 0): images_by_stem(row.directory) for row in rows} | {(sources, 0, 0): edits.sources}
    for row in rows:
        if lacking := [name for name in edits.sources if name not in files[row, 0, 0]]:
            raise UserError(f"images are missing: {', '.join(lacking)} in {row.directory}")
        check_protected(edits, row.directory, files[row, 0, 0])
    keys = [Key(0, 0, name) for name in edits.sources]
    return Edits(rows, sources, files, keys, find_sizes([sources, *rows], files, keys), sources={})


def check_protected(edits: Edits, directory: Path, files: dict[str, Path]) -> None:
    """Refuses protected images of other sources, changed ones, and those no row edits. Raises UserError."""
    other, changed = [], []
    for name in edits.names:
        entry = edits.manifests.entry(directory, files[name].name)
        if entry is None:
            continue
        origins = edits.manifests.origins(directory, files[name].name)
        if digest(edits.sources[name]) not in ("", *origins):
            other.append(name)
        elif digest(files[name]) not in ("", entry.get("sha256")):
            changed.append(name)
    if other:
        pictures = f"other pictures than those in {edits.sources[other[0]].parent} ({listed(other, str)})"
        raise UserError(f"{directory} was made from {pictures}")
    if changed:
        raise UserError(f"{directory}: not the files that main_defend.py wrote ({listed(changed, str)})")
    if all(next(edits.foreign(row, files), None) for row in edits.rows):
        closest = min(edits.rows, key=lambda row: len(list(edits.foreign(row, files))))
        check_pair(edits, closest, files, ", and so do all other rows")
