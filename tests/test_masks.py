"""masks.py: in [0, 1], soft, of the clean image and its boxes alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from images import to_tensor
from masks import BUDGET_MASKS, FACE_EDGE, budget_mask, face_mask, texture_mask

BOXES = [[(10, 20, 30, 60)], [(0, 0, 12, 12), (40, 40, 64, 64)]]


def images() -> torch.Tensor:
    return torch.cat([to_tensor(tiny.portrait(64, seed=seed)) for seed in (1, 2)])


@pytest.mark.parametrize("kind", BUDGET_MASKS)
def test_a_mask_is_soft_and_its_images_own(kind):
    x = images()
    mask = budget_mask(x, BOXES, kind)
    if kind == "none":
        assert mask is None
        return
    assert mask.shape == (2, 1, 64, 64) and mask.dtype == x.dtype
    assert mask.min() >= 0 and mask.max() <= 1 and mask.max() > 0.9
    assert ((mask > 0.05) & (mask < 0.95)).any()
    for i in range(2):
        assert torch.equal(budget_mask(x[i : i + 1], BOXES[i : i + 1], kind)[0], mask[i])


def test_both_are_their_product():
    x = images()
    expected = face_mask(x, BOXES) * texture_mask(x)
    assert torch.equal(budget_mask(x, BOXES, "face+texture"), expected)


def test_a_face_is_whole_and_falls_off_around_it():
    mask = face_mask(images(), BOXES)
    for i, faces in enumerate(BOXES):
        for x0, y0, x1, y1 in faces:
            assert (mask[i, 0, y0:y1, x0:x1] == 1).all()
    row = mask[0, 0, 40]
    assert (row[30:34].diff() < 0).all() and (row[34:] == 0).all()  # a fifth of 20 px
    assert row[30] == pytest.approx((1 + np.cos(np.pi * 0.5 / (FACE_EDGE * 20))) / 2)
    assert (mask[1, 0, :, 18:30] == 0).all()


def test_texture_is_the_local_deviation():
    """Around each pixel 3x3, of what is left when the mean around each has been taken away."""
    x = images()
    grey = x.double().mean(dim=1).numpy()

    def mean(values):
        padded = np.pad(values, ((0, 0), (1, 1), (1, 1)), mode="edge")
        return sum(padded[:, y : y + 64, x0 : x0 + 64] for y in range(3) for x0 in range(3)) / 9

    deviation = np.sqrt(mean((grey - mean(grey)) ** 2))
    expected = np.minimum(deviation / (2 * deviation.mean(axis=(1, 2), keepdims=True)), 1)
    np.testing.assert_allclose(texture_mask(x)[:, 0], expected, atol=1e-4)


def test_textures_surroundings_grow_with_the_image():
    """A point is seen as far as 1/64 of the long side, twice: around it, and around what it moves."""
    for side, seen in ((64, 5), (320, 9)):
        x = torch.zeros(1, 3, 32, side)
        x[..., 16, 32] = 1
        assert (texture_mask(x)[0, 0, 16] > 0).sum() == seen


def test_where_nothing_is_there_is_no_texture():
    x = torch.full((1, 3, 32, 32), 0.3)
    assert texture_mask(x).max() < 1e-3
    x[..., 16:] = tiny.noise(1, 3, 32, 16)
    mask = texture_mask(x)
    assert mask[..., :13].max() < 0.01 and mask[..., 19:].min() > 0.2
    assert mask[..., 19:].mean() > 0.7
