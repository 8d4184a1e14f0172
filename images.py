"""Image files <-> tensors, 8 bits within the budget, and the size at which an editor works.

Values: an image tensor is float32 (B, 3, H, W) RGB in [-1, 1]; an image file is 8-bit. `to_tensor` and
`to_uint8` are the only places where one becomes the other.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import LEVEL, UserError, allowed_levels, check_directory, first_line, one_line, write_file

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

FORMATS = {  # suffix -> Pillow's name; nothing else is opened, so that a .png can't start Ghostscript
    ".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".jfif": "JPEG", ".jp2": "JPEG2000", ".jpeg": "JPEG",
    ".jpg": "JPEG", ".pbm": "PPM", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM", ".tga": "TGA",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
HEIF = (".heic", ".heif")  # with pillow-heif, if it is installed
MIN_WORKING_SIDE = 32  # px; below this nothing that an editor or a recogniser could use is left


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


# ---------------------------------------------------------------------------------------------------------
# reading


def load_image(path: str | os.PathLike) -> Portrait:
    """Reads an image file of a kind in FORMATS, whatever its suffix; the first frame of an animated one.

    Greyscale, palette, CMYK and 16-bit grey pixels become 8-bit RGB (16-bit ones are scaled, not clipped), an
    EXIF rotation is applied, an ICC profile is converted to sRGB, alpha is kept beside. Raises UserError
    naming the file if that can't be done; 16-bit colour is refused, since Pillow would cut it.
    """
    import numpy as np
    from PIL import ImageOps

    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("not a file" if path.exists() else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it reads all the same
            with _open(path) as opened:
                _check_depth(opened)
                opened.load()
                image = ImageOps.exif_transpose(opened)
            profile = image.info.get("icc_profile")
            image = _eight_bit(image)
            alpha = None
            if image.has_transparency_data:
                image = image.convert("RGBA")
                alpha = np.array(image.getchannel("A"))
                image = image.convert("RGB")
            pixels = np.array(_to_srgb(image, profile))
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        # a decoder fed with a broken file raises anything: SyntaxError, struct.error...
        raise UserError(f"{path}: not a readable image ({first_line(error)})") from None
    return Portrait(path, pixels, alpha)


def load_portrait(path: str | os.PathLike, resolution: int) -> Portrait:
    """Reads an image as `load_image` does and refuses one too small to be worked on. Raises UserError."""
    portrait = load_image(path)
    try:
        working_size(portrait.size, resolution)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return portrait


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Reads (H, W) that `load_image` will give from the file's header alone; None if that can't be read."""
    from PIL import ExifTags

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(Path(path)) as image:
                width, height = image.size
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                # Pillow gives a TIFF's size upright already.
                lies_on_its_side = image.format != "TIFF" and orientation in (5, 6, 7, 8)
    except Exception:  # as in load_image, which will say what is wrong
        return None
    return (width, height) if lies_on_its_side else (height, width)


def images_by_stem(directory: Path) -> dict[str, Path]:
    """Lists the image files of a directory by stem, sorted by name; hidden files and other things are left.

    Links to files count, also broken ones: whoever reads them says so. Raises UserError: no such directory,
    or two files with the same stem, whose results would be one file.
    """
    suffixes = readable_suffixes()
    files: dict[str, list[Path]] = {}
    try:
        if not directory.is_dir():
            raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory")
        for path in sorted(directory.iterdir()):
            is_image = path.suffix.lower() in suffixes and not path.name.startswith(".")
            if is_image and (path.is_file() or (path.is_symlink() and not path.exists())):
                files.setdefault(path.stem, []).append(path)
    except OSError as error:
        raise UserError(f"{directory}: can't be listed ({error.strerror})") from None
    if twins := ["=".join(path.name for path in paths) for paths in files.values() if len(paths) > 1]:
        raise UserError(f"{directory}: files with the same stem: {', '.join(twins)}")
    return {stem: path for stem, (path,) in files.items()}


def readable_suffixes() -> tuple[str, ...]:
    """Lists the suffixes of the files that are read here."""
    return (*FORMATS, *(HEIF if util.find_spec("pillow_heif") else ()))


def _open(path: Path) -> Image.Image:
    """Image.open for the formats that are read, and no other."""
    from PIL import Image

    formats = sorted(set(FORMATS.values()))
    if util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    elif path.suffix.lower() in HEIF:
        raise UserError("HEIC is read once pillow-heif is installed (pip install pillow-heif)")
    return Image.open(path, formats=formats)


