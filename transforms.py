"""Random, differentiable transforms of images, for `methods.eot`; the parts of JPEG; a blur.

Every image is (B, 3, H, W) RGB in [-1, 1], and comes back in that shape. Random numbers come from one CPU
generator per image, so that they depend neither on the batch nor on the device.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:  # torch is imported where it is used, as in methods.py
    import torch
    from torch import Tensor

Draws = Sequence["torch.Generator"]  # one per image
Transform = Callable[..., "Tensor"]  # (images, generators, window) -> images
STRIP = 128  # px, the side of what is blurred at once
COARSE = 1.0  # px, the sigma of what is left of a gradient
SURROUNDINGS = 5 / 3  # of a face's long side: the square in which it is transformed


class Window(NamedTuple):
    """The part of each image in which geometry moves things: its centre and half sides, (B, 2) each as
    (x, y), where an image reaches from -1 to 1."""

    centre: Tensor
    half: Tensor


def around(boxes: Sequence[Sequence[tuple[int, int, int, int]]], images: Tensor) -> Window:
    """Gives the square around all faces of each image (B, 3, H, W), so that a face anywhere is transformed as
    one in the middle. boxes: of each image, at least one, in its pixels."""
    import torch

    sizes = images.new_tensor(images.shape[:1:-1])  # W, H
    faces = [images.new_tensor(found) for found in boxes]
    corners = torch.stack([torch.cat([face[:, :2].amin(0), face[:, 2:].amax(0)]) for face in faces])
    low, high = corners[:, :2], corners[:, 2:]
    side = SURROUNDINGS * (high - low).amax(dim=1, keepdim=True)
    return Window((low + high) / sizes - 1, side / sizes)


def chains(text: str) -> list[Transform]:
    """Reads `resize+light,jpeg`: transforms in sequence (+), in chains that alternate (,).

    Raises ValueError for an unknown name.
    """
    known = {
        "none": lambda images, generators, window: images,
        "resize": resize, "shift": shift, "mirror": mirror, "rotate": rotate, "pose": pose, "crop": crop,
        "light": light, "blur": soften, "noise": grain, "hide": hide, "jpeg": jpeg, "shrink": shrink,
        "coarse": coarse,
    }  # fmt: skip
    if unknown := [name for name in text.replace("+", ",").split(",") if name not in known]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")

    def chain(names: Sequence[str]) -> Transform:
        def apply(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
            for name in names:
                images = known[name](images, generators, window)
            return images

        return apply

    return [chain(part.split("+")) for part in text.split(",")]


def uniform(generators: Draws, low: float, high: float, like: Tensor) -> Tensor:
    """Draws a number for each image, in float32 -> (B,) of the dtype of `like`."""
    import torch

    draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
    return low + (high - low) * draws.to(like)


def normal(generators: Draws, like: Tensor) -> Tensor:
    """Draws normal noise like `like` (B, ...), in float32 whatever its dtype."""
    import torch

    return torch.stack([torch.randn(like.shape[1:], generator=each) for each in generators]).to(like)


# ---------------------------------------------------------------------------------------------------------
# geometry, in the window or the whole image; what comes from outside the image is grey


def resize(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Shrinks to 80 to 100 % of the sides and pads, at a random place (DIM, Xie et al. 2019)."""
    scale = uniform(generators, 0.8, 1, images)
    right, down = ((1 - scale) * uniform(generators, -1, 1, images) for _ in range(2))
    return _warp(images, window, scale, right, down)


