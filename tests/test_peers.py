"""methods.py: the peers' objectives and those through random transforms, by their equations, in float64.

Each statement of an equation is written here anew, of the tiny networks themselves; draws are repeated from
the seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import transforms
from images import to_uint8_within
from loops import Run, random_start
from methods import METHODS, NEED, eot
from models.denoiser import Denoiser
from models.editors import InstructPix2Pix
from protection import methods_for

torch.set_num_threads(1)

SCALE = 0.18215
SEEDS = [5, 6]
WINDOW = transforms.Window(torch.tensor([[0.1, -0.2]]).double(), torch.tensor([[0.7, 0.7]]).double())
OF_THE_EDITOR = ["photoguard", "advdm", "sds", "diffusionguard"]
DRAWN = ["facelock-dim", "facelock-wide", "facelock-wash", *OF_THE_EDITOR, "editshield"]
PEERS = [*DRAWN, "mist", "pid", "blurguard", "dctshield"]
every_peer = pytest.mark.parametrize("name", PEERS)


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


def offers(name, vae, editor, seeds=SEEDS, **knobs):
    there = {"vae": vae, "editor": Denoiser(editor), "generators": generators(seeds), "face_window": WINDOW}
    there["face_similarity"] = there["perceptual_distance"] = similarity
    needs = [key for key, default in METHODS[name].parameters.items() if default is NEED]
    return {need: there[need] for need in needs} | knobs


def value(name, x, x_adv, vae, editor, seeds=SEEDS, **knobs):
    return METHODS[name].objective(x, **offers(name, vae, editor, seeds, **knobs))(x_adv, 0.5)


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


EQUATIONS = {
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


@every_peer
def test_objective_is_its_equation(name, vae, editor):
    x = image()
    x_adv = random_start(x, 0.1, [1, 2])
    found = value(name, x, x_adv, vae, editor)
    for i, seed in enumerate(SEEDS):
        expected = EQUATIONS[name](By(vae, editor, seed), x[i : i + 1], x_adv[i : i + 1])
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)


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


# ---------------------------------------------------------------------------------------------------------
# what holds for all


@every_peer
def test_objective_rises(name, vae, editor):
    """With the same draws each time; of sds, by how much the latent moves against the first error."""
    x = image()

    def objective(x_adv, t):
        return value(name, x, x_adv, vae, editor)

    run = Run(budget=0.1, step_size=0.005, num_iters=3, start=random_start(x, 0.02, [1, 2]))
    begin, out = (METHODS[name].loop(x, objective, replace(run, num_iters=n)) for n in (0, run.num_iters))
    rise = objective(out, 0) - objective(begin, 0)
    if name == "sds":
        errors = torch.cat([By(vae, editor, seed).error(begin[i : i + 1]) for i, seed in enumerate(SEEDS)])
        moved = vae.encode(out).latent_dist.mean - vae.encode(begin).latent_dist.mean
        rise = -(errors * moved).mean(dim=(1, 2, 3))
    assert (rise > 0).all()


@every_peer
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


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_the_generators_alone(name, vae, editor):
    x = image()
    torch.manual_seed(1)
    first = value(name, x, x, vae, editor)
    torch.manual_seed(2)
    assert torch.equal(value(name, x, x, vae, editor), first)
    assert (value(name, x, x, vae, editor, [8, 9]) != first).all()
    objective = METHODS[name].objective(x, **offers(name, vae, editor))
    assert (objective(x, 0.0) != objective(x, 0.0)).all()  # drawn anew each time


def test_img2img_has_a_gradient_too(vae):
    editor = tiny.tiny_editor(False, "v_prediction", torch.float64)
    x = image()
    for name in OF_THE_EDITOR:
        x_adv = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(name, x, x_adv, vae, editor).sum(), x_adv)
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


# ---------------------------------------------------------------------------------------------------------
# eot, masks and the loops


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


def test_eots_ways_take_turns_over_the_calls():
    """Also with fewer samples than there are."""
    x = image(1)
    objective = eot(lambda picture, t: similarity(picture), "none,light,mirror+light", generators([1]), 1)
    same = [torch.equal(objective(x, 0.0), similarity(x)) for _ in range(6)]
    assert same == [True, False, False] * 2


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


def test_no_mask_and_a_full_one_are_the_same(vae):
    x = image()
    run = Run(num_iters=3)
    plain = METHODS["encoder"].protect(x, run, vae=vae)
    full = METHODS["encoder"].protect(x, run, torch.ones(2, 1, 32, 32).double(), vae=vae)
    torch.testing.assert_close(full, plain, rtol=0, atol=1e-12)


def test_blurguards_change_is_smooth(vae):
    x = transforms.blur(image(), 9, 2.0)
    run = Run(budget=0.05, num_iters=5)
    rough, smooth = (METHODS[name].protect(x, run, vae=vae) - x for name in ("encoder", "blurguard"))

    def roughness(change):
        return (change.diff(dim=-1).square().mean() / change.square().mean()).item()

    assert roughness(smooth) < 0.5 * roughness(rough)
