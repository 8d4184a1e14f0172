"""Pairing the edits of all rows, and their sources, by file stem."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from directories import Row, clean_row, find_rows, prompts_of

import utils
from images import image_size, images_by_stem
from models.sets import EDIT_KNOBS
from records import read_record
from utils import UserError

EDIT_SETTINGS = ("model", "model_id", "dtype", "resolution", "scheduler", *EDIT_KNOBS)
Size = tuple[int, int]  # (H, W)


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
) -> Edits:
    """Finds edits, pairs them by stem and checks all that can be checked without reading pixels.

    Every directory must have every stem that any has (or all of `names`); with `common` only those that all
    have are taken, and the rest is named on stderr. Raises UserError naming what is missing or doesn't fit.
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
    return Edits(rows, clean, files, keys, sizes, sources, texts, gallery)


def shared_names(there: dict[Path, dict[str, Path]], common: bool, wanted: Sequence[str] | None) -> list[str]:
    """Lists the stems that all directories have, sorted; only the wanted ones, if any are named.

    Raises UserError naming what some lack, unless `common`: then it is named on stderr.
    """
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

    Raises UserError if a record tells another text than the file or than another record: then the same
    number is not the same edit. Other settings that differ (guidance, steps, weights) are warned of.
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
        utils.warn(warning)
    return texts or dict(utils.edit_prompts)
