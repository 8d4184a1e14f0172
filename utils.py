"""What every script shares: edit prompts, method names, image files <-> tensors, seeds, device and dtype.

Nothing heavy is imported here at module level, so that `--help` answers at once.

Values: an image tensor is float32 (B, 3, H, W) RGB in [-1, 1]; an image file is 8-bit. `to_tensor` and
`to_uint8` are the only places where one becomes the other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

# The 25 instructions of Wang et al. 2025: 0-9 facial features, 10-17 accessories, 18-24 background.
# The number is the `prompt{i}` folder of an edit, so keep a number's meaning when you edit this list.
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

METHOD_NAMES = ("noise", "encoder", "vae", "cw", "facelock")  # the keys of methods.METHODS, without torch
FP32_METHODS = ("cw",)  # whose networks run in float32: Adam sees a gradient's size, and no loss is scaled
EDITOR_NAMES = ("instruct-pix2pix", "stable-diffusion")
IMAGE_SUFFIXES = frozenset(
    [
        ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm",
        ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    ]
)  # fmt: skip

LEVEL = 2 / 255  # one step of an 8-bit pixel, in the [-1, 1] range of the tensors
MULTIPLE = 8  # a Stable Diffusion VAE halves the sides three times
MIN_WORKING_SIDE = 32  # px; below this nothing that an editor or a recogniser could use is left


class UserError(Exception):
    """Something the person at the keyboard can put right; shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------------
# command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps a script's docstring as it is written and shows every flag's default.

    A default of None is not shown: the flag's own help says what holds then.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive, finite number")
    return value


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def number_list(text: str) -> list[int]:
    """argparse type: whole numbers divided by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,3,7") from None


def at_least_one(text: str) -> float:
    """argparse type: a finite number of at least 1."""
    value = positive_float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seed_number(text: str) -> int:
    """argparse type: a whole number of at least 0, or -1 for "draw one"."""
    value = int(text)
    if not -1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is neither -1 nor from 0 to 2**63 - 1")
    return value


def known_seed(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    value = seed_number(text)
    if value == -1:
        raise argparse.ArgumentTypeError("-1 would draw a seed; one is asked for that is known")
    return value


def budget_size(text: str) -> float:
    """argparse type: an L-infinity budget in the [-1, 1] range that can change at least one 8-bit level."""
    value = positive_float(text)
    if allowed_levels(value) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is below 2/255, one level of an 8-bit pixel: no pixel could change; at least 0.00785"
        )
    return value


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a script's work and turns the errors a person can cause into one line and exit status 1.

    With --debug everything is raised as it is.
    """
    try:
        return run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        name = type(error).__name__
        place = f"{Path(where.filename).name}:{where.lineno}"
        print(f"error: {name} at {place}: {first_line(error)} (--debug shows all)", file=sys.stderr)
    return 1


def first_line(error: BaseException) -> str:
    """An exception's text up to its first line break, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(text: str) -> str:
    """Text for the screen: line breaks and other control characters of file names are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------------------------------------------
# prompts


