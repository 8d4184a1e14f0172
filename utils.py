"""Holds what scripts share: prompts, argparse types, errors, seeds, device and dtype, whole-file writes.

Nothing heavy is imported here at module level, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NO_WORDS = "(no words: the round trip through an autoencoder)"  # stands in for an instruction

# The 25 instructions of Wang et al. 2025: 0-9 facial features, 10-17 accessories, 18-24 background.
# A number names an edit's folder `prompt{i}`, so keep the numbers' meanings when you edit this list.
edit_prompts: dict[int, str] = {
    0: "Turn the person's hair pink",
    1: "Let the person turn bald",
    2: "Let the person have a tattoo",
    3: "Let the person wear purple makeup",
    4: "Let the person grow a mustache",
    5: "Turn the person into a zombie",
    6: "Change the skin color to Avatar blue",
    7: "Add elf-like ears",
    8: "Add large vampire fangs",
    9: "Apply Goth style makeup",
    10: "Let the person wear a police suit",
    11: "Let the person wear a bowtie",
    12: "Let the person wear a helmet",
    13: "Let the person wear sunglasses",
    14: "Let the person wear earrings",
    15: "Let the person smoke a cigar",
    16: "Place a headband in the hair",
    17: "Place a tiara on the top of the head",
    18: "Let it be snowy",
    19: "Change the background to a beach",
    20: "Add a city skyline background",
    21: "Add a forest background",
    22: "Change the background to a desert",
    23: "Set the background in a library",
    24: "Let the person stand under the moon",
}

LEVEL = 2 / 255  # one step of an 8-bit pixel, in the [-1, 1] range of the tensors
MOST_TEXT = 10_000_000  # bytes of a text that is read whole
USUAL_BUDGET = 0.3  # a larger one was probably meant in 8-bit levels


class UserError(Exception):
    """Reports an error that the user can fix; shown as one line, without a traceback.

    An error with several parts lists them in `lines`.
    """

    lines: Sequence[str] = ()


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps a script's docstring as written, and shows all defaults but None, False and []."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_nothing = action.default in (None, []) or action.default is False
        return action.help if is_nothing else super()._get_help_string(action)


def defaults_help(text: str, own: Mapping[str, Any], everyone: Collection[str] = ()) -> str:
    """Writes the help of a flag for which several methods, editors or model sets have their own defaults.

    own: the default of each that reads the flag, the usual one first; everyone: all that might read it.
    """
    names: dict[str, list[str]] = {}
    for name, value in own.items():
        names.setdefault(str(value), []).append(name)
    usual, *others = names
    about = "; ".join([f"default: {usual}", *(f"{', '.join(names[value])}: {value}" for value in others)])
    reads, ignores = ([name for name in everyone if (name in own) == does] for does in (True, False))
    if ignores:
        who = f"{', '.join(reads)} only" if len(reads) < len(ignores) else f"not {', '.join(ignores)}"
        about = f"{who}; {about}"
    return f"{text} ({about})"


class _Positional(argparse.Action):
    """Sets the flag's value only if a word was given, so that it does not reset --input_path."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def add_input_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --input_path, which may also be given as a positional argument."""
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--input_path", type=path, metavar="FILE", help=text)
    word = {"dest": "input_path", "nargs": "?", "metavar": "FILE", "action": _Positional}
    one.add_argument(**word, type=path, help="the same, without --input_path=")


def number(kind: type, low: float, high: float, what: str) -> Callable[[str], Any]:
    """Makes an argparse type: an int or float from `low` to `high`; `what` describes it."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # NaN is not
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max
MOST_COUNT = 10**9
natural_number = number(int, 0, MOST_COUNT, "a whole number of at least 0, up to 10^9")
positive_int = number(int, 1, MOST_COUNT, "a whole number of at least 1, up to 10^9")
positive_float = number(float, SMALLEST, LARGEST, "a number above 0")
non_negative_float = number(float, 0, LARGEST, "a number of at least 0")
at_least_one = number(float, 1, LARGEST, "a number of at least 1")
share = number(float, SMALLEST, 1, "a number above 0 and up to 1")
seed_number = number(int, -1, 2**63 - 1, "a whole number from 0 to 2**63 - 1, or -1, which draws one")
known_seed = number(int, 0, 2**63 - 1, "a whole number from 0 to 2**63 - 1 (-1 would draw one)")


def number_list(text: str) -> list[int]:
    """argparse type: whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,3,7") from None