def shift(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Moves by up to 5 % of the sides."""
    right, down = (uniform(generators, -0.1, 0.1, images) for _ in range(2))  # a side is 2 long
    return _warp(images, window, 1 + 0 * right, right, down)


def mirror(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Mirrors left and right, half of the time."""
    side = 1 - 2 * (uniform(generators, 0, 1, images) < 0.5).to(images)
    return _warp(images, window, 1 + 0 * side, side=side)


def rotate(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Rotates by up to 10 degrees."""
    angle = uniform(generators, -0.1745, 0.1745, images)
    return _warp(images, window, 1 + 0 * angle, angle=angle)


def pose(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Rotates by up to 10 degrees, scales by up to 10 % and moves by up to 2.5 % of the sides, at once."""
    angle = uniform(generators, -0.1745, 0.1745, images)
    scale = 1 + uniform(generators, -0.1, 0.1, images)
    right, down = (uniform(generators, -0.05, 0.05, images) for _ in range(2))
    return _warp(images, window, scale, right, down, angle=angle)


def crop(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Brings the middle 80 to 100 % of the sides back up to the whole size."""
    scale = 1 / uniform(generators, 0.8, 1, images)
    return _warp(images, window, scale)


def _warp(
    images: Tensor,
    window: Window | None,
    scale: Tensor,
    right: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
    angle: Tensor | float = 0.0,
    side: Tensor | float = 1.0,
) -> Tensor:
    """Mirrors (side -1), scales, rotates and moves; all (B,), right and down in half sides. Bilinear."""
    import torch
    import torch.nn.functional as F

    zero, aspect = 0 * scale, images.shape[-1] / images.shape[-2]
    centre, half = window or (scale.new_zeros(2), scale.new_ones(2))
    cos, sin = (angle + zero).cos() / scale, (angle + zero).sin() / scale
    x0, y0 = centre.unbind(-1)
    x, y = x0 + half[..., 0] * right, y0 + half[..., 1] * down  # where the centre goes
    rows = [side * cos, side * sin / aspect, x0 - side * (cos * x + sin / aspect * y)]  # its origin
    rows += [-sin * aspect, cos, y0 + sin * aspect * x - cos * y]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def hide(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Greys a square of a quarter of the window's side, at a random place in it."""
    import torch

    centre, half = window or (images.new_zeros(2), images.new_ones(2))
    draws = torch.stack([uniform(generators, -0.75, 0.75, images) for _ in range(2)], dim=1)
    middle, reach = centre + half * draws, half.expand_as(draws) / 4  # (B, 2), as (x, y)

    def inside(axis: int, side: int) -> Tensor:  # (B, side)
        places = (2 * torch.arange(side, device=images.device).to(images) + 1) / side - 1
        return (places - middle[:, axis, None]).abs() <= reach[:, axis, None]

    across, down = inside(0, images.shape[-1]), inside(1, images.shape[-2])
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0)


# ---------------------------------------------------------------------------------------------------------
# light, blur, noise, JPEG, a smaller size


def light(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Changes contrast by up to 20 % and brightness by up to 10 % of the range."""
    contrast, brightness = (uniform(generators, -0.2, 0.2, images).view(-1, 1, 1, 1) for _ in range(2))
    return ((1 + contrast) * images + brightness).clamp(-1, 1)


def soften(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Blurs by a 5x5 Gaussian of a sigma from 0.5 to 1.5 px."""
    import torch

    sigmas = uniform(generators, 0.5, 1.5, images).tolist()
    return torch.cat([blur(image[None], 5, sigma) for image, sigma in zip(images, sigmas, strict=True)])


def grain(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Adds normal noise of a deviation of 2.5 % of the range."""
    return (images + 0.05 * normal(generators, images)).clamp(-1, 1)


def shrink(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Makes each image 45 to 95 % as large and brings it back to its size, bicubic, as Pillow does."""
    import torch
    from torch.nn.functional import interpolate

    size = images.shape[-2:]

    def one(image: Tensor, share: float) -> Tensor:
        small = [max(1, round(side * share)) for side in size]
        smaller = interpolate(image[None], small, mode="bicubic", antialias=True)
        return interpolate(smaller, size, mode="bicubic", antialias=True)

    shares = uniform(generators, 0.45, 0.95, images).tolist()
    return torch.cat([one(*pair) for pair in zip(images, shares, strict=True)]).clamp(-1, 1)


def coarse(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Changes nothing, but of a gradient lets only the coarse part pass, which survives a smaller size."""
    low = smooth(images, COARSE)
    return low + (images - low).detach()


def blur(images: Tensor, side: int, sigma: float) -> Tensor:
    """Blurs by a Gaussian of a kernel's side and a sigma in px, reflecting at the borders, by torchvision."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, [side, side], [sigma, sigma])


def smooth(images: Tensor, sigma: float) -> Tensor:
    """Blurs by a Gaussian of a sigma in px, 0 for none, as wide as it needs and the image allows."""
    import torch
    from torchvision.transforms.functional import gaussian_blur

    if not sigma:
        return images
    side = min(2 * round(3 * sigma) + 1, 2 * ((min(images.shape[-2:]) - 1) // 2) + 1)
    # one way, then the other, since a square kernel's time goes with its area; in strips, for the memory
    for kernel, across in (([1, side], -1), ([side, 1], -2)):
        strips = images.split(STRIP, across)
        images = torch.cat([gaussian_blur(strip, kernel, [sigma, sigma]) for strip in strips], across)
    return images


def jpeg(images: Tensor, generators: Draws, window: Window | None = None) -> Tensor:
    """Compresses with a whole quality from 50 to 95, as Pillow does; see `compress`."""
    return compress(images, uniform(generators, 50, 95, images).round())


def compress(images: Tensor, quality: Tensor) -> Tensor:
    """Gives what JPEG of a quality (B,) keeps, colours at half the resolution; gradients pass rounding."""
    import torch
    import torch.nn.functional as F

    def coded(planes: Tensor, tables: Tensor) -> Tensor:
        levels = per_block(torch.div, dct(planes), tables)
        return dct(per_block(torch.mul, levels + (levels.round() - levels).detach(), tables), inverse=True)

    height, width = images.shape[-2:]
    planes = to_ycc(F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate"))
    tables = quantisation(quality)
    light, colour = coded(planes[:, :1], tables[:, :1]), coded(F.avg_pool2d(planes[:, 1:], 2), tables[:, 1:2])
    colour = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False)
    return from_ycc(torch.cat([light, colour], dim=1))[..., :height, :width].clamp(-1, 1)


# Of JFIF: Y, Cb and Cr of red, green and blue, around 0
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def quantisation(quality: Tensor) -> Tensor:
    """Takes JPEG's tables of qualities (B,) from what Pillow writes -> (B, 3, 8, 8), for Y, Cb and Cr."""
    import torch

    tables = []
    for one in quality.tolist():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=int(one))
        found = Image.open(file).quantization
        tables.append([found[0], found[1], found[1]])
    return torch.tensor(tables, dtype=quality.dtype, device=quality.device).view(-1, 3, 8, 8)


def to_ycc(images: Tensor) -> Tensor:
    """Turns RGB in [-1, 1] into Y, Cb and Cr in 8-bit levels around 0, which JPEG transforms."""
    import torch

    planes = 127.5 * torch.einsum("cd,bdhw->bchw", images.new_tensor(TO_YCC), images)
    return planes - planes.new_tensor([0.5, 0, 0]).view(1, 3, 1, 1)


def from_ycc(planes: Tensor) -> Tensor:
    """Undoes `to_ycc`."""
    import torch

    planes = planes + planes.new_tensor([0.5, 0, 0]).view(1, 3, 1, 1)
    return torch.einsum("cd,bdhw->bchw", torch.linalg.inv(planes.new_tensor(TO_YCC)), planes) / 127.5


def dct(planes: Tensor, inverse: bool = False) -> Tensor:
    """Transforms each 8x8 block by the orthonormal DCT-II, or back: (B, C, H, W), H and W multiples of 8."""
    import torch

    n = torch.arange(8, dtype=planes.dtype, device=planes.device)
    basis = (math.pi / 8 * (n + 0.5) * n[:, None]).cos() / 2  # (frequency, place)
    basis[0] /= 2**0.5
    basis = basis.T if inverse else basis
    return _from_blocks(torch.einsum("ui,bchiwj,vj->bchuwv", basis, _blocks(planes), basis))


def per_block(operation: Callable[[Tensor, Tensor], Tensor], planes: Tensor, tables: Tensor) -> Tensor:
    """Multiplies or divides each 8x8 block of planes (B, C, H, W) by its table of (B or 1, C, 8, 8)."""
    return _from_blocks(operation(_blocks(planes), tables[:, :, None, :, None]))


def _blocks(planes: Tensor) -> Tensor:
    return planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # (B, C, h, 8, w, 8)


def _from_blocks(blocks: Tensor) -> Tensor:
    return blocks.flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------
# where a perturbation may live instead of in pixels


def in_coefficients(x: Tensor, quality: int) -> Callable[[Tensor], Tensor]:
    """Makes v -> x with each DCT coefficient of Y, Cb and Cr moved by v of JPEG's steps at a quality.

    v is like x, so that of blocks that go beyond it some coefficients stay. Colours keep their resolution,
    and x is not rounded to whole steps: v = 0 gives x.
    """
    import torch
    import torch.nn.functional as F

    height, width = x.shape[-2:]
    beyond = (0, -width % 8, 0, -height % 8)
    planes = dct(to_ycc(F.pad(x, beyond, mode="replicate")))
    steps = quantisation(x.new_full((1,), quality))

    def moved(v: Tensor) -> Tensor:
        changed = per_block(torch.mul, F.pad(v, beyond), steps) + planes
        return from_ycc(dct(changed, inverse=True))[..., :height, :width]

    return moved


SIGMAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # px
SPECTRUM_CHANGE = 0.01  # the most, of log10 of the power in a ring, as in BlurGuard's code


def keeping_spectrum(x: Tensor, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """Makes the blur of a perturbation after which noise leaves x's spectrum as it is, an image's own sigma.

    The smallest of SIGMAS at which no ring of the spectrum changes by more than SPECTRUM_CHANGE; else the
    largest. A convex mean of `noise`'s neighbours: what was within a budget stays within it.
    """
    import torch

    def sigma_of(image: Tensor, perturbation: Tensor) -> float:
        clean = radial_spectrum(image)
        for sigma in SIGMAS:
            change = radial_spectrum(image + smooth(perturbation[None], sigma)[0]) - clean
            if change.abs().max() <= SPECTRUM_CHANGE:
                return sigma
        return SIGMAS[-1]

    sigmas = [sigma_of(*pair) for pair in zip(x, noise, strict=True)]
    return lambda v: torch.cat([smooth(image[None], sigma) for image, sigma in zip(v, sigmas, strict=True)])


def radial_spectrum(image: Tensor) -> Tensor:
    """Measures log10 of the power of an image (3, H, W) in rings of whole cycles -> (rings,)"""
    import torch

    power = sum(torch.fft.fft2(plane / 2 + 0.5).abs().square_() for plane in image)  # (H, W)
    down, right = (torch.fft.fftfreq(side, 1 / side, device=image.device) for side in power.shape)
    ring = (down[:, None] ** 2 + right**2).sqrt().round().long()
    sums = power.new_zeros(int(ring.max()) + 1).index_add(0, ring.flatten(), power.flatten())
    return (sums + 1e-8).log10()
