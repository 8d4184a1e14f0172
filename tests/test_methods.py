"""methods.py: budget, equations, schedules, loops and errors, and one-step values worked out by hand."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_vae

from loops import (
    CHECK_EVERY,
    GradientError,
    Objective,
    Run,
    adam,
    l2_pgd,
    pgd,
    random_start,
    sized_pgd,
)
from methods import METHODS, NEED
from models.faces import BoxCrop
from models.perceptual import perceptual_distance_to
from models.recognizers import Recognizer, face_similarity_to

torch.set_num_threads(1)

BUDGET = 0.03
CASES = {  # test id -> (method, its knobs)
    "noise": ("noise", {}),
    "encoder": ("encoder", {}),
    "encoder-untargeted": ("encoder", {"targeted": False}),
    "vae": ("vae", {}),
    "cw": ("cw", {}),
    "cw-targeted": ("cw", {"targeted": True}),
    "facelock": ("facelock", {}),
}
ITERATIVE = [case for case in CASES if case != "noise"]
RUN_FIELDS = {field.name for field in dataclasses.fields(Run)}
every_case = pytest.mark.parametrize("case", CASES)
every_iterative_case = pytest.mark.parametrize("case", ITERATIVE)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def image(batch=1, side=32, dtype=torch.float64, seed=1, reach=1.0):
    """Draws a random image; its values go up to +-reach, and some are exactly that."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand((batch, 3, side, side), generator=generator, dtype=torch.float64)
    return ((2 * draw - 1) * 1.1).clamp(-1, 1).mul(reach).to(dtype)


def offers(case, x, vae, closures=None, **knobs):
    """Gives what the objective of a case takes beside x: its needs, from what there is, and its knobs.

    closures: (face_similarity, perceptual_distance) instead of the toy networks'.
    """
    name, own = CASES[case]
    there = {"vae": vae}
    if name == "facelock":
        there["face_similarity"], there["perceptual_distance"] = closures or toy_closures(x)
    needs = [key for key, default in METHODS[name].parameters.items() if default is NEED]
    return {need: there[need] for need in needs} | own | knobs


def objective_of(case, x, vae, closures=None, **knobs):
    return METHODS[CASES[case][0]].objective(x, **offers(case, x, vae, closures, **knobs))


def protect(case, x, vae, closures=None, **more):
    """Runs a case; more: fields of Run (budget 0.03 and 3 iterations unless given) and knobs."""
    fields = {"budget": BUDGET, "num_iters": 3, **{key: more.pop(key) for key in RUN_FIELDS & set(more)}}
    return METHODS[CASES[case][0]].protect(x, Run(**fields), **offers(case, x, vae, closures, **more))


class Linear:
    """A VAE to calculate with: E mixes the three channels of each pixel by a matrix, D by another one."""

    def __init__(self, encoder=None, decoder=None, dtype=torch.float64):
        self.encoder = torch.as_tensor(ENCODER if encoder is None else encoder, dtype=dtype)
        self.decoder = torch.as_tensor(DECODER if decoder is None else decoder, dtype=dtype)
        self.encoded, self.decoded = [], []  # the input of each call

    def encode(self, x):
        self.encoded.append(x)
        mean = torch.einsum("ck,bkhw->bchw", self.encoder, x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))

    def decode(self, z):
        self.decoded.append(z)
        return SimpleNamespace(sample=torch.einsum("ck,bkhw->bchw", self.decoder, z))


ENCODER = np.array([[0.9, -0.4, 0.2], [0.3, 0.7, -0.6], [-0.5, 0.1, 1.1]])
DECODER = np.array([[1.2, 0.3, -0.7], [-0.2, 0.8, 0.4], [0.6, -0.9, 1.0]])


class Counting:
    """A network that remembers its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, images):
        self.calls.append(images)
        return self.function(images)


def toy_networks(dtype):
    """Makes a recogniser and an LPIPS without trained weights, whose calls are recorded."""
    weights = torch.randn(5, 3 * 8 * 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    recognizer = Recognizer(
        name="toy",
        network=Counting(lambda crops: crops.flatten(1) @ weights.to(crops).T),
        crop=BoxCrop(8),
        mean=torch.zeros(1, 3, 1, 1),
        std=torch.ones(1, 3, 1, 1),
        dtype=dtype,
    )
    net = Counting(lambda images: [images, torch.nn.functional.avg_pool2d(images, 4)])
    net.parameters = lambda: iter([torch.zeros(1, dtype=dtype)])
    return recognizer, SimpleNamespace(net=net, scaling_layer=lambda images: images * 0.5, lpips=False)


def toy_closures(x, networks=None):
    """Makes (face_similarity, perceptual_distance) to x as protection.py does, from the toy networks."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    recognizer, perceptual = networks or toy_networks(x.dtype)
    boxes = [[(0, 0, x.shape[3], x.shape[2])]] * len(x)
    return face_similarity_to([recognizer], x, boxes), perceptual_distance_to(perceptual, x)