def path(text: str) -> Path:
    """argparse type: a path; refuses an empty one, which a shell makes of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def prompt(text: str) -> str:
    """argparse type: an instruction; refuses bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def budget_size(text: str) -> float:
    """argparse type: an L-infinity budget in the [-1, 1] range that can change at least one 8-bit level."""
    value = positive_float(text)
    if value > 2:
        raise argparse.ArgumentTypeError(f"{text} is above 2, the whole range. {in_levels(value)}")
    if allowed_levels(value) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is below 2/255, one level of an 8-bit pixel: no pixel could change; give 0.00785 or more"
        )
    return value


def given(kind: Callable[[str], Any], name: str, value: Any) -> Any:
    """Reads a value from Python code or the page as argparse reads a flag's. Raises UserError."""
    try:
        return kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {'nothing is given' if value is None else error}") from None


def in_levels(budget: float) -> str:
    """Writes a budget in 8-bit levels, and the value to give for that many levels."""
    return f"{budget:g} in [-1, 1] is {budget / LEVEL:.4g}/255; for {budget:g}/255 give {budget * LEVEL:.3g}"


def allowed_levels(budget: float) -> int:
    """Counts the whole 8-bit levels that a pixel may move within an L-infinity `budget` in [-1, 1]."""
    return int(budget / LEVEL + 1e-9)


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a script's work -> exit status. An error becomes one line and status 1; --debug raises it.

    An OSError that names its file is treated as a UserError, so code that only reads needn't convert it.
    """
    with contextlib.suppress(AttributeError, ValueError, OSError):  # in a notebook, or closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have bytes that are not UTF-8
    try:
        return run(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            return 130
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:  # no rights, a loop of links...
            text = f"{os.fsdecode(error.filename)}: can't be used ({error.strerror})"
        elif isinstance(error, MemoryError):
            text = "not enough memory"
        elif not isinstance(error, UserError) and not text.startswith("Symlink loop"):  # Path.resolve's
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            text = f"{place}: {first_line(error)} (--debug shows all)"
        first, *more = getattr(error, "lines", ()) or [text]
        print("\n  ".join(map(one_line, [f"error: {first}", *more])), file=sys.stderr)
        return 1


def warn(text: str) -> None:
    """Prints a warning to stderr on a line of its own, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Takes an exception's text up to its first line break, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(text: str) -> str:
    """Writes line breaks and other control characters, which file names may contain, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


FORMULA = re.compile(r"'*[=+\-@\t\r]")  # also after quotes, so that an added one can be removed again


def csv_name(name: str) -> str:
    """Adds a quote before a name that a spreadsheet would take for a formula; `name_of_csv` undoes it."""
    return f"'{name}" if FORMULA.match(name) else name


def name_of_csv(text: str) -> str:
    """Undoes `csv_name`."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def choose_prompts(numbers: Sequence[int] | None, file: Path | None) -> dict[int, str]:
    """Returns the instructions by number: the paper's, or the lines of a text file, numbered from 0.

    numbers: which to use; None: all. Blank lines are skipped but counted. Raises UserError for unknown ones.
    """
    prompts = edit_prompts
    if file is not None:
        try:
            lines = read_plain(file, MOST_TEXT).decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable text file ({first_line(error)})") from None
        prompts = {place: line.strip() for place, line in enumerate(lines) if line.strip()}
        if not prompts:
            raise UserError(f"{file}: no instructions in it")
    if unknown := [str(number) for number in numbers or () if number not in prompts]:
        is_gapless = len(prompts) > max(prompts)
        known = f"0 to {max(prompts)}" if is_gapless else ", ".join(map(str, prompts))
        raise UserError(f"--prompts {','.join(unknown)}: choose from {known}")
    return {number: prompts[number] for number in (prompts if numbers is None else sorted(set(numbers)))}


def add_prompt_arguments(parser: argparse.ArgumentParser, are_there: bool = False) -> None:
    """Adds --prompts and --prompt_file, which `choose_prompts` reads. are_there: for edits that were made."""
    own = "all that were edited", "those in the run.json of the edits, else the paper's"
    all_, texts = own if are_there else ("all", "the paper's")
    text = f"numbers of the instructions (default: {all_})"
    parser.add_argument("--prompts", type=number_list, metavar="I,J,...", help=text)
    text = f"your own instructions, a text file with one per line, numbered from 0 (default: {texts})"
    parser.add_argument("--prompt_file", type=path, help=text)