def choose_prompts(numbers: Sequence[int] | None, file: Path | None) -> dict[int, str]:
    """The instructions to use: the paper's, or a text file's (one a line, blank lines left out), by number.

    numbers: only these. Raises UserError: no such file or number, or nothing in the file.
    """
    prompts = edit_prompts
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not a readable text file ({first_line(error)})") from None
        prompts = dict(enumerate(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise UserError(f"{file}: no instructions in it")
    if numbers is None:
        return dict(prompts)
    unknown = [str(number) for number in numbers if number not in prompts]
    if unknown:
        raise UserError(f"--prompts {','.join(unknown)}: only {min(prompts)} to {max(prompts)} are there")
    return {number: prompts[number] for number in sorted(set(numbers))}


# ---------------------------------------------------------------------------------------------------------
# seeds


def draw_seed(seed: int) -> int:
    """The seed itself, or, for -1, one drawn at random and printed, so that the run can be repeated."""
    if seed >= 0:
        return seed
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed: {seed}")
    return seed


def start_seed(seed: int, stem: str) -> int:
    """The seed of one image's random start: a hash of (seed, file stem) and of nothing else.

    So a portrait gets the same start whatever the batch size, the order or the number of processes.
    """
    digest = hashlib.sha256(f"{seed}:{stem}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


# ---------------------------------------------------------------------------------------------------------
# device and dtype: the one place that names them

DEVICE_HELP = "auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."
DTYPE_NAMES = ("auto", "fp32", "fp16", "bf16")
DTYPE_HELP = "of the networks; auto is fp16 on CUDA, fp32 elsewhere. The optimised image is always fp32"


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device name -> a device that is really there. Raises UserError if it is not."""
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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, fp32, fp16 or bf16 -> the dtype of the networks on this device."""
    import torch

    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def memory_format(device: torch.device) -> torch.memory_format:
    """How networks keep their weights: channels last, which the convolutions of CUDA and CPUs like best."""
    import torch

    return torch.channels_last if device.type in ("cuda", "cpu") else torch.preserve_format


def on_cuda(device: torch.device) -> bool:
    """Whether a device has a memory and a queue of its own that torch.cuda tells about."""
    return device.type == "cuda"


# ---------------------------------------------------------------------------------------------------------
# image files


@dataclass(frozen=True)
class Portrait:
    """An image file as the project sees it: 8-bit sRGB pixels, upright, with its alpha channel beside it."""

    path: Path
    pixels: np.ndarray  # (H, W, 3) uint8
    alpha: np.ndarray | None  # (H, W) uint8

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.pixels.shape[0], self.pixels.shape[1]


def load_image(path: str | os.PathLike) -> Portrait:
    """Reads any image file that Pillow can read; the first frame of an animated one.

    Greyscale, palette, CMYK and 16-bit pixels become 8-bit RGB (16-bit ones are scaled, not clipped), an
    EXIF rotation is applied, an ICC profile is converted to sRGB, alpha is kept beside. Raises UserError
    naming the file if that can't be done.
    """
    import numpy as np
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it reads all the same
            with Image.open(path) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
            profile = image.info.get("icc_profile")
            image = _eight_bit(image)
            alpha = None
            if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                alpha = np.array(image.getchannel("A"))
                image = image.convert("RGB")
            image = _to_srgb(image, profile)
            pixels = np.array(image)
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except Exception as error:
        # a decoder fed with a broken file raises anything: SyntaxError, struct.error...
        raise UserError(f"{path}: not a readable image ({first_line(error)})") from None
    return Portrait(path, pixels, alpha)


def load_portrait(path: str | os.PathLike, resolution: int) -> Portrait:
    """`load_image` of an image that is large enough to be worked on. Raises UserError naming the file."""
    portrait = load_image(path)
    try:
        working_size(portrait.size, resolution)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return portrait


def images_by_stem(directory: Path) -> dict[str, Path]:
    """The image files of a directory by stem, sorted by name; hidden files and other things are left.

    Links to files count, also broken ones: whoever reads them says so. Raises UserError: no such directory,
    or two files with the same stem, whose results would be one file.
    """
    if not directory.exists():
        raise UserError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory")
    files: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        if is_image and (path.is_file() or (path.is_symlink() and not path.exists())):
            files.setdefault(path.stem, []).append(path)
    twins = ["=".join(path.name for path in paths) for paths in files.values() if len(paths) > 1]
    if twins:
        raise UserError(f"{directory}: files with the same stem: {', '.join(twins)}")
    return {stem: path for stem, (path,) in files.items()}


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """(H, W) that `load_image` will give, from the file's header alone; None if that can't be read."""
    from PIL import ExifTags, Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                # Pillow gives a TIFF's size upright already.
                lies_on_its_side = image.format != "TIFF" and orientation in (5, 6, 7, 8)
    except Exception:  # as in load_image, which will say what is wrong
        return None
    return (width, height) if lies_on_its_side else (height, width)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float pixels (modes I;16, I, F) -> L; Pillow's own conversion would clip them."""
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (0 <= low and high <= 1):
            raise ValueError(f"float pixels from {low:g} to {high:g}, only 0 to 1 has a known meaning")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if not (0 <= low and high <= 65535):
            raise ValueError(f"integer pixels from {low} to {high}, only 16 bits (0 to 65535) are understood")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    return image


def _is_neutral(source: Any, target: Any) -> bool:
    """Whether the way from one RGB profile to another moves no colour by more than 2 levels: a linear sRGB
    profile is called sRGB, too.
    """
    import numpy as np
    from PIL import Image, ImageCms

    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 9, 3)  # (81, 9, 3)
    there = ImageCms.profileToProfile(Image.fromarray(cube), source, target)
    return bool(np.abs(np.asarray(there).astype(int) - cube).max() <= 2)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    from PIL import ImageCms

    if profile:
        if image.mode == "P":  # the profile is for the palette's colours
            image = image.convert("RGB")
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            # An sRGB profile changes nothing but the last bit, so that pixels are left alone.
            named = "srgb" in ImageCms.getProfileDescription(source).lower()
            if not (named and _is_neutral(source, target)):
                return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for other channels: the pixels are taken as they are
    return image.convert("RGB")


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) or (B, H, W, 3) uint8 -> float32 (B, 3, H, W) in [-1, 1]: v / 127.5 - 1."""
    import numpy as np
    import torch

    batch = torch.from_numpy(np.array(pixels, ndmin=4)).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return (batch.float() / 127.5 - 1).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded to nearest; values outside are clipped."""
    import numpy as np

    levels = (images.detach().cpu().double() + 1) * 127.5
    return levels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def allowed_levels(budget: float) -> int:
    """The whole 8-bit levels that a pixel may move within an L-infinity `budget` given in [-1, 1]."""
    return int(budget / LEVEL + 1e-9)


def to_uint8_within(images: torch.Tensor, source: np.ndarray, budget: float) -> np.ndarray:
    """As `to_uint8`, but where rounding to nearest would leave the budget, rounded towards the source.

    images: (B, 3, H, W) in [-1, 1]; source: (B, H, W, 3) uint8. Returns uint8 with
    max |out - source| * 2/255 <= budget.
    """
    import numpy as np

    levels = allowed_levels(budget)
    low = np.maximum(source.astype(np.int16) - levels, 0)
    high = np.minimum(source.astype(np.int16) + levels, 255)
    return np.clip(to_uint8(images).astype(np.int16), low, high).astype(np.uint8)


def linf(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| of two uint8 images, in the [-1, 1] range."""
    import numpy as np

    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) * LEVEL


def save_png(path: str | os.PathLike, pixels: np.ndarray, alpha: np.ndarray | None = None) -> None:
    """Writes (H, W, 3) uint8 as PNG under a temporary name, then renames: the file is whole or not there.

    Nothing but pixels and alpha is written: a privacy tool does not copy GPS tags. Raises UserError.
    """
    import numpy as np
    from PIL import Image

    path = Path(path)
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_file(path, buffer.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """Atomic write: aside, fsync of the file, rename, fsync of the directory. Raises UserError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    finally:  # also after Ctrl-C; mostly there is nothing left to remove, and its directory may be a file
        with contextlib.suppress(OSError):
            aside.unlink()


def _sync_directory(directory: Path) -> None:
    """Makes a rename survive a power cut, where the file system can: some network mounts refuse."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_output(path: Path, source: Path) -> None:
    """Refuses an output file that is no PNG or would overwrite its input. Raises UserError.

    Called before any work, so that nobody waits for a result that can't be kept.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise UserError(f"{path}: JPEG compression would destroy the perturbation; ask for a .png")
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as PNG; ask for a .png")
    if path.is_dir():
        raise UserError(f"{path}: is a directory")
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"{path}: would overwrite the input")
    check_directory(path.absolute().parent)


def check_directory(path: Path) -> None:
    """Refuses a directory that is not there and can't be made, or can't be written into. Raises UserError."""
    path = path.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{existing}: is not a directory")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing}: no permission to write into it")


