"""methods.py, loops.py, masks.py: each objective by its equation, in float64, and what holds for all of them.

Each statement of an equation is written here anew, of the tiny networks themselves; draws are repeated from
the seeds.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import transforms
from images import to_tensor, to_uint8_within
from loops import CHECK_EVERY, GradientError, Objective, Run, adam, l2_pgd, pgd, random_start, sized_pgd
from masks import BUDGET_MASKS, FACE_EDGE, budget_mask, face_mask, texture_mask
from methods import METHODS, NEED, eot
from models.denoiser import Denoiser
from models.editors import InstructPix2Pix
from protection import methods_for

torch.set_num_threads(1)

SCALE = 0.18215
SEEDS = [5, 6]
WINDOW = transforms.Window(torch.tensor([[0.1, -0.2]]).double(), torch.tensor([[0.7, 0.7]]).double())
KNOBS = {"encoder untargeted": {"targeted": False}, "cw targeted": {"targeted": True}}


@pytest.fixture(scope="module")
def vae():
    return tiny.tiny_vae(dtype=torch.float64)


@pytest.fixture(scope="module")
def editor():
    return tiny.tiny_editor(dtype=torch.float64)


def image(batch=2, side=32, reach=0.9):
    return reach * tiny.noise(batch, 3, side, side, seed=1).double()


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def similarity(y):
    """Stands for a recogniser; its parts of the image count differently."""
    weight = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view(1, *y.shape[1:])
    return torch.tanh((weight * y).mean(dim=(1, 2, 3)))


def distance(y):
    """Stands for LPIPS."""
    return y.amax(dim=(1, 2, 3)) + 3


def offers(name, vae, editor, seeds=SEEDS, **knobs):
    there = {"vae": vae, "editor": Denoiser(editor), "generators": generators(seeds), "face_window": WINDOW}
    there |= {"face_similarity": similarity, "perceptual_distance": distance}
    needs = [key for key, default in METHODS[name].parameters.items() if default is NEED]
    return {need: there[need] for need in needs} | knobs


def value(case, x, x_adv, vae, editor, t=0.5, **knobs):
    name = case.split()[0]
    return METHODS[name].objective(x, **offers(name, vae, editor, **KNOBS.get(case, knobs)))(x_adv, t)


# ---------------------------------------------------------------------------------------------------------
# the equations


class By:
    """The tiny networks, one image at a time, with the draws that are an image's own."""

    def __init__(self, vae, editor, seed):
        self.vae, self.pipeline = vae, editor.pipeline
        self.generator = torch.Generator().manual_seed(seed)
        self.alphas = editor.pipeline.scheduler.alphas_cumprod.double()
        ids = self.pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
        self.nothing = self.pipeline.text_encoder(ids)[0]

    def e(self, x):
        return self.vae.encode(x).latent_dist.mean

    def d(self, z):
        return self.vae.decode(z).sample

    def normal(self):
        return torch.randn(4, 4, 4, generator=self.generator)[None].double()

    def timestep(self):
        return int(torch.rand((), generator=self.generator) * 1000)

    def eps(self, z_k, k, z):
        return self.pipeline.unet(torch.cat([z_k, z], dim=1), k, self.nothing).sample

    def error(self, x):
        k, noise, z = self.timestep(), self.normal(), self.e(x)
        a = self.alphas[k]
        return self.eps(a.sqrt() * SCALE * z + (1 - a).sqrt() * noise, k, z) - noise


def photoguard(by, x, x_adv):
    z, z_k = by.e(x_adv), by.normal()
    for k, after in ((999, 749), (749, 499), (499, 249), (249, None)):
        noise, a = by.eps(z_k, k, z), by.alphas[k]
        clean = (z_k - (1 - a).sqrt() * noise) / a.sqrt()
        b = by.alphas[after] if after else torch.ones(())
        z_k = b.sqrt() * clean + (1 - b).sqrt() * noise
    return -by.d(z_k / SCALE).norm()


def mist(by, x, x_adv):
    squares = np.indices(x.shape[-2:]) // 2  # 16 fields on 32 px
    pattern = torch.from_numpy(np.where(squares.sum(axis=0) % 2 == 1, 1.0, -1.0)).expand_as(x)
    return -(by.e(x_adv) - by.e(pattern)).square().mean()


def pid(by, x, x_adv):
    clean, moved = (by.vae.encode(picture).latent_dist for picture in (x, x_adv))
    return F.mse_loss(moved.mean, clean.mean) + F.mse_loss(moved.var.log(), clean.var.log())


def editshield(by, x, x_adv):
    ways = [transforms.crop, transforms.soften, transforms.rotate]
    return sum((by.e(way(x_adv, [by.generator])) - by.e(x)).square().mean() / 3 for way in ways)