@pytest.fixture(scope="module")
def vaes():
    """The tiny random VAE in both dtypes."""
    return {dtype: tiny_vae(dtype=dtype) for dtype in (torch.float32, torch.float64)}


# ---------------------------------------------------------------------------------------------------------
# what holds for every method


@every_case
@both_dtypes
@pytest.mark.parametrize("budget", [0.008, 0.1])
def test_budget_range_and_dtype(case, dtype, budget, vaes):
    x = image(2, dtype=dtype)
    out = protect(case, x, vaes[dtype], budget=budget, step_size=budget)
    assert out.dtype == dtype and out.shape == x.shape and not out.requires_grad
    assert (out - x).abs().max() <= budget + (1e-12 if dtype == torch.float64 else 2e-7)
    assert out.abs().max() <= 1
    assert (out - x).abs().amax(dim=(1, 2, 3)).min() > 0.5 * budget


@every_case
def test_inputs_are_left_alone(case):
    vae = tiny_vae().requires_grad_(True)
    x = image(dtype=torch.float32)
    start = random_start(x, BUDGET, [4])
    before = x.clone(), start.clone()
    protect(case, x, vae, num_iters=2, start=start)
    assert torch.equal(x, before[0]) and torch.equal(start, before[1])
    assert not x.requires_grad and not start.requires_grad
    assert all(parameter.grad is None for parameter in vae.parameters())


@every_case
def test_depends_on_start_alone(case, vaes):
    x = image(2, dtype=torch.float32)
    vae = vaes[x.dtype]
    default = protect(case, x, vae)
    torch.manual_seed(99)
    assert torch.equal(default, protect(case, x, vae, start=random_start(x, BUDGET, [0, 0])))
    assert not torch.equal(default, protect(case, x, vae, start=random_start(x, BUDGET, [1, 2])))


