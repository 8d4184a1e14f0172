"""Faces of rendered portraits for training the recognisers: detected, cropped and augmented.

MTCNN detects the boxes once. Crops are jittered by as much as boxes differ between a source and its edits, so
that a network learns to ignore that difference, and randomly mirrored, lit, coloured, blurred, made noisy and
saved as JPEG.
"""

from __future__ import annotations

import functools
import io
import math
import multiprocessing
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import world
from PIL import Image

from images import to_tensor, to_uint8
from models.faces import LOOKS, LUMA, Box, FaceDetector

# Standard deviations of a crop's centre (px of 128, in x and y) and of the logarithm of its height; WIDTH is
# added to that for its width. Boxes of sources and their edits differ by 1.5 px and .056, those of edits and
# their blurred copies by 2.3 px and .12.
CENTRE, HEIGHT, WIDTH = 2.0, 0.1, 0.03

GAMMA = 0.35  # standard deviation of the exponent's logarithm
LIGHT = 0.15  # largest change of contrast and of brightness, as a share of 1
SATURATION = 2.2  # largest factor of the colours' distance from grey
TINT = 0.2  # largest deviation of the entries of a matrix that mixes the colours
BLUR = 3.0  # px of the crop, largest standard deviation; half of the crops stay sharp
NOISE = 0.06  # largest standard deviation, in [-1, 1]; it hides the noise that edits share with their source
JPEG = 30, 96  # lowest quality, and one above the highest; half of the crops


def find(requests: Sequence[world.Request], processes: int | None = None) -> np.ndarray:
    """Finds the largest face of each portrait, or reads it from the cache -> (N, 4) int16: x0, y0, x1, y1
    as in models.faces, zeros if there is no face."""
    path = world.WORK / "data" / f"{world.cache_key(requests, repr(LOOKS).encode())}.boxes.npy"
    if not path.exists():
        pixels = world.render(requests, processes)
        parts = [pixels[start : start + 64] for start in range(0, len(pixels), 64)]
        with multiprocessing.get_context("fork").Pool(processes or os.cpu_count(), _one_thread) as pool:
            np.save(path, np.concatenate(list(pool.imap(largest, parts))))
    return np.load(path)


def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def detector() -> FaceDetector:
    """Loads the detector, once per process."""
    return FaceDetector(torch.device("cpu"))


def largest(images: Sequence[np.ndarray]) -> np.ndarray:
    """Finds the largest face of each picture (H, W, 3) uint8 -> (N, 4) int16, like `find`."""
    found = detector().find(images)
    return np.array([next(iter(boxes), (0, 0, 0, 0)) for boxes in found], dtype=np.int16)


def boxes_of(found: np.ndarray) -> list[list[Box]]:
    """Converts `find`'s boxes to the form that a recogniser takes; without a face, the whole picture."""
    whole = (0, 0, world.SIDE, world.SIDE)
    return [[tuple(int(side) for side in box) if box.any() else whole] for box in found]


def cut(images: torch.Tensor, boxes: torch.Tensor, generator: torch.Generator, size: int) -> torch.Tensor:
    """Crops faces, jittered, half of them mirrored. images (B, 3, H, W), boxes (B, 4) in px ->
    (B, 3, size, size)."""
    count, (height, width) = len(images), images.shape[-2:]
    middle = (boxes[:, 2:] + boxes[:, :2]) / 2 + CENTRE * torch.randn(count, 2, generator=generator)
    larger = HEIGHT * torch.randn(count, 1, generator=generator)
    wider = WIDTH * torch.randn(count, 1, generator=generator) * torch.tensor([1.0, 0.0])
    sides = (boxes[:, 2:] - boxes[:, :2]) * (larger + wider).exp()  # (B, 2): width, height
    of_image = torch.tensor([width, height])
    move = torch.zeros(count, 2, 3)  # from the crop's [-1, 1] to the image's
    move[:, [0, 1], [0, 1]] = sides / of_image
    move[:, 0, 0] *= 1 - 2 * torch.randint(2, (count,), generator=generator)
    move[:, :, 2] = 2 * middle / of_image - 1
    grid = F.affine_grid(move, [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def photograph(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Changes light, colours, sharpness, noise and JPEG of crops (B, 3, H, W) in [-1, 1] -> the same shape.

    Each crop has its own draw, but all blurred ones share one sigma.
    """
    count = len(crops)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    values = (crops + 1) / 2
    values = values.clamp(1e-3, 1) ** (GAMMA * torch.randn(count, 1, 1, 1, generator=generator)).exp()
    values = values * uniform(1 - LIGHT, 1 + LIGHT) + uniform(-LIGHT, LIGHT)
    grey = torch.einsum("c,bchw->bhw", torch.tensor(LUMA), values)[:, None]  # (B, 1, H, W)
    values = grey + uniform(0, SATURATION) * (values - grey)
    mix = torch.eye(3) + uniform(0, TINT)[..., 0] * torch.randn(count, 3, 3, generator=generator)
    values = torch.einsum("bij,bjhw->bihw", mix, values)
    blurred, compressed = torch.rand(2, count, generator=generator) < 0.5
    values[blurred] = blur(values[blurred], BLUR * float(torch.rand((), generator=generator)))
    found = (2 * values - 1).clamp(-1, 1)
    found = found + uniform(0, NOISE) * torch.randn(found.shape, generator=generator)
    found[compressed] = jpeg(found[compressed], generator)
    return found.clamp(-1, 1)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blurs images (B, 3, H, W) by a Gaussian of sigma px."""
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * max(sigma, 1e-3) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None, :], groups=3), kernel[:, :, :, None], groups=3)


def jpeg(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Compresses images (B, 3, H, W) in [-1, 1] as JPEG of random quality."""
    read = []
    qualities = torch.randint(*JPEG, (len(images),), generator=generator).tolist()
    for pixels, quality in zip(to_uint8(images), qualities, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        read.append(np.asarray(Image.open(file)))
    return to_tensor(np.stack(read)) if read else images