# ---------------------------------------------------------------------------------------------------------
# working size: the form in which the editor, and so every defense, sees an image


def working_size(size: Sequence[int], resolution: int) -> tuple[int, int]:
    """(H, W) -> the size that an editor works at, before padding: the long side is at most `resolution`.

    Raises UserError if a side of it would be under 32 px.
    """
    scale = min(1.0, resolution / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    if min(height, width) < MIN_WORKING_SIDE:
        raise UserError(
            f"a {size[1]}x{size[0]} image is worked on at {width}x{height}; "
            f"a side under {MIN_WORKING_SIDE} px is too small"
        )
    return height, width


def to_working(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, h, w): antialiased resize to `working_size`, reflect-padded to multiples of 8.

    Differentiable. The edit scripts use it before the editor and the defenses inside their loop, so what is
    optimised is what the editor will see.
    """
    import torch.nn.functional as F

    size = working_size(images.shape[-2:], resolution)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    bottom, right = (-side % MULTIPLE for side in size)
    if bottom or right:
        images = F.pad(images, (0, right, 0, bottom), mode="reflect")
    return images.clamp(-1, 1)  # the resize overshoots by a last bit, and diffusers guesses the range from it


def from_working(images: torch.Tensor, size: Sequence[int], resolution: int) -> torch.Tensor:
    """Undoes `to_working`: cuts the padding off and resizes back to `size` = (H, W)."""
    import torch.nn.functional as F

    height, width = working_size(size, resolution)
    images = images[..., :height, :width]
    if (height, width) != tuple(size):
        images = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(-1, 1)
