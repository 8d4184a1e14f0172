"""The files that the evaluation writes: none destroys anything, and CSV is as a spreadsheet may read it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import directories  # noqa: F401 (finds the project's modules)

import utils
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

MOST_SHOWN = 1e9  # of a metric


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a CSV file, whole or not at all: numbers with six digits, empty for NaN. Raises UserError."""
    for column in {"method", "name"} & {*frame.columns}:
        frame = frame.assign(**{column: frame[column].astype(object).map(utils.csv_name)})
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    utils.write_own(path, text.encode(errors="surrogateescape"))


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table of ours, names as texts. Raises UserError."""
    import pandas as pd

    texts = {"method": object, "name": object}
    how = {"keep_default_na": False, "na_values": [""], "encoding_errors": "surrogateescape"}
    try:
        if utils.is_special(path):
            raise ValueError("a device or a pipe")
        frame = pd.read_csv(path, dtype=texts, **how)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: not a readable table ({utils.first_line(error)})") from None
    for column in texts.keys() & {*frame.columns}:
        frame[column] = frame[column].fillna("").map(utils.name_of_csv)
    return frame


def check_numbers(path: Path, numbers: pd.DataFrame) -> None:
    """Refuses what no axis could show: infinity, and sizes that no metric has. Raises UserError."""
    if (numbers.abs() > MOST_SHOWN).any(axis=None):
        raise UserError(f"{path}: a number in it is infinite or over {MOST_SHOWN:g}")


def check_outputs(
    outputs: Iterable[Path | None], inputs: Iterable[Path | None] = (), suffixes: Sequence[str] = (".csv",)
) -> None:
    """Refuses outputs that can't be written, would destroy something or overwrite each other.

    An existing file is overwritten only if it is empty or as `utils.write_own` wrote it, and it is none of
    the inputs; what is not a regular file, such as /dev/null, is written through. Raises UserError.
    """
    given = [path for path in outputs if path and not utils.is_special(path)]
    for path in filter(None, outputs):
        if Path(os.path.realpath(path)).is_fifo():  # /dev/stdout and >(...) are pipes without a name
            raise UserError(f"{path}: is a named pipe, which may have no reader")
    read = [path for path in inputs if path and path.exists()]
    for path in given:
        if path.is_dir():
            raise UserError(f"{path}: is a directory")
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{path}: is written as {' or '.join(suffixes)}; ask for that")
        utils.check_directory(path.absolute().parent)
        if path.exists() and any(path.samefile(other) for other in read):
            raise UserError(f"{path}: would overwrite what this run reads")
        utils.check_own(path)
    if len({path.resolve() for path in given}) < len(given):
        raise UserError(f"one output would overwrite the other: {' '.join(map(str, given))}")