def _check_depth(image: Image.Image) -> None:
    """Refuses what Pillow would cut to 8 bits or misread: more than that in anything but plain greyscale."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF: BitsPerSample and PhotometricInterpretation
    depth, is_inverted = max(tags.get(258, (0,))), tags.get(262) == 0
    if depth <= 8 and not any(re.search(";16[BLN]", str(part.args)) for part in getattr(image, "tile", ())):
        return
    if image.mode[0] not in "IF" or "transparency" in image.info or depth == 12 or is_inverted:
        raise UserError("16 bits a channel are read in plain greyscale only; save it with 8 bits")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float pixels (modes I;16, I, F) -> L; Pillow's own conversion would clip them."""
    import numpy as np
    from PIL import Image

    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image).astype(np.float64)
    top = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (0 <= low and high <= top):
        raise ValueError(f"pixels from {low:g} to {high:g}, only 0 to {top} has a known meaning")
    return Image.fromarray(np.round(values / top * 255).astype(np.uint8))


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


def _is_neutral(source: Any, target: Any) -> bool:
    """Whether no colour moves by over 2 levels between two profiles; a linear sRGB is called sRGB, too."""
    import numpy as np
    from PIL import Image, ImageCms

    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 9, 3)  # (81, 9, 3)
    there = ImageCms.profileToProfile(Image.fromarray(cube), source, target)
    return bool(np.abs(np.asarray(there).astype(int) - cube).max() <= 2)


# ---------------------------------------------------------------------------------------------------------
# pixels <-> tensors, and writing


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Converts (H, W, 3) or (B, H, W, 3) uint8 to float32 (B, 3, H, W) in [-1, 1]: v / 127.5 - 1."""
    import numpy as np
    import torch

    batch = torch.from_numpy(np.array(pixels, ndmin=4)).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return (batch.float() / 127.5 - 1).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Converts (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded to nearest, values outside clipped."""
    import numpy as np

    levels = (images.detach().cpu().double() + 1) * 127.5
    return levels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def to_uint8_within(
    images: torch.Tensor, source: np.ndarray, budget: float, mask: torch.Tensor | None = None
) -> np.ndarray:
    """Converts as `to_uint8`, but rounds towards the source where rounding to nearest leaves the budget.

    images: (B, 3, H, W) in [-1, 1]; source: (B, H, W, 3) uint8; mask: (B, 1, H, W), a pixel's share of the
    budget. Returns uint8 with |out - source| * 2/255 <= budget, times mask.
    """
    import numpy as np

    middle, levels = source.astype(np.int16), min(allowed_levels(budget), 255)
    if mask is not None:
        shares = mask.cpu().double().numpy().transpose(0, 2, 3, 1)  # (B, H, W, 1)
        levels = np.minimum(budget * shares / LEVEL + 1e-9, levels).astype(np.int16)
    return np.clip(to_uint8(images), middle - levels, middle + levels).astype(np.uint8)


def linf(a: np.ndarray, b: np.ndarray) -> float:
    """Measures max |a - b| of two uint8 images, in the [-1, 1] range."""
    import numpy as np

    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) * LEVEL


def save_png(path: str | os.PathLike, pixels: np.ndarray, alpha: np.ndarray | None = None) -> None:
    """Writes (H, W, 3) uint8 as PNG, whole or not at all, and no metadata (GPS tags). Raises UserError."""
    import numpy as np
    from PIL import Image

    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_file(Path(path), buffer.getvalue())


def choose_output(given: Path | None, source: Path, prefix: str, why_png: str) -> Path:
    """Gives the PNG to write: `given`, else PREFIX_NAME.png beside the source, or the next free number.

    Called before any work, so that nobody waits for a result that can't be kept. Raises UserError for a file
    that is no PNG (why_png: the reason) or would overwrite the input.
    """
    try:
        path = given or _free_name(source, prefix)
        if path.suffix.lower() != ".png":
            raise UserError(f"{path}: {why_png}; ask for a .png")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}")
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path}: would overwrite the input")
    except (OSError, ValueError) as error:  # a name that is too long, or none as that of "."
        raise UserError(f"{given or source}: no output can have such a name ({first_line(error)})") from None
    check_directory(path.absolute().parent)
    return path


def _free_name(source: Path, prefix: str) -> Path:
    """PREFIX_NAME.png beside the source, or the next free number, which is said."""
    path, place = source.with_name(f"{prefix}_{source.stem}.png"), 1
    while path.exists() or path.is_symlink():
        place += 1
        path = source.with_name(f"{prefix}_{source.stem}_{place}.png")
    if place > 1:
        print(one_line(f"{path.name}: the next free name, earlier ones are kept"))
    return path


# ---------------------------------------------------------------------------------------------------------
# working size: the form in which the editor, and so every defense, sees an image


def working_size(size: Sequence[int], resolution: int) -> tuple[int, int]:
    """Gives the size that an editor works at, before padding, for (H, W): the long side is <= `resolution`.

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


def to_working(images: torch.Tensor, resolution: int, multiple: int = 8) -> torch.Tensor:
    """Brings (B, 3, H, W) to (B, 3, h, w): antialiased resize to `working_size`, reflect-padded to multiples.

    Differentiable. The edit scripts use it before the editor and the defenses inside their loop, so what is
    optimised is what the editor will see.
    """
    import torch.nn.functional as F

    size = working_size(images.shape[-2:], resolution)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    bottom, right = (-side % multiple for side in size)
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