def dim(by, x, x_adv):
    y = by.d(by.e(x_adv)).clamp(-1, 1)
    g, w = [by.generator], WINDOW
    ways = [
        lambda y: transforms.light(transforms.mirror(transforms.resize(y, g, w), g, w), g),
        lambda y: transforms.shift(transforms.rotate(y, g, w), g, w),
        lambda y: transforms.soften(transforms.mirror(transforms.resize(y, g, w), g, w), g),
    ]
    return -sum(similarity(way(y))[0] / 4 for way in (*ways, ways[0]))


def wide(by, x, x_adv):
    y = by.d(by.e(x_adv)).clamp(-1, 1)
    g, w = [by.generator], WINDOW

    def look(y, other):
        return transforms.hide(other(transforms.pose(y, g, w), g), g, w)

    return -sum(similarity(look(y, other))[0] / 2 for other in (transforms.grain, transforms.soften))


def cw(by, x, x_adv, f):
    return -((x_adv - x).square().sum() / 4 + 0.03 * f)


def rows_apart(z, z0):
    return ((z - z0).square().sum(dim=3) + 1e-8).sqrt().sum()


def facelock(by, x, x_adv, lpips_on=1, face_on=1):
    z = by.e(x_adv)
    y = by.d(z).clamp(-1, 1)
    return 0.2 * (z - by.e(x)).square().mean() + lpips_on * distance(y)[0] - face_on * similarity(y)[0]


EQUATIONS = {
    "noise": lambda by, x, x_adv: 0 * x_adv.sum(),
    "encoder": lambda by, x, x_adv: -by.e(x_adv).norm(),
    "encoder untargeted": lambda by, x, x_adv: (by.e(x_adv) - by.e(x)).square().mean(),
    "vae": lambda by, x, x_adv: -by.d(by.e(x_adv)).norm(),
    "cw": lambda by, x, x_adv: cw(by, x, x_adv, -rows_apart(by.e(x_adv), by.e(x))),
    "cw targeted": lambda by, x, x_adv: cw(by, x, x_adv, by.e(x_adv).norm()),
    "facelock": facelock,
    "facelock-dim": dim,
    "facelock-wide": wide,
    "facelock-wash": lambda by, x, x_adv: wide(by, x, transforms.jpeg(x_adv, [by.generator])),
    "photoguard": photoguard,
    "advdm": lambda by, x, x_adv: by.error(x_adv).square().mean(),
    "sds": lambda by, x, x_adv: -(by.error(x_adv) * by.e(x_adv)).mean(),
    "mist": mist,
    "pid": pid,
    "editshield": editshield,
    "diffusionguard": lambda by, x, x_adv: by.eps(by.normal(), 999, by.e(x_adv)).norm(),
    "blurguard": lambda by, x, x_adv: -by.e(x_adv).norm(),
    "dctshield": lambda by, x, x_adv: -by.e(x_adv).norm(),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_objective_is_its_equation(case, vae, editor):
    x = image()
    x_adv = random_start(x, 0.1, [1, 2])
    found = value(case, x, x_adv, vae, editor)
    for i, seed in enumerate(SEEDS):
        expected = EQUATIONS[case](By(vae, editor, seed), x[i : i + 1], x_adv[i : i + 1])
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("t", "lpips_on", "face_on"),
    [(0.0, 0, 0), (0.25, 0, 0), (0.2501, 1, 0), (0.3499, 1, 0), (0.35, 1, 1), (0.99, 1, 1)],
)
def test_facelocks_terms_join_one_after_another(t, lpips_on, face_on, vae, editor):
    x = image(1)
    x_adv = random_start(x, 0.1, [1])
    expected = facelock(By(vae, editor, 5), x, x_adv, lpips_on, face_on)
    torch.testing.assert_close(value("facelock", x, x_adv, vae, editor, t)[0], expected)


def test_sdss_gradient_is_the_denoisers_error(vae, editor):
    """With respect to the latent, with nothing of the network's own derivative; turned by `targeted`."""
    x = image()
    for targeted, sign in ((True, -1), (False, 1)):
        x_adv = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(value("sds", x, x_adv, vae, editor, targeted=targeted).sum(), x_adv)
        z = vae.encode(x_adv).latent_dist.mean
        errors = torch.cat([By(vae, editor, seed).error(x[i : i + 1]) for i, seed in enumerate(SEEDS)])
        (expected,) = torch.autograd.grad(z, x_adv, sign * errors / z[0].numel())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["noise", "encoder", "vae", "cw", "facelock"])
