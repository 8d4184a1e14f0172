"""Turns any image file that Pillow reads into 8-bit sRGB: formats, 16 bits, colour profiles."""

from __future__ import annotations

import io
import re
from importlib import util
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from utils import UserError

FORMATS = {  # suffix -> Pillow's name; nothing else is opened, so that a .png can't start Ghostscript
    ".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".jfif": "JPEG", ".jp2": "JPEG2000", ".jpeg": "JPEG",
    ".jpg": "JPEG", ".pbm": "PPM", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM", ".tga": "TGA",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
HEIF = (".heic", ".heif")  # with pillow-heif, if it is installed


def readable_suffixes() -> tuple[str, ...]:
    """Lists the suffixes of the files that can be read."""
    return (*FORMATS, *(HEIF if util.find_spec("pillow_heif") else ()))


def open_image(path: Path) -> Image.Image:
    """Opens an image in one of FORMATS or HEIF, and in no other format. Raises UserError."""
    formats = sorted(set(FORMATS.values()))
    if util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    elif path.suffix.lower() in HEIF:
        raise UserError("HEIC is read once pillow-heif is installed (pip install pillow-heif)")
    return Image.open(path, formats=formats)


def check_depth(image: Image.Image) -> None:
    """Refuses more than 8 bits, except in plain greyscale: Pillow would cut or misread them."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF: BitsPerSample and PhotometricInterpretation
    depth, is_inverted = max(tags.get(258, (0,))), tags.get(262) == 0
    if depth <= 8 and not any(re.search(";16[BLN]", str(part.args)) for part in getattr(image, "tile", ())):
        return
    if image.mode[0] not in "IF" or "transparency" in image.info or depth == 12 or is_inverted:
        raise UserError("16 bits per channel are read in plain greyscale only; save it with 8 bits")


def eight_bit(image: Image.Image) -> Image.Image:
    """Converts 16-bit, 32-bit and float pixels (modes I;16, I, F) to L; Pillow itself would clip them."""
    if image.mode[0] not in "IF":
        return image
    values, top = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (0 <= low and high <= top):
        raise ValueError(f"pixels from {low:g} to {high:g}, but only 0 to {top} has a known meaning")
    return Image.fromarray(np.round(values / top * 255).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts any mode to RGB, by its ICC profile, unless that is sRGB: moves no colour by over 2 levels."""
    if not profile:
        return image.convert("RGB")
    if image.mode == "P":  # the profile is for the palette's colours
        image = image.convert("RGB")
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        if "srgb" in ImageCms.getProfileDescription(source).lower():  # a linear one is called so, too
            levels = np.linspace(0, 255, 9).round().astype(np.uint8)
            cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 9, 3)  # (81, 9, 3)
            there = ImageCms.profileToProfile(Image.fromarray(cube), source, target)
            if np.abs(np.asarray(there).astype(int) - cube).max() <= 2:
                return image.convert("RGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for other channels
        return image.convert("RGB")
