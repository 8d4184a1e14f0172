"""Finding the rows of a table, their seeds and prompts.

A *row* of a table is a directory that holds `seed{S}/prompt{i}/NAME.png`, as main_edit.py makes it. A given
directory may be a row, lie one or two folders above rows, or be a row's `seed{S}`.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The scripts of this folder run in it and above it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils import UserError


@dataclass(frozen=True)
class Row:
    """One line of a table: the edits of one method at one budget."""

    method: str
    directory: Path  # holds seed{S}


def find_rows(directories: Sequence[Path], seeds: Sequence[int], common: bool = False) -> list[Row]:
    """Lists the rows that directories stand for, each once; with `common`, those lacking a seed are left out.

    Raises UserError, also if there is none.
    """
    rows: dict[Path, Row] = {}
    lacking = []
    for given in directories:
        if not given.is_dir():
            raise UserError(f"{given}: no such directory")
        name = given.resolve().name
        if re.fullmatch(r"seed\d+", name) and [name] != [f"seed{seed}" for seed in seeds]:
            raise UserError(f"{given}: holds other edits than --seed {' '.join(map(str, seeds))}")
        if re.fullmatch(r"seed\d+", name):
            found = {given.resolve().parent: given}
        elif not (found := {row: row for row in _rows_below(given, 2)}):
            raise UserError(f"{given}: no seed{seeds[0]} in it or in its sub-directories")
        for row, named in found.items():
            if missing := [f"seed{seed}" for seed in seeds if not (row / f"seed{seed}").is_dir()]:
                lacking.append(f"{row}: no {', '.join(missing)} (there are {', '.join(_seeds_in(row))})")
            else:  # `clean` alone is the unprotected edits'
                rows.setdefault(row.resolve(), Row("./clean" if str(named) == "clean" else str(named), row))
    if lacking and not (common and rows):
        raise UserError("; ".join(lacking) + (" (--common leaves such rows out)" if rows else ""))
    if lacking:
        utils.warn(f"left out: {'; '.join(lacking)}")
    return list(rows.values())


def _rows_below(directory: Path, depth: int) -> list[Path]:
    """The directory itself if it holds any seed, else those below that do."""
    if _seeds_in(directory):
        return [directory]
    return [row for child in _folders(directory) for row in _rows_below(child, depth - 1)] if depth else []


def _seeds_in(directory: Path) -> list[str]:
    """The names of its seed folders; seed00, which is not seed 0's, among them."""
    return [child.name for child in _folders(directory) if re.fullmatch(r"seed\d+", child.name)]


def _folders(directory: Path) -> list[Path]:
    try:
        return sorted(child for child in directory.iterdir() if child.is_dir())
    except OSError as error:
        raise UserError(f"{directory}: can't be listed ({error.strerror})") from None


def clean_row(directory: Path, seeds: Sequence[int]) -> Row:
    """Gives the row `clean`: the edits of the unprotected images. Raises UserError unless it is one row."""
    rows = find_rows([directory], seeds)
    if len(rows) > 1:
        found = ", ".join(row.method for row in rows)
        raise UserError(f"{directory}: which are the clean edits? ({found})")
    return Row("clean", rows[0].directory)


def find_row(rows: Sequence[Row], name: str) -> Row:
    """Gives the row of this name, or with it in its path. Raises UserError unless there is just one."""
    exact = [row for row in rows if name in (row.method, str(row.directory))]
    matching = exact or [row for row in rows if f"/{name.strip('/')}/" in f"/{row.method}/"]
    if len(matching) != 1:
        known = ", ".join(row.method for row in rows)
        raise UserError(f"--baseline {name}: {len(matching)} rows are called so ({known})")
    return matching[0]


def prompts_of(rows: Sequence[Row], seeds: Sequence[int], asked: Sequence[int] | None) -> list[int]:
    """Lists the prompts to score: those asked for, else all that there are. Raises UserError if one lacks."""
    folders = [row.directory / f"seed{seed}" for row in rows for seed in seeds]
    there = {folder: {child.name for child in _folders(folder)} for folder in folders}
    numbered = (re.fullmatch(r"prompt(0|[1-9]\d*)", name) for names in there.values() for name in names)
    prompts = sorted(set(asked) if asked is not None else {int(found[1]) for found in numbered if found})
    if not prompts:
        raise UserError(f"{folders[0]}: no prompt folders in it")
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
    found = []
    for directory in given:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        budgets = [child for child in _folders(directory) if child.name.startswith("budget_")]
        found += budgets or [directory]
    return found