@every_case
def test_batch_is_one_by_one(case, vaes):
    x = image(3)
    start = random_start(x, BUDGET, [3, 1, 4])
    together = protect(case, x, vaes[x.dtype], start=start)
    alone = [protect(case, x[i : i + 1], vaes[x.dtype], start=start[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)


@every_case
def test_float16_image_is_optimised_in_float32(case, vaes):
    x = image(dtype=torch.float16)
    out = protect(case, x, vaes[torch.float32])
    assert out.dtype == torch.float32
    assert torch.equal(out, protect(case, x.float(), vaes[torch.float32]))


@every_iterative_case
def test_callback_gets_the_iteration_and_the_objective(case, vaes):
    seen = []
    x = image(2)
    start = random_start(x, 0.01, [1, 2])
    how = {"num_iters": 4, "start": start, "callback": lambda i, values: seen.append((i, values))}
    protect(case, x, vaes[x.dtype], **how)
    assert [i for i, _ in seen] == [0, 1, 2, 3] and not torch.equal(seen[0][1], seen[3][1])
    expected = objective_of(case, x, vaes[x.dtype])(start, 0.0)
    torch.testing.assert_close(seen[0][1], expected, rtol=1e-3 if case == "cw" else 1e-6, atol=1e-6)
    assert not seen[0][1].requires_grad


@every_iterative_case
def test_clean_image_is_encoded_at_most_once(case):
    vae = Linear()
    protect(case, image(side=8), vae, num_iters=5)
    never = case in ("encoder", "vae")
    assert 5 <= len(vae.encoded) <= (5 if never else 6)


# ---------------------------------------------------------------------------------------------------------
# the equations, in numpy and float64: values


def mix(matrix, values):
    return np.einsum("ck,bkhw->bchw", matrix, values)


def norm(values):
    return np.sqrt((values**2).sum(axis=(1, 2, 3)))


def cw_equation(x_adv, x, f, c=0.03):
    return -((((x_adv - x) / 2) ** 2).sum(axis=(1, 2, 3)) + c * f)


def rows_apart(z, z0):
    return np.sqrt(((z - z0) ** 2).sum(axis=3) + 1e-8).sum(axis=(1, 2))


EQUATIONS = {  # case -> its objective where E and D are the matrices above, (B,)
    "noise": lambda x_adv, x: np.zeros(len(x)),
    "encoder": lambda x_adv, x: -norm(mix(ENCODER, x_adv)),
    "encoder-untargeted": lambda x_adv, x: (mix(ENCODER, x_adv - x) ** 2).mean(axis=(1, 2, 3)),
    "vae": lambda x_adv, x: -norm(mix(DECODER, mix(ENCODER, x_adv))),
    "cw": lambda x_adv, x: cw_equation(x_adv, x, -rows_apart(mix(ENCODER, x_adv), mix(ENCODER, x))),
    "cw-targeted": lambda x_adv, x: cw_equation(x_adv, x, norm(mix(ENCODER, x_adv))),
}


def two_images(side=8):
    """Draws a clean image and another one in its ball, as tensors and as arrays."""
    x = image(3, side=side)
    x_adv = random_start(x, 0.2, [1, 2, 3])
    return x, x_adv, x.numpy(), x_adv.numpy()


@pytest.mark.parametrize("t", [0.0, 0.5])
@pytest.mark.parametrize("case", EQUATIONS)
def test_objective_is_its_equation(case, t):
    x, x_adv, x_np, x_adv_np = two_images()
    value = objective_of(case, x, Linear())(x_adv, t)
    np.testing.assert_allclose(value.numpy(), EQUATIONS[case](x_adv_np, x_np), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("t", "lpips_on", "face_on"),
    [(0.0, 0, 0), (0.25, 0, 0), (0.2501, 1, 0), (0.3499, 1, 0), (0.35, 1, 1), (0.99, 1, 1)],
)
def test_facelock_is_its_equation(t, lpips_on, face_on):
    """With mean and maximum for the two networks, of a y that is clipped."""
    x, x_adv, x_np, x_adv_np = two_images()
    closures = (lambda y: y.mean(dim=(1, 2, 3)), lambda y: (y + 3).amax(dim=(1, 2, 3)))
    value = objective_of("facelock", x, Linear(), closures)(x_adv, t)
    latent = (mix(ENCODER, x_adv_np - x_np) ** 2).mean(axis=(1, 2, 3))
    y = np.clip(mix(DECODER, mix(ENCODER, x_adv_np)), -1, 1)
    expected = 0.2 * latent + lpips_on * (y + 3).max(axis=(1, 2, 3)) - face_on * y.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# where the loops lead


@every_iterative_case
def test_objective_improves(case, vaes):
    x = image(2)
    vae = vaes[x.dtype]
    start = random_start(x, 0.01, [1, 2])
    out = protect(case, x, vae, num_iters=5, budget=0.05, start=start, lr=0.005)
    objective = objective_of(case, x, vae)
    assert (objective(out, 0.99) > objective(start, 0.99)).all()


# ---------------------------------------------------------------------------------------------------------
# facelock's schedule


def test_facelocks_bounds_are_exact_for_every_number_of_iterations():
    """LPIPS joins at i > 0.25 N, the face at i >= 0.35 N, which may be rounded to the wrong side of a whole
    number. Until then nothing is decoded.
    """
    called, vae = set(), Linear()

    def closure(name):
        return lambda y: called.add(name) or y.mean(dim=(1, 2, 3))

    x = image(side=2)
    objective = objective_of("facelock", x, vae, (closure("face"), closure("perceptual")))
    for n in range(1, 301):
        for name, first in (("perceptual", n // 4 + 1), ("face", -(-35 * n // 100))):
            for i in (first - 1, first):
                called.clear()
                vae.decoded.clear()
                objective(x, i / n)
                assert (name in called) == (i == first), (n, i)
                assert bool(vae.decoded) == bool(called)


def test_facelock_never_embeds_the_clean_image_again():
    """The networks see B images for the reference, and then B, not 2 B, each time the term is on."""
    x = image(2, side=8)
    recognizer, perceptual = toy_networks(x.dtype)
    protect("facelock", x, Linear(), toy_closures(x, (recognizer, perceptual)), num_iters=20)
    for calls, times_on in ((recognizer.network.calls, 13), (perceptual.net.calls, 14)):
        assert [len(images) for images in calls] == [2] * (1 + times_on)
        assert [images.requires_grad for images in calls] == [False] + [True] * times_on


# ---------------------------------------------------------------------------------------------------------
# the parts


@pytest.mark.parametrize("sign", [1, -1])
def test_pgd_goes_along_the_sign_by_falling_steps(sign):
    x = image(side=4, reach=0.1)
    slope = sign * torch.where(image(side=4, seed=2) > 0, 1e-9, -1e9).to(x)
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


def test_l2_pgd_keeps_the_budget_and_its_steps_fall():
    x = torch.zeros(1, 3, 8, 8)
    run = Run(budget=0.05, step_size=0.02, num_iters=4, rms=1)
    seen = []

    def objective(x_adv, t):
        seen.append(x_adv[0, 0, 0, 0].item())
        return x_adv.sum(dim=(1, 2, 3))

    out = l2_pgd(x, objective, run)
    assert np.diff(seen) == pytest.approx([0.02, 0.02 * 0.7525, 0.02 * 0.505], abs=1e-6)
    assert torch.equal(out, torch.full_like(x, 0.05))


def test_a_gradient_too_small_for_float16_still_counts():
    x = torch.zeros(1, 3, 4, 4)
    run = Run(budget=0.5, step_size=0.1, num_iters=1, start=x)
    out = pgd(x, lambda x_adv, t: (x_adv.half() * 2e-8).sum(dim=(1, 2, 3)), run)
    assert torch.equal(out, torch.full_like(x, 0.1))


def test_adam_takes_any_objective():
    """It leads to the objective's maximum where that is inside the budget, and to the border else."""
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    goal = torch.tensor([0.02, 0.2], dtype=x.dtype).view(2, 1, 1, 1).expand_as(x)
    run = Run(budget=0.05, num_iters=300, start=x)
    out = adam(x, lambda x_adv, t: -(x_adv - goal).square().sum(dim=(1, 2, 3)), run)
    torch.testing.assert_close(out, goal.clamp(max=0.05), rtol=0, atol=1e-6)


def test_random_start_is_uniform_in_the_ball():
    x = image(side=64, reach=0.5)
    offset = (random_start(x, 0.1, [0]) - x) / 0.1
    assert offset.abs().max() <= 1 + 1e-12
    ordered = offset.flatten().sort().values
    uniform = torch.linspace(-1, 1, len(ordered), dtype=x.dtype)
    assert (ordered - uniform).abs().max() < 0.05


def test_random_start_depends_on_the_seed_alone():
    x = image(2)
    torch.manual_seed(1)
    together = random_start(x, BUDGET, [3, 4])
    torch.manual_seed(2)
    assert torch.equal(together[1:], random_start(x[1:], BUDGET, [4]))
    assert not torch.equal(*(random_start(x[:1], BUDGET, [seed]) for seed in (3, 4)))
    single = random_start(x.float(), BUDGET, [3, 4])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), together, rtol=0, atol=2e-7)


# ---------------------------------------------------------------------------------------------------------
# errors and warnings


@pytest.mark.parametrize("case", ["noise", "encoder", "encoder-untargeted", "cw", "facelock"])
@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 8, 8, 3),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.full((1, 3, 8, 8), 1.01),
        torch.full((1, 3, 8, 8), -2.0),
        torch.full((1, 3, 8, 8), float("nan")),
    ],
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}-{x.flatten()[0]}",
)
def test_bad_image(case, bad):
    closures = (lambda y: y.sum((1, 2, 3)),) * 2
    with pytest.raises(ValueError, match="image must be"):
        protect(case, bad, Linear(dtype=torch.float32), closures)


