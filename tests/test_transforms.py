"""transforms.py: JPEG and rotation against Pillow, draws of each image's own, gradients, and the two maps."""

import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import transforms
from images import to_tensor, to_uint8

NAMES = ["resize", "shift", "mirror", "rotate", "pose", "crop"]
NAMES += ["light", "blur", "noise", "hide", "jpeg", "shrink", "coarse"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def apply(text: str, images: torch.Tensor, *seeds: int) -> torch.Tensor:
    (chain,) = transforms.chains(text)
    return chain(images, generators(*seeds))


@pytest.fixture
def image() -> torch.Tensor:
    return to_tensor(tiny.portrait((48, 67), seed=1)).double()


@pytest.mark.parametrize("name", [*NAMES, "none", "resize+light", "mirror+jpeg"])
def test_a_transform_keeps_shape_range_and_gradient(name, image):
    image.requires_grad_(True)
    out = apply(name, image, 3)
    assert out.shape == image.shape and out.dtype == image.dtype and out.abs().max() <= 1 + 1e-9
    (gradient,) = torch.autograd.grad((out * tiny.noise(*out.shape)).sum(), image)
    assert gradient.isfinite().all() and (gradient != 0).double().mean() > 0.5


@pytest.mark.parametrize("name", [*NAMES, "resize+mirror+jpeg"])
def test_an_image_gets_the_same_alone(name, image):
    batch = torch.cat([0.5 * image, image, -image])
    together = apply(name, batch, 1, 2, 3)
    for i, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(apply(name, batch[i : i + 1], seed)[0], together[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(20, 33), (5, 7)])
def test_smoothing_is_scipys_as_wide_as_the_image_allows(size):
    image = tiny.noise(1, 3, *size).double()
    assert transforms.smooth(image, 0.0) is image
    found = transforms.smooth(image, 1.5)
    radius = min(4, (min(size) - 1) // 2)  # 3 sigma, rounded to even
    wanted = gaussian_filter(image.numpy(), 1.5, mode="mirror", radius=radius, axes=(2, 3))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_chain_for_each_turn():
    ways = transforms.chains("none,light")
    image = torch.full((1, 3, 4, 4), 0.2)
    assert [torch.equal(way(image, generators(1)), image) for way in ways] == [True, False]
    with pytest.raises(ValueError, match="'sharpen' is none of none, resize"):
        transforms.chains("resize+sharpen")


@pytest.mark.parametrize("name", ["resize", "shift", "mirror", "rotate", "crop"])
def test_a_face_at_the_side_is_transformed_as_one_in_the_middle(name):
    """About its surroundings, 5/3 of its long side: here 20 px; and a picture's own size has no say."""
    face = tiny.noise(1, 3, 20, 20).double()
    boxes = [[(4, 5, 16, 15)]]  # 12 x 10 px
    seen = []
    for height, width, top, left in ((20, 20, 0, 0), (48, 67, 3, 40), (67, 48, 40, 3)):
        image = torch.zeros(1, 3, height, width, dtype=torch.float64)
        here = np.s_[..., top : top + 20, left : left + 20]
        image[here] = face
        there = [[(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes[0]]]
        (chain,) = transforms.chains(name)
        window = transforms.around(there, image)
        seen.append(torch.cat([chain(image, generators(seed), window)[here] for seed in range(4)]))
    assert not torch.allclose(seen[0], face.expand_as(seen[0]))  # some are mirrored, too
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=1e-9)


def test_draws_go_as_far_as_they_say(monkeypatch):
    """Over many seeds, by what each does to an image that shows it."""
    seeds, white = range(200), torch.ones(1, 3, 60, 60).double()

    def extremes(measured) -> list[float]:
        values = torch.stack([torch.as_tensor(measured(seed)).double() for seed in seeds])
        return [values.min().item(), values.max().item()]

    assert extremes(lambda s: apply("resize", white, s).mean() ** 0.5) == pytest.approx([0.8, 1], abs=0.01)
    ramp = torch.linspace(-1, 1, 60).double().expand_as(white)
    for picture in (ramp, ramp.mT):  # at one border or the other
        free = [0.2 * 30 / 60 * end for end in (-1, 1)]
        sides = extremes(lambda s, picture=picture: (apply("resize", white, s) * picture).mean())
        assert sides[0] < 0.4 * free[0] and sides[1] > 0.4 * free[1]
    moved = extremes(lambda s: (apply("shift", white, s)[0, 0, 30] == 0).double().sum())
    assert moved[0] == 0 and moved[1] in (2, 3)  # 5 % of 60 px
    assert extremes(lambda s: apply("crop", white, s).min()) == pytest.approx([1, 1])
    inside = extremes(lambda s: apply("crop", ramp, s)[0, 0, 30].diff()[30] / ramp[0, 0, 30].diff()[30])
    assert inside == pytest.approx([0.8, 1], abs=0.01)
    tangent = extremes(lambda s: apply("rotate", ramp, s)[0, 0, :, 30].diff()[30] * 59 / 2)
    assert tangent == pytest.approx([-np.sin(np.pi / 18), np.sin(np.pi / 18)], abs=0.01)
    assert 60 < sum(torch.allclose(apply("mirror", ramp, s), ramp) for s in seeds) < 140
    assert extremes(lambda s: apply("light", 0 * white, s).mean()) == pytest.approx([-0.2, 0.2], abs=0.01)
    contrast = extremes(lambda s: (apply("light", white / 2, s) - apply("light", 0 * white, s)).mean() * 2)
    assert contrast == pytest.approx([0.8, 1.2], abs=0.01)
    point = 0 * white
    point[..., 30, 30] = 1
    middle = [np.exp(-(np.arange(-2, 3) ** 2) / (2 * sigma**2)).sum() ** -2 for sigma in (1.5, 0.5)]
    assert extremes(lambda s: apply("blur", point, s)[0, 0, 30, 30]) == pytest.approx(middle, abs=0.01)
    turned = extremes(lambda s: apply("pose", ramp, s)[0, 0, :, 30].diff()[30] * 59 / 2)
    assert turned == pytest.approx([-np.sin(np.pi / 18) / 0.95, np.sin(np.pi / 18) / 0.95], abs=0.02)
    hidden = extremes(lambda s: (apply("hide", white, s) == 0).double().mean())
    assert hidden == pytest.approx([1 / 16, 1 / 16], abs=0.005)
    assert extremes(lambda s: apply("noise", 0 * white, s).std()) == pytest.approx([0.05, 0.05], abs=0.003)
    # a fine pattern is gone at half the size, and hardly weaker at nine tenths of it
    fine = white * (torch.arange(60) // 2 % 2 * 2 - 1)
    kept = extremes(lambda s: (apply("shrink", fine, s) * fine)[..., 10:50].mean())
    assert kept[0] < 0.2 and kept[1] > 0.7
    monkeypatch.setattr(transforms, "compress", lambda images, quality: quality)
    qualities = {apply("jpeg", white, seed).item() for seed in seeds}
    assert qualities <= set(range(50, 96)) and min(qualities) < 53 and max(qualities) > 92


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
@pytest.mark.parametrize("size", [(48, 64), (50, 67)])
def test_jpeg_is_pillows(quality, size):
    pixels = tiny.portrait(size, seed=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    pillow = np.array(Image.open(buffer)).astype(int)
    ours = to_uint8(transforms.compress(to_tensor(pixels).double(), torch.tensor([quality]).double()))[0]
    assert np.abs(ours - pillow).mean() < min(1.2, 0.4 * np.abs(pixels.astype(int) - pillow).mean())


def test_in_coefficients_moves_by_steps_of_the_table(image):
    moved = transforms.in_coefficients(image, 95)
    torch.testing.assert_close(moved(torch.zeros_like(image)), image, rtol=0, atol=1e-12)
    v = 2 * torch.rand(image.shape, dtype=image.dtype) - 1
    whole = np.s_[..., :48, :64]
    before, after = (transforms.dct(transforms.to_ycc(x[whole])) for x in (image, moved(v)))
    (tables,) = transforms.quantisation(torch.tensor([50.0])).numpy()  # those of the standard
    steps = np.floor((tables * 10 + 50) / 100).clip(1)  # quality 95 is 10 % of the table
    expected = v[whole] * torch.from_numpy(steps).repeat(1, 6, 8)
    torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-9)


def test_keeping_spectrum_takes_the_first_that_keeps_it_of_each_image():
    x = tiny.noise(4, 3, 48, 67, seed=5).double() * 0.5
    x = torch.stack([transforms.blur(one[None], 9, sigma)[0] for one, sigma in zip(x, (0.4, 0.6, 0.8, 1.0))])
    noise = 0.01 * tiny.noise(4, 3, 48, 67).double()
    blurred, chosen = transforms.keeping_spectrum(x, noise)(noise), []
    for clean, change, found in zip(x, noise, blurred, strict=True):
        for sigma in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0):
            expected = transforms.blur(change[None], 2 * round(3 * sigma) + 1, sigma)[0]
            moved = transforms.radial_spectrum(clean + expected) - transforms.radial_spectrum(clean)
            if moved.abs().max() <= 0.01:
                break
        torch.testing.assert_close(found, expected)
        chosen.append(sigma)
    assert len(set(chosen)) > 2, chosen