def read_plain(path: Path, most: float) -> bytes:
    """Reads a regular file of at most `most` bytes. Raises OSError, or ValueError for a larger one.

    A device or a pipe, which might never end, is a ValueError, too.
    """
    if is_special(path):
        raise ValueError("a device or a pipe")
    if path.stat().st_size > most:
        raise ValueError(f"over {most / 1e6:.0f} MB")
    return path.read_bytes()


def parse_json(data: bytes | str) -> Any:
    """Reads JSON. Raises ValueError with a message for users."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise ValueError("a number with too many digits") from None


def draw_seed(seed: int) -> int:
    """Returns the seed; for -1, draws one at random and prints it, so that the run can be repeated."""
    if seed >= 0:
        return seed
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed: {seed}")
    return seed


def start_seed(seed: int, stem: str) -> int:
    """Returns the seed of one image's random start, which depends only on the run's seed and the stem."""
    digest = hashlib.sha256(f"{seed}:{stem}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


# Device and dtype, from here to `on_cuda`: no other file names one
DEVICE_HELP = "auto (a GPU if there is one), cpu, cuda, cuda:1, mps..."
DTYPE_NAMES = ("auto", "fp32", "fp16", "bf16")
DTYPE_HELP = "dtype of the networks (auto: 16 bits on CUDA, else fp32); the optimised image is always fp32"


def pick_device(name: str) -> torch.device:
    """Turns `auto` or a torch device name into a device that is available. Raises UserError."""
    import torch

    local = os.environ.get("LOCAL_RANK")  # a launcher numbers the processes of a machine
    if local is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(local))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each backend has its own error for "not there"
        raise UserError(f"--device {name} can't be used: {first_line(error)}") from None
    return device


def pick_dtype(name: str, device: torch.device, half: str = "fp16") -> torch.dtype:
    """Turns `auto`, fp32, fp16 or bf16 into the networks' dtype on this device; half: auto's on CUDA."""
    import torch

    if name == "auto":
        name = half if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns the memory format of weights: channels last where convolutions are faster with it."""
    import torch

    return torch.channels_last if device.type in ("cuda", "cpu") else torch.preserve_format


def on_cuda(device: torch.device) -> bool:
    """Returns whether torch.cuda measures the device's memory and waits for its queue."""
    return device.type == "cuda"


def temporary_name(path: Path) -> Path:
    """Returns the name under which `write_file` writes; it is never too long for a file name."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f".facelock-{digest}-{os.getpid()}.tmp")


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; replaces a link, writes through a device. Raises UserError."""
    aside = temporary_name(path)
    try:
        if path.exists() and not path.is_file():
            with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:  # don't wait for a pipe
                os.set_blocking(file.fileno(), True)
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        with contextlib.suppress(OSError):  # some network mounts can't
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    finally:  # also after Ctrl-C; mostly there is nothing left to remove, and its directory may be a file
        with contextlib.suppress(OSError):
            aside.unlink()


# Lists the files that this project wrote into a directory, so that it never replaces anybody else's
INDEX = ".facelock.jsonl"
NOT_OURS = "exists and was not made by this script; move it, or choose another name"


def write_own(path: Path, data: bytes) -> None:
    """Writes a file as `write_file` does and notes it in the directory's index. Raises UserError."""
    if is_special(path):
        return write_file(path, data)
    index, line = path.parent / INDEX, _index_line(path, data)
    if index.is_symlink() or is_special(index):
        raise UserError(f"{index}: is not a plain file")
    check_directory(path.absolute().parent)
    try:  # before the file itself: a killed run leaves no file that the next one refuses
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(index, "a+") as file:
            file.seek(0)
            if line not in file.read().splitlines():
                file.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"{index}: can't be written ({error.strerror})") from None
    write_file(path, data)


def check_own(path: Path) -> None:
    """Raises UserError for a file whose content is not what `write_own` wrote; empty ones are fine."""
    index = path.parent / INDEX
    content = path.read_bytes() if path.exists() else b""
    lines = index.read_text(errors="replace").splitlines() if content and index.is_file() else []
    if content and _index_line(path, content) not in lines:
        raise UserError(f"{path}: {NOT_OURS}")


def _index_line(path: Path, data: bytes) -> str:
    return json.dumps({"output": path.name, "sha256": hashlib.sha256(data).hexdigest()})


def is_special(path: Path) -> bool:
    """Returns whether this is a device or a pipe, such as /dev/null: written through, no files beside it."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_directory(path: Path) -> None:
    """Raises UserError for a directory that can't be written into, or is missing and can't be made."""
    path = path.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing}: is not a directory")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing}: no permission to write into it")