@pytest.mark.parametrize("budget", [0, -0.03, float("nan")])
@every_case
def test_bad_budget(case, budget):
    with pytest.raises(ValueError, match="budget"):
        protect(case, image(side=8), Linear(), budget=budget)


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

    run = Run(BUDGET, num_iters=num_iters, callback=lambda i, values: seen.append(i))
    with pytest.raises(GradientError, match="NaN or infinite"):
        loop(image(2, side=4), objective, run)
    assert len(seen) < at + CHECK_EVERY


def test_gradient_zero_everywhere_warns():
    x = image(2, side=8)
    start = random_start(x, BUDGET, [1, 2])
    start[1] = x[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own way: a line of code warns once
        out = protect("encoder-untargeted", x, Linear(), num_iters=25, start=start)
    (warning,) = caught
    assert warning.category is RuntimeWarning and "zero everywhere" in str(warning.message)
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], start[0])


@pytest.mark.parametrize("case", ["cw", "cw-targeted"])
def test_cw_from_black_and_white(case):
    """At -1 and 1 tanh has no inverse, and in float32 its neighbours are far apart."""
    x = image(side=8, dtype=torch.float32).sign()
    x[0, 0, 0, :4] = 0
    out = protect(case, x, Linear(dtype=torch.float32), num_iters=20, start=x)
    assert out.isfinite().all()
    assert (out - x).abs().max() <= BUDGET + 2e-7
    assert not torch.equal(out, x)
