"""Converts image files to tensors and back, within a budget in 8 bits, and to an editor's working size.

Values: an image tensor is float32 (B, 3, H, W) RGB in [-1, 1]; an image file is 8-bit. `to_tensor` and
`to_uint8` are the only places where one becomes the other.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from decoding import check_depth, eight_bit, open_image, readable_suffixes, to_srgb
from utils import LEVEL, UserError, allowed_levels, check_directory, first_line, one_line, write_file

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 24_500_000  # 6000x4000; its memory: docs/scale.md
STRIP = 256  # px, the height that is converted at once
MIN_WORKING_SIDE = 32  # px; a smaller image is of no use to an editor or a recogniser


@dataclass(frozen=True)
class Portrait:
    """Holds an image file as the project sees it: 8-bit sRGB pixels, upright, and its alpha channel."""

    path: Path
    pixels: np.ndarray  # (H, W, 3) uint8
    alpha: np.ndarray | None  # (H, W) uint8

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.pixels.shape[0], self.pixels.shape[1]


def load_image(
    path: str | os.PathLike, resolution: int | None = None, most_pixels: int = MOST_PIXELS
) -> Portrait:
    """Reads an image file in one of FORMATS, whatever its suffix; the first frame of an animation.

    All pixels become 8-bit sRGB, upright; 16-bit grey is scaled, alpha is kept separately. Raises UserError
    naming the file if that can't be done, as for 16-bit colour, or if it is too large, or too small to be
    worked on at a `resolution`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("not a file" if path.exists() else "no such file")
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of what it reads all the same
            with open_image(path) as opened:
                check_size(opened.size[::-1], None, most_pixels)
                check_depth(opened)
                opened.load()
                image = ImageOps.exif_transpose(opened)
            profile, alpha = image.info.get("icc_profile"), None
            image = eight_bit(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                alpha = np.array(image.getchannel("A"))
                image = image.convert("RGB")
            portrait = Portrait(path, np.array(to_srgb(image, profile)), alpha)
        check_size(portrait.size, resolution, most_pixels)
        return portrait
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read it") from None
    except Exception as error:  # a decoder fed with a broken file raises anything: SyntaxError...
        raise UserError(f"{path}: not a readable image ({first_line(error)})") from None


def as_portrait(
    image: str | os.PathLike | Image.Image | np.ndarray, resolution: int, most_pixels: int = MOST_PIXELS
) -> Portrait:
    """Takes a path as `load_image` does, or a PIL image, or (H, W, 3) uint8. Raises UserError."""
    if isinstance(image, str | os.PathLike):
        return load_image(image, resolution, most_pixels)
    if isinstance(image, Image.Image):  # as diffusers' load_image does
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"an image is (H, W, 3) uint8, not {image.dtype} {image.shape}")
    check_size(image.shape[:2], resolution, most_pixels)
    return Portrait(Path("image"), image, None)


