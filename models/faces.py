"""Finds faces in a picture and cuts them out for a recogniser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 outside
Points = tuple[tuple[float, float], ...]  # eyes, nose, corners of the mouth; the picture's left ones first
USUAL_POINTS = ((0.275, 0.405), (0.735, 0.4), (0.505, 0.62), (0.31, 0.765), (0.72, 0.76))  # in a box
STRIP = 256  # rows of an image that a crop is carried back to at once
DETECTION_SIDE = 1024  # px; larger photos are reduced to it before MTCNN looks at them


class Face(tuple):
    """A box, x0, y0, x1, y1, that knows the five points of the face in it.

    A box without points, such as one given by hand, gets them at their usual places.
    """

    points: Points

    def __new__(cls, box: Iterable[int], points: Iterable[Sequence[float]] | None = None) -> Self:
        face = super().__new__(cls, box)
        x0, y0, x1, y1 = face
        if points is None:
            points = ((x0 + x * (x1 - x0) - 0.5, y0 + y * (y1 - y0) - 0.5) for x, y in USUAL_POINTS)
        face.points = tuple((float(x), float(y)) for x, y in points)
        return face


class Look(NamedTuple):
    """One of the detector's looks at a picture."""

    min_face_size: int  # px; it steers the sizes at which MTCNN sees the picture, too
    sepia: bool = False  # whether the picture's colours are exchanged for those of an old photo


# Each look gets the pictures in which the earlier ones found no face. In colour alone MTCNN misses most blue
# and green faces, which the paper's edits make, and by its pyramid's steps some of a picture of 128 px.
LOOKS = (Look(32), Look(32, sepia=True), Look(40))
PHOTO_SIDE = 256  # px; faces may be smaller in pictures above it: the first look is facenet-pytorch's own
PHOTO_LOOKS = (Look(20), *LOOKS[1:])
LUMA, SEPIA = (0.299, 0.587, 0.114), (1.12, 0.97, 0.88)  # weights of R, G, B; R, G, B of a grey of 1
DETECTED_AT_ONCE = 32 * PHOTO_SIDE**2  # px, of all the pictures in one batch


# ---------------------------------------------------------------------------------------------------------
# where faces are


