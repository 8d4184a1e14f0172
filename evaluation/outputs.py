"""The files that the evaluation writes: none destroys anything, and CSV is as a spreadsheet may read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import directories  # noqa: F401 (finds the project's modules)

import utils
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes a CSV file, whole or not at all: numbers with six digits, empty for NaN. Raises UserError."""
    for column in {"method", "name"} & {*frame.columns}:
        frame = frame.assign(**{column: frame[column].astype(object).map(utils.csv_name)})
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    utils.write_file(path, text.encode(errors="surrogateescape"))


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table of ours, names as texts. Raises UserError."""
    import pandas as pd

    texts = {"method": object, "name": object}
    try:
        frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: not a readable table ({utils.first_line(error)})") from None
    if "method" in frame:
        frame["method"] = frame["method"].fillna("").map(lambda name: re.sub(r"^'(?=[=+\-@\t\r])", "", name))
    return frame


def check_outputs(
    outputs: Iterable[Path | None],
    inputs: Iterable[Path | None] = (),
    suffixes: Sequence[str] = (".csv",),
    is_ours: Callable[[bytes], object] = re.compile(b"method,").match,  # the first column of a CSV of ours
) -> None:
    """Refuses outputs that can't be written, would destroy something or overwrite each other.

    An existing file is overwritten only if it is empty or `is_ours` knows its kind, and it is none of the
    inputs; what is not a regular file, such as /dev/null, is written through. Raises UserError.
    """
    given = [path for path in outputs if path and not is_special(path)]
    read = [path for path in inputs if path and path.exists()]
    for path in given:
        if path.is_dir():
            raise UserError(f"{path}: is a directory")
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{path}: is written as {' or '.join(suffixes)}; ask for that")
        utils.check_directory(path.absolute().parent)
        if path.exists() and any(path.samefile(other) for other in read):
            raise UserError(f"{path}: would overwrite what this run reads")
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from None
        if content and not is_ours(content):
            hint = "move it, or choose another name"
            raise UserError(f"{path}: exists and was not made by this script; {hint}")
    if len({path.resolve() for path in given}) < len(given):
        raise UserError(f"one output would overwrite the other: {' '.join(map(str, given))}")


def is_special(path: Path) -> bool:
    """Tells a device or a pipe, such as /dev/null, which is written through and has no files beside it."""
    return path.exists() and not path.is_file() and not path.is_dir()