def test_budget_range_and_dtype(name, dtype, editor):
    """Also from black and white, where cw's tanh has no inverse, and float32 few numbers."""
    x = (2 * image(2)).clamp(-1, 1).to(dtype)
    x[1] = x[1].sign()
    run = Run(budget=0.008, step_size=0.008, num_iters=3)
    out = METHODS[name].protect(x, run, **offers(name, tiny.tiny_vae(dtype=dtype), editor))
    assert out.dtype == dtype and not out.requires_grad and out.abs().max() <= 1
    change = (out - x).abs().amax(dim=(1, 2, 3))
    assert change.max() <= 0.008 + (1e-12 if dtype == torch.float64 else 2e-7) and change.min() > 0.004


@pytest.mark.parametrize("name", methods_for(InstructPix2Pix))
def test_a_batch_is_one_by_one(name, vae, editor):
    """Whatever the order, too."""
    x = image(3)
    start, seeds = random_start(x, 0.05, [3, 1, 4]), [7, 8, 9]

    def protect(numbers):
        run = Run(budget=0.05, num_iters=2, start=start[numbers])
        given = offers(name, vae, editor, [seeds[i] for i in numbers])
        return METHODS[name].protect(x[numbers], run, **given)

    together = protect([0, 1, 2])
    torch.testing.assert_close(protect([2, 0])[[1, 0]], together[[0, 2]], rtol=0, atol=1e-10)


def test_eot_is_the_mean_of_what_its_ways_give():
    x = image()
    objective = eot(lambda picture, t: t * similarity(picture), "light+mirror,none", generators(), 3)
    for i, seed in enumerate(SEEDS):
        (generator,), one = generators([seed]), x[i : i + 1]
        first = similarity(transforms.mirror(transforms.light(one, [generator]), [generator]))
        third = similarity(transforms.mirror(transforms.light(one, [generator]), [generator]))
        expected = 0.5 * (first + similarity(one) + third) / 3
        again = eot(lambda picture, t: t * similarity(picture), "light+mirror,none", generators([seed]), 3)
        torch.testing.assert_close(again(one, 0.5), expected)
    assert objective(x, 0.5).shape == (2,)


@pytest.mark.parametrize("name", methods_for(InstructPix2Pix))
def test_a_mask_is_each_pixels_share_of_the_budget(name, vae, editor):
    x = image()
    mask = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    mask[:, :, :4] = 0
    mask[:, :, 4:8] = 1
    run = Run(budget=0.1, step_size=0.05, num_iters=2)
    out = METHODS[name].protect(x, run, mask, **offers(name, vae, editor))
    change = (out - x).abs()
    assert (change <= 0.1 * mask + 1e-12).all() and (change[:, :, 4:8] > 0.02).any()
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    clean = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    saved = to_uint8_within(clean + (out - x), pixels, 0.1, mask)
    levels = np.abs(saved.astype(int) - pixels)
    assert (levels * 2 / 255 <= 0.1 * mask.permute(0, 2, 3, 1).numpy() + 1e-9).all() and levels.max() > 2


# ---------------------------------------------------------------------------------------------------------
# the loops


@pytest.mark.parametrize("sign", [1, -1])
def test_pgd_goes_along_the_sign_by_falling_steps(sign):
    x = image(1, 4, reach=0.1)
    slope = sign * torch.where(tiny.noise(1, 3, 4, 4, seed=2) > 0, 1e-9, -1e9).to(x)
    run = Run(budget=0.5, step_size=0.1, num_iters=4, start=x)
    out = pgd(x, lambda x_adv, t: (slope * x_adv).sum(dim=(1, 2, 3)), run)
    moved = 0.1 * (1 + 0.7525 + 0.505 + 0.2575)
    torch.testing.assert_close(out, x + moved * slope.sign(), rtol=0, atol=1e-12)


def slopes() -> tuple[torch.Tensor, Objective]:
    """Two images at 0, and an objective with a slope at two of their pixels, a millionth in the second."""
    x = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    slope = torch.zeros_like(x)
    slope[:, :, 8, 4], slope[:, :, 8, 12] = 1.0, -3.0  # of mean size 2 where it isn't 0
    slope[1] *= 1e-6
    return slope, lambda x_adv, t: (slope[: len(x_adv)] * x_adv).sum(dim=(1, 2, 3))


def test_sized_pgds_steps_have_the_gradients_size():
    """Cut at its mean, which is of each image and of where it is not 0."""
    slope, objective = slopes()
    x = torch.zeros_like(slope)
    out = sized_pgd(x, objective, Run(budget=0.5, step_size=0.1, num_iters=1, start=x))
    torch.testing.assert_close(out, 0.1 * (slope / slope.abs().amax((1, 2, 3), True) * 1.5).clamp(-1, 0.5))