class FaceDetector:
    """Finds faces with MTCNN, whose weights come inside facenet-pytorch, in float32.

    Zhang et al. 2016, arXiv 1604.02878; the thresholds and pyramid are facenet-pytorch's own.
    """

    def __init__(self, device: torch.device) -> None:
        from facenet_pytorch import MTCNN

        sizes = {look.min_face_size for look in LOOKS + PHOTO_LOOKS}
        self.mtcnn = {size: MTCNN(keep_all=True, min_face_size=size, device=device) for size in sizes}
        self.device = device

    def __call__(self, pixels: np.ndarray) -> list[Face]:
        """Gives the faces in an image (H, W, 3) uint8, the largest first, cut to the image; margin 0."""
        return self.find([pixels])[0]

    def find(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """Gives the faces in each of several images of one size, as a call with it alone does, but faster."""
        import numpy as np
        from PIL import Image

        found: list[list[Face]] = [[] for _ in images]
        if not len(images):
            return found
        size = images[0].shape[:2]
        scale = max(1.0, max(size) / DETECTION_SIDE)
        height, width = (round(side / scale) for side in size)
        at_once = max(1, DETECTED_AT_ONCE // (height * width))

        def area(box: Box) -> int:
            return (box[2] - box[0]) * (box[3] - box[1])

        for look in PHOTO_LOOKS if max(size) > PHOTO_SIDE else LOOKS:
            if min(height, width) < look.min_face_size:  # no face fits, and the pyramid would be empty
                continue
            left = [row for row, boxes in enumerate(found) if not boxes]
            for start in range(0, len(left), at_once):
                rows = left[start : start + at_once]
                pictures = [Image.fromarray(images[row]) for row in rows]
                resized = [one.resize((width, height), Image.Resampling.BILINEAR) for one in pictures]
                batch = np.stack([np.asarray(one) for one in resized])
                for row, faces in zip(rows, self._look(look, batch), strict=True):
                    inside = [
                        Face(box, points * scale)
                        for one, points in faces
                        if (box := clip_box(one * scale, size))
                    ]
                    found[row] = sorted(inside, key=area, reverse=True)
        return found

    def _look(self, look: Look, images: np.ndarray) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Looks once at images (B, H, W, 3) uint8 -> for each its boxes (4,) with their points (5, 2)."""
        import numpy as np
        import torch

        images = sepia(images) if look.sepia else images
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found, _, points = self.mtcnn[look.min_face_size].detect(images, landmarks=True)
        return [
            [] if boxes is None else list(zip(*(np.asarray(part, np.float64) for part in (boxes, five))))
            for boxes, five in zip(found, points, strict=True)
        ]


def sepia(images: np.ndarray) -> np.ndarray:
    """Gives images (..., 3) uint8 the colours of an old photo: whatever their hue, skin is brown to MTCNN."""
    import numpy as np

    luma = images.astype(np.float32) @ np.array(LUMA, np.float32)  # (...)
    return np.clip(np.rint(luma[..., None] * np.array(SEPIA, np.float32)), 0, 255).astype(np.uint8)


def clip_box(box: Sequence[float], size: Sequence[int]) -> Box | None:
    """Cuts a box to whole pixels inside an image of size (H, W); None if nothing of it is inside."""
    height, width = size
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(width, int(box[2])), min(height, int(box[3]))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def scale_box(box: Box, size: Sequence[int], target: Sequence[int]) -> Face | None:
    """Carries a box of an image of `size` (H, W) to its form of size `target`; None if nothing is left."""
    across, down = target[1] / size[1], target[0] / size[0]
    inside = clip_box([round(side * by) for side, by in zip(box, (across, down) * 2, strict=True)], target)
    points = getattr(box, "points", None)  # of pixels' middles
    if points is not None:
        points = [((x + 0.5) * across - 0.5, (y + 0.5) * down - 0.5) for x, y in points]
    return inside and Face(inside, points)


def scale_boxes(boxes: Iterable[Box], size: Sequence[int], target: Sequence[int]) -> list[Face]:
    """Scales boxes as `scale_box` does and drops those of which nothing is left."""
    return [inside for box in boxes if (inside := scale_box(box, size, target))]


# ---------------------------------------------------------------------------------------------------------
# crops


@dataclass(frozen=True)
class BoxCrop:
    """Cuts the box out and resizes it, as facenet-pytorch does with margin 0."""

    size: int  # px

    def __call__(self, image: Tensor, face: Box) -> Tensor:
        """Cuts a face out of an image (1, 3, H, W) -> (1, 3, size, size); antialiased, differentiable."""
        import torch.nn.functional as F

        x0, y0, x1, y1 = face
        crop, size = image[..., y0:y1, x0:x1], (self.size, self.size)
        if crop.shape[-2:] == size:
            return crop
        return F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class PointCrop:
    """Turns, scales and moves the picture so that the five points come closest to a template's."""

    size: int  # px
    template: Points  # in the crop's pixels

    def __call__(self, image: Tensor, face: Box) -> Tensor:
        """Cuts a face out of an image (1, C, H, W) in [-1, 1] -> (1, C, size, size), black outside of it.

        Antialiased, differentiable.
        """
        import numpy as np
        import torch
        import torch.nn.functional as F

        a, b = self.similarity(face)
        steps = np.arange(self.size)
        places = a * (steps[None, :] + 1j * steps[:, None]) + b  # (size, size), in pixels of the image
        height, width = image.shape[-2:]
        scale, margin = abs(a), 2 * abs(a) + 2
        x0, x1 = np.clip([places.real.min() - margin, places.real.max() + margin], 0, width).astype(int)
        y0, y1 = np.clip([places.imag.min() - margin, places.imag.max() + margin], 0, height).astype(int)
        if x1 <= x0 or y1 <= y0:  # the face is outside
            return image.new_full((1, image.shape[1], self.size, self.size), -1.0)
        part = image[..., y0:y1, x0:x1]
        if scale > 1:
            size = [max(1, round(side / scale)) for side in part.shape[-2:]]
            part = F.interpolate(part, size, mode="bilinear", antialias=True, align_corners=False)
        across = (places.real + 0.5 - x0) / (x1 - x0) * 2 - 1
        down = (places.imag + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.from_numpy(np.stack([across, down], axis=-1)[None]).to(part)  # (1, size, size, 2)
        return F.grid_sample(part + 1, grid, align_corners=False) - 1  # zeros outside are black

    def similarity(self, face: Box) -> tuple[complex, complex]:
        """Finds a and b of the least-squares similarity transform: a crop's pixel u is at a u + b in the
        image, as complex numbers."""
        import numpy as np

        points = face.points if isinstance(face, Face) else Face(face).points
        there, here = (np.array(five) @ [1, 1j] for five in (points, self.template))
        centred = here - here.mean()
        a = np.vdot(centred, there - there.mean()) / np.vdot(centred, centred).real
        return a, there.mean() - a * here.mean()

    def place(self, face: Box) -> Face:
        """Tells where a face is in its crop; the box is as upright as before."""
        a, b = self.similarity(face)
        x0, y0, x1, y1 = face
        middle, half = (complex(x0 + x1 - 1, y0 + y1 - 1) / 2 - b) / a, max(x1 - x0, y1 - y0) / abs(a) / 2
        sides = [place + 0.5 + way * half for way in (-1, 1) for place in (middle.real, middle.imag)]
        box = clip_box(sides, (self.size, self.size))
        points = [(complex(x, y) - b) / a for x, y in Face(face, getattr(face, "points", None)).points]
        return Face(box, [(point.real, point.imag) for point in points])

    def back(self, crop: Tensor, face: Box, image: Tensor) -> None:
        """Adds values of a crop (1, C, size, size) to an image (1, C, H, W), where they were cut out."""
        import numpy as np
        import torch
        import torch.nn.functional as F

        a, b = self.similarity(face)
        edge = self.size - 0.5
        corners = a * np.array([-0.5 - 0.5j, edge - 0.5j, -0.5 + edge * 1j, edge + edge * 1j]) + b
        x0, x1 = np.clip([corners.real.min(), corners.real.max() + 1], 0, image.shape[-1]).astype(int)
        y0, y1 = np.clip([corners.imag.min(), corners.imag.max() + 1], 0, image.shape[-2]).astype(int)
        if abs(a) < 1:  # the image is the smaller one
            small = [max(1, round(self.size * abs(a)))] * 2
            crop = F.interpolate(crop, small, mode="bilinear", antialias=True, align_corners=False)
        for top in range(y0, y1, STRIP):  # for the memory
            rows = np.arange(top, min(top + STRIP, y1))
            places = (np.arange(x0, x1)[None, :] + 1j * rows[:, None] - b) / a  # in pixels of the crop
            grid = np.stack([places.real, places.imag], axis=-1)[None] * 2 / self.size + (1 / self.size - 1)
            grid = torch.from_numpy(grid).to(crop)
            part = image[..., top : top + len(rows), x0:x1]
            part += F.grid_sample(crop, grid, mode="bicubic", align_corners=False)