def check_size(size: Sequence[int], resolution: int | None, most_pixels: int) -> None:
    """Refuses (H, W) that is too large for memory, or too small at a `resolution`. Raises UserError."""
    if size[0] * size[1] > most_pixels:
        most = f"the {most_pixels / 1e6:.1f} megapixels that are read"
        raise UserError(f"{size[1]}x{size[0]} is more than {most}; scale it down")
    if resolution:
        working_size(size, resolution)


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Reads from the header alone which (H, W) `load_image` will return; None if it can't be read."""
    try:
        with warnings.catch_warnings(action="ignore"), open_image(Path(path)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:  # for PNG, Pillow looks for the orientation after the pixels
                return height, width
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            # Pillow gives a TIFF's size upright already
            return (width, height) if turned and image.format != "TIFF" else (height, width)
    except Exception:  # as in load_image, which will say what is wrong
        return None


def images_by_stem(directory: Path) -> dict[str, Path]:
    """Lists the image files of a directory by stem, sorted by name, without hidden and other files.

    Broken links are listed; reading them fails. Raises UserError for a missing directory or a shared stem.
    """
    suffixes, files = readable_suffixes(), defaultdict(list)
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory")
    for path in sorted(directory.iterdir()):
        is_image = path.suffix.lower() in suffixes and not path.name.startswith(".")
        if is_image and (path.is_file() or (path.is_symlink() and not path.exists())):
            files[path.stem].append(path)
    if twins := ["=".join(path.name for path in paths) for paths in files.values() if len(paths) > 1]:
        raise UserError(f"{directory}: files with the same stem: {', '.join(twins)}")
    return {stem: path for stem, (path,) in files.items()}


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Converts (H, W, 3) or (B, H, W, 3) uint8 to float32 (B, 3, H, W) in [-1, 1]: v / 127.5 - 1."""
    import torch

    batch = torch.from_numpy(np.array(pixels, ndmin=4)).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return batch.contiguous().float().div_(127.5).sub_(1)  # in place: few copies of a large image


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Converts (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded to nearest, values outside clipped."""
    batch, channels, height, width = images.shape
    pixels = np.empty((batch, height, width, channels), np.uint8)
    for top in range(0, height, STRIP):  # float64 of all of it would be the largest thing in memory
        strip = images[:, :, top : top + STRIP].detach().cpu().double()
        levels = strip.add_(1).mul_(127.5).round_().clamp_(0, 255)
        pixels[:, top : top + STRIP] = levels.permute(0, 2, 3, 1).numpy()
    return pixels


def to_uint8_within(
    images: torch.Tensor, source: np.ndarray, budget: float, mask: torch.Tensor | None = None
) -> np.ndarray:
    """Converts like `to_uint8`, but keeps |out - source| <= budget, times mask.

    images: (B, 3, H, W); source: (B, H, W, 3) uint8; mask: (B, 1, H, W), a pixel's share of the budget.
    """
    pixels = to_uint8(images)
    for top in range(0, pixels.shape[1], STRIP):
        rows = slice(top, top + STRIP)
        middle, levels = source[:, rows].astype(np.int16), min(allowed_levels(budget), 255)
        if mask is not None:
            shares = mask[:, :, rows].cpu().double().numpy().transpose(0, 2, 3, 1)  # (B, h, W, 1)
            levels = np.minimum(budget * shares / LEVEL + 1e-9, levels).astype(np.int16)
        pixels[:, rows] = np.clip(pixels[:, rows], middle - levels, middle + levels)
    return pixels


def linf(a: np.ndarray, b: np.ndarray) -> float:
    """Measures max |a - b| of two uint8 images, in the [-1, 1] range."""
    return float((np.maximum(a, b) - np.minimum(a, b)).max()) * LEVEL


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Measures the PSNR of two uint8 images in dB, as scikit-image does, in strips."""
    total = 0
    for top in range(0, len(a), STRIP):
        apart = a[top : top + STRIP].astype(np.int64) - b[top : top + STRIP]
        total += int(np.square(apart).sum())
    return 10 * math.log10(255**2 * a.size / total) if total else math.inf


def save_png(path: str | os.PathLike, pixels: np.ndarray, alpha: np.ndarray | None = None) -> None:
    """Writes (H, W, 3) uint8 as PNG, whole or not at all, without metadata (GPS tags). Raises UserError."""
    write_file(Path(path), png_bytes(pixels, alpha))


def png_bytes(pixels: np.ndarray, alpha: np.ndarray | None = None) -> bytes:
    """Encodes (H, W, 3) uint8 and (H, W) alpha as PNG."""
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """Puts pictures (H, W, 3) uint8 of one size beside each other, with white between them."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for one in pictures for part in (white, one)][1:], axis=1)


def choose_output(given: Path | None, source: Path, prefix: str, why_png: str) -> Path:
    """Returns the PNG to write: `given`, else PREFIX_NAME.png beside the source, or the next free number.

    Call it before any work. Raises UserError for a path that is no PNG (why_png) or is the input.
    """
    try:
        names = (f"{prefix}_{source.stem}{end}.png" for end in ("", *(f"_{n}" for n in range(2, 10_000))))
        path = given or next(p for p in map(source.with_name, names) if not os.path.lexists(p))
        if not given and path.stem != f"{prefix}_{source.stem}":
            print(one_line(f"{path.name}: the next free name; earlier files are kept"))
        if path.suffix.lower() != ".png":
            raise UserError(f"{path}: {why_png}; ask for a .png")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}")
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path}: would overwrite the input")
    except (OSError, ValueError) as error:  # a name that is too long, or empty like that of "."
        raise UserError(f"{given or source}: can't be an output's name ({first_line(error)})") from None
    check_directory(path.absolute().parent)
    return path


def working_size(size: Sequence[int], resolution: int) -> tuple[int, int]:
    """Computes the size (unpadded) at which (H, W) is edited: long side <= resolution. Raises UserError."""
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

    Differentiable: defenses optimise through the same function that the edit scripts apply.
    """
    import torch.nn.functional as F

    size = working_size(images.shape[-2:], resolution)
    images = resize(images, size)
    bottom, right = (-side % multiple for side in size)
    if bottom or right:
        images = F.pad(images, (0, right, 0, bottom), mode="reflect")
    return images


def from_working(images: torch.Tensor, size: Sequence[int], resolution: int) -> torch.Tensor:
    """Undoes `to_working`: cuts the padding off and resizes back to `size` = (H, W)."""
    height, width = working_size(size, resolution)
    return resize(images[..., :height, :width], size)


def resize(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes (B, 3, H, W) in [-1, 1] to `size` = (H, W), antialiased. Differentiable."""
    import torch.nn.functional as F

    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(-1, 1)  # the resize overshoots by a last bit, from which diffusers guesses the range
