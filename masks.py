"""Makes soft masks in [0, 1] that scale the budget per pixel, from the clean image and its faces alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported where it is used, so that --help lists BUDGET_MASKS at once
    from torch import Tensor

    from models.faces import Box

BUDGET_MASKS = ("none", "face", "texture", "face+texture")
VERSION = 2  # raise it when a mask changes, as with a method's
FACE_EDGE = 0.2  # share of a box's sides over which its mask falls to 0 outside it


def budget_mask(images: Tensor, boxes: Sequence[Sequence[Box]], kind: str) -> Tensor | None:
    """Makes the mask of a kind for images (B, 3, H, W) in [-1, 1] -> (B, 1, H, W), None for `none`.

    boxes: the faces of each image, in its pixels.
    """
    masks = {"face": lambda: face_mask(images, boxes), "texture": lambda: texture_mask(images)}
    parts = [masks[name]() for name in kind.split("+") if name != "none"]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] * parts[1]


def face_mask(images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Makes masks that are 1 in each image's boxes and fall to 0 in half a cosine around -> (B, 1, H, W)."""
    import torch

    def along(side: int, low: int, high: int) -> Tensor:
        places = torch.arange(side, device=images.device, dtype=images.dtype) + 0.5
        outside = torch.maximum(low - places, places - high).clamp(min=0) / (FACE_EDGE * (high - low))
        return (1 + (torch.pi * outside.clamp(max=1)).cos()) / 2

    height, width = images.shape[-2:]
    mask = images.new_zeros(len(images), 1, height, width)
    for one, faces in zip(mask, boxes, strict=True):
        for x0, y0, x1, y1 in faces:
            face = along(height, y0, y1)[:, None] * along(width, x0, x1)
            one.copy_(torch.maximum(one, face))
    return mask


def texture_mask(images: Tensor) -> Tensor:
    """Measures the deviation of grey values around each pixel -> (B, 1, H, W), 1 at twice the mean or more.

    A perturbation is less visible in texture. The window's side is 1/64 of the long side.
    """
    import torch.nn.functional as F

    side = max(3, max(images.shape[-2:]) // 64 | 1)

    def mean(values: Tensor) -> Tensor:  # along columns, then rows: as a square it takes minutes
        padded = F.pad(values, [side // 2] * 4, mode="replicate")
        return F.avg_pool2d(F.avg_pool2d(padded, (side, 1), stride=1), (1, side), stride=1)

    grey = images.mean(dim=1, keepdim=True)
    deviation = mean((grey - mean(grey)).square()).sqrt()
    usual = deviation.mean(dim=(1, 2, 3), keepdim=True)
    return (deviation / (2 * usual).clamp(min=1e-3)).clamp(max=1)