def test_l2_pgd_goes_along_the_gradient_to_the_balls_border():
    """From the image; the root mean square is of where something changes, and each image has its own."""
    slope, objective = slopes()
    x = torch.zeros_like(slope)
    direction = slope / slope.abs().amax((1, 2, 3), True) * 3 / 5**0.5  # of root mean square 1 at its pixels
    run = Run(budget=0.5, step_size=0.1, num_iters=1, rms=0.3, start=x + 0.5)
    torch.testing.assert_close(l2_pgd(x, objective, run), 0.1 * direction)
    torch.testing.assert_close(l2_pgd(x, objective, replace(run, num_iters=9)), 0.3 * direction)
    torch.testing.assert_close(l2_pgd(x[1:], lambda u, t: objective(u, t) * 1e-6, run), 0.1 * direction[1:])


def test_a_gradient_too_small_for_float16_still_counts():
    x = torch.zeros(1, 3, 4, 4)
    run = Run(budget=0.5, step_size=0.1, num_iters=1, start=x)
    out = pgd(x, lambda x_adv, t: (x_adv.half() * 2e-8).sum(dim=(1, 2, 3)), run)
    assert torch.equal(out, torch.full_like(x, 0.1))


@pytest.mark.parametrize("name", ["noise", "encoder", "cw"])
def test_a_bad_image_or_budget_is_refused(name, vae, editor):
    given = offers(name, vae, editor)
    for bad in (
        torch.zeros(3, 32, 32),
        torch.zeros(1, 32, 32, 3),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.full((1, 3, 32, 32), 1.01),
        torch.full((1, 3, 32, 32), float("nan")),
    ):
        with pytest.raises(ValueError, match="image must be"):
            METHODS[name].protect(bad, Run(), **given)
    for budget in (0, -0.03, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            METHODS[name].protect(image(), Run(budget=budget), **given)


@pytest.mark.parametrize("loop", [pgd, adam])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("at", "num_iters"), [(0, 1), (0, 40), (12, 13), (19, 40), (35, 36)])
def test_gradient_not_finite(loop, value, at, num_iters):
    """In one image, in one iteration, even the last one; and a long run ends soon after it."""
    seen = []

    def objective(x_adv, t):
        factor = torch.ones(2, dtype=x_adv.dtype)
        factor[1] = value if t == at / num_iters else 1.0
        return (x_adv.sum(dim=(1, 2, 3)) + 100) * factor

    run = Run(num_iters=num_iters, callback=lambda i, values: seen.append(i))
    with pytest.raises(GradientError, match="NaN or infinite"):
        loop(image(2, side=4), objective, run)
    assert len(seen) < at + CHECK_EVERY


def test_a_gradient_that_is_zero_everywhere_warns():
    x = image(2, side=8)
    start = random_start(x, 0.03, [1, 2])
    start[1] = x[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own way: a line of code warns once
        out = pgd(x, lambda x_adv, t: (x_adv - x).square().sum(dim=(1, 2, 3)), Run(num_iters=25, start=start))
    (warning,) = caught
    assert warning.category is RuntimeWarning and "zero everywhere" in str(warning.message)
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], start[0])


# ---------------------------------------------------------------------------------------------------------
# masks.py: in [0, 1], soft, of the clean image and its boxes alone


BOXES = [[(10, 20, 30, 60)], [(0, 0, 12, 12), (40, 40, 64, 64)]]


def portraits() -> torch.Tensor:
    return torch.cat([to_tensor(tiny.portrait(64, seed=seed)) for seed in (1, 2)])


@pytest.mark.parametrize("kind", BUDGET_MASKS)
def test_a_mask_is_soft_and_its_images_own(kind):
    x = portraits()
    mask = budget_mask(x, BOXES, kind)
    if kind == "none":
        assert mask is None
        return
    assert mask.shape == (2, 1, 64, 64) and mask.dtype == x.dtype
    assert mask.min() >= 0 and mask.max() <= 1 and mask.max() > 0.9
    assert ((mask > 0.05) & (mask < 0.95)).any()
    if "+" in kind:
        assert torch.equal(mask, face_mask(x, BOXES) * texture_mask(x))
    for i in range(2):
        assert torch.equal(budget_mask(x[i : i + 1], BOXES[i : i + 1], kind)[0], mask[i])


def test_a_face_is_whole_and_falls_off_around_it():
    mask = face_mask(portraits(), BOXES)
    for i, faces in enumerate(BOXES):
        for x0, y0, x1, y1 in faces:
            assert (mask[i, 0, y0:y1, x0:x1] == 1).all()
    row = mask[0, 0, 40]
    assert (row[30:34].diff() < 0).all() and (row[34:] == 0).all()  # a fifth of 20 px
    assert row[30] == pytest.approx((1 + np.cos(np.pi * 0.5 / (FACE_EDGE * 20))) / 2)
    assert (mask[1, 0, :, 18:30] == 0).all()


def test_texture_is_the_local_deviation():
    """Around each pixel 3x3, of what is left when the mean around each has been taken away."""
    x = portraits()
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
