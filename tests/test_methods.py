"""The defenses: budget, objectives, schedules and errors, and one-step values worked out by hand."""

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_vae

import methods
import models
from methods import METHODS, GradientError, pgd, project, random_start, step_size_at
from utils import METHOD_NAMES

torch.set_num_threads(1)

BUDGET = 0.03
CASES = {  # test id -> (method, its own keywords)
    "noise": ("noise", {}),
    "encoder": ("encoder", {}),
    "encoder-untargeted": ("encoder", {"targeted": False}),
    "vae": ("vae", {}),
    "cw": ("cw", {}),
    "cw-targeted": ("cw", {"targeted": True}),
    "facelock": ("facelock", {}),
}
ITERATIVE = [case for case in CASES if case != "noise"]
every_case = pytest.mark.parametrize("case", CASES)
every_iterative_case = pytest.mark.parametrize("case", ITERATIVE)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def image(batch=1, side=32, dtype=torch.float64, seed=1, reach=1.0):
    """A random image; its values go up to +-reach, and some are exactly that."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand((batch, 3, side, side), generator=generator, dtype=torch.float64)
    return ((2 * draw - 1) * 1.1).clamp(-1, 1).mul(reach).to(dtype)


def run(case, x, vae, *, num_iters=3, budget=BUDGET, closures=None, **more):
    """Calls a case's method with the keywords that its signature names, as defend.protect does."""
    name, own = CASES[case]
    offers = {"vae": vae, "budget": budget, "step_size": 0.01, "num_iters": num_iters, **own, **more}
    takes = inspect.signature(METHODS[name]).parameters
    if "face_similarity" in takes:
        offers["face_similarity"], offers["perceptual_distance"] = closures or toy_closures(x)
    return METHODS[name](x, **{key: value for key, value in offers.items() if key in takes})


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
    """A recogniser and an LPIPS without trained weights, whose calls are recorded."""
    weights = torch.randn(5, 3 * 8 * 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    recognizer = models.Recognizer(
        name="toy",
        network=Counting(lambda crops: crops.flatten(1) @ weights.to(crops).T),
        size=8,
        mean=torch.zeros(1, 3, 1, 1),
        std=torch.ones(1, 3, 1, 1),
        dtype=dtype,
    )
    net = Counting(lambda images: [images, torch.nn.functional.avg_pool2d(images, 4)])
    net.parameters = lambda: iter([torch.zeros(1, dtype=dtype)])
    return recognizer, SimpleNamespace(net=net, scaling_layer=lambda images: images * 0.5, lpips=False)


def toy_closures(x, networks=None):
    """(face_similarity, perceptual_distance) to x, made by models.py from the toy networks."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    recognizer, perceptual = networks or toy_networks(x.dtype)
    boxes = [[(0, 0, x.shape[3], x.shape[2])]] * len(x)
    return models.face_similarity_to(recognizer, x, boxes), models.perceptual_distance_to(perceptual, x)


@pytest.fixture(scope="module")
def vaes():
    """The tiny random VAE in both dtypes."""
    return {dtype: tiny_vae(dtype=dtype) for dtype in (torch.float32, torch.float64)}


# ---------------------------------------------------------------------------------------------------------
# what holds for every method


def test_names():
    assert tuple(METHODS) == METHOD_NAMES


@every_case
@both_dtypes
@pytest.mark.parametrize("budget", [0.008, 0.1])
def test_budget_range_and_dtype(case, dtype, budget, vaes):
    x = image(2, dtype=dtype)
    out = run(case, x, vaes[dtype], budget=budget, step_size=budget)
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
    run(case, x, vae, num_iters=2, start=start)
    assert torch.equal(x, before[0]) and torch.equal(start, before[1])
    assert not x.requires_grad and not start.requires_grad
    assert all(parameter.grad is None for parameter in vae.parameters())


@every_case
def test_depends_on_start_alone(case, vaes):
    x = image(2, dtype=torch.float32)
    vae = vaes[x.dtype]
    default = run(case, x, vae)
    torch.manual_seed(99)
    assert torch.equal(default, run(case, x, vae, start=random_start(x, BUDGET, [0, 0])))
    assert not torch.equal(default, run(case, x, vae, start=random_start(x, BUDGET, [1, 2])))


@every_case
def test_batch_is_one_by_one(case, vaes):
    x = image(3)
    start = random_start(x, BUDGET, [3, 1, 4])
    together = run(case, x, vaes[x.dtype], start=start)
    alone = [run(case, x[i : i + 1], vaes[x.dtype], start=start[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)


@every_case
def test_float16_image_is_optimised_in_float32(case, vaes):
    x = image(dtype=torch.float16)
    out = run(case, x, vaes[torch.float32])
    assert out.dtype == torch.float32
    assert torch.equal(out, run(case, x.float(), vaes[torch.float32]))


@every_case
def test_start_outside_the_budget_is_pulled_in(case, vaes):
    x = image()
    out = run(case, x, vaes[x.dtype], num_iters=1, start=-x)
    assert (out - x).abs().max() <= BUDGET + 1e-12


@every_iterative_case
def test_callback(case, vaes):
    seen = []
    x = image(2)
    run(case, x, vaes[x.dtype], num_iters=4, callback=lambda i, losses: seen.append((i, losses)))
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert all(losses.shape == (2,) and not losses.requires_grad for _, losses in seen)
    assert not torch.equal(seen[0][1], seen[3][1])


def graph_size(tensor):
    """The nodes of the autograd graph behind a tensor."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return len(seen)


@every_iterative_case
def test_graph_is_cut_at_each_step(case):
    vae = Linear()
    run(case, image(side=8), vae, num_iters=6)
    optimised = [x for x in vae.encoded if x.requires_grad]
    sizes = {graph_size(x) for x in optimised}
    assert len(optimised) == 6 and len(sizes) == 1
    assert case.startswith("cw") or all(x.is_leaf for x in optimised)


@every_iterative_case
def test_clean_image_is_encoded_at_most_once(case):
    vae = Linear()
    run(case, image(side=8), vae, num_iters=5)
    needs_z0 = case in ("encoder-untargeted", "cw", "facelock")
    assert len(vae.encoded) == 5 + needs_z0


# ---------------------------------------------------------------------------------------------------------
# objectives, evaluated here


def latent(vae, x):
    with torch.no_grad():
        return vae.encode(x).latent_dist.mean


def reconstruction(vae, x):
    with torch.no_grad():
        return vae.decode(latent(vae, x)).sample


def cw_objective(x_adv, x, vae, targeted, c=0.03):
    z, z0 = latent(vae, x_adv), latent(vae, x)
    f = z.flatten(1).norm(dim=1) if targeted else -(z - z0).norm(dim=-1).sum(dim=(1, 2))
    return ((x_adv - x) / 2).square().sum(dim=(1, 2, 3)) + c * f


OBJECTIVES = {  # case -> what the method makes smaller, (B,)
    "encoder": lambda x_adv, x, vae: latent(vae, x_adv).flatten(1).norm(dim=1),
    "encoder-untargeted": lambda x_adv, x, vae: (
        -(latent(vae, x_adv) - latent(vae, x)).square().mean((1, 2, 3))
    ),
    "vae": lambda x_adv, x, vae: reconstruction(vae, x_adv).flatten(1).norm(dim=1),
    "cw": lambda x_adv, x, vae: cw_objective(x_adv, x, vae, targeted=False),
    "cw-targeted": lambda x_adv, x, vae: cw_objective(x_adv, x, vae, targeted=True),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_objective_improves(case, vaes):
    x = image(2)
    vae = vaes[x.dtype]
    start = random_start(x, 0.01, [1, 2])
    out = run(case, x, vae, num_iters=5, budget=0.05, start=start, lr=0.005)
    objective = OBJECTIVES[case]
    assert (objective(out, x, vae) < objective(start, x, vae)).all()


@pytest.mark.parametrize("case", OBJECTIVES)
def test_callback_gets_the_objective(case, vaes):
    x = image(2)
    start = random_start(x, 0.01, [1, 2])
    losses = []
    run(case, x, vaes[x.dtype], num_iters=1, start=start, callback=lambda i, values: losses.append(values))
    sign = -1 if case == "encoder-untargeted" else 1  # the one of these that pgd maximises
    expected = sign * OBJECTIVES[case](start, x, vaes[x.dtype])
    torch.testing.assert_close(losses[0], expected, rtol=1e-3 if case == "cw" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("term", ["latent", "face", "perceptual"])
def test_facelock_pushes_away_from_the_person(term):
    """Each term alone (the others nothing, or for the latent overruled): the person gets less."""
    x = image(2, side=8, reach=0.5)
    vae = Linear()
    start = random_start(x, BUDGET, [1, 2])

    def nothing(y):
        return y.new_zeros(len(y))

    similarity, distance = toy_closures(reconstruction(vae, x).clamp(-1, 1))
    closures = {
        "latent": (nothing, nothing),
        "face": (lambda y: 100 * similarity(y), nothing),
        "perceptual": (nothing, lambda y: 100 * distance(y)),
    }[term]
    out = run("facelock", x, vae, num_iters=10, start=start, closures=closures)
    measures = {
        "latent": lambda x_adv: -(latent(vae, x_adv) - latent(vae, x)).square().mean(dim=(1, 2, 3)),
        "face": lambda x_adv: similarity(reconstruction(vae, x_adv).clamp(-1, 1)),
        "perceptual": lambda x_adv: -distance(reconstruction(vae, x_adv).clamp(-1, 1)),
    }
    assert (measures[term](out) < measures[term](start)).all()


# ---------------------------------------------------------------------------------------------------------
# facelock's schedule


@pytest.mark.parametrize(
    ("num_iters", "perceptual_from", "face_from"),
    [(1, 1, 1), (2, 1, 1), (4, 2, 2), (20, 6, 7), (100, 26, 35)],  # a term from num_iters on is never on
)
def test_facelock_schedule(num_iters, perceptual_from, face_from):
    """Decoding starts with LPIPS, at i > 0.25 N; the face joins at i >= 0.35 N; E(x) is computed once."""
    vae = Linear(dtype=torch.float32)
    x = image(2, side=8, dtype=torch.float32)
    calls = {"decode": [], "perceptual": [], "face": []}

    def now():
        return len(vae.encoded) - 2  # the first encoded image is the clean one

    def recorder(name):
        def closure(y):
            calls[name].append(now())
            assert y.abs().max() <= 1
            return y.mean(dim=(1, 2, 3))

        return closure

    decode = vae.decode
    vae.decode = lambda z: (calls["decode"].append(now()), decode(z))[1]
    closures = recorder("face"), recorder("perceptual")
    run("facelock", 0.999 * x, vae, num_iters=num_iters, closures=closures)
    assert calls == {
        "decode": list(range(perceptual_from, num_iters)),
        "perceptual": list(range(perceptual_from, num_iters)),
        "face": list(range(face_from, num_iters)),
    }


def test_facelock_never_embeds_the_clean_image_again():
    """The networks see B images for the reference, and then B, not 2 B, each time the term is on."""
    x = image(2, side=8)
    recognizer, perceptual = toy_networks(x.dtype)
    run("facelock", x, Linear(), num_iters=20, closures=toy_closures(x, (recognizer, perceptual)))
    for calls, times_on in ((recognizer.network.calls, 13), (perceptual.net.calls, 14)):
        assert [len(images) for images in calls] == [2] * (1 + times_on)
        assert [images.requires_grad for images in calls] == [False] + [True] * times_on


# ---------------------------------------------------------------------------------------------------------
# one step by hand, in numpy and float64


GOLDEN_STEP = 0.01


def golden_inputs():
    """(x, start) as tensors and as arrays; a start inside the ball, from which some steps lead out."""
    x = image(2, side=4, seed=7)
    start = random_start(x, BUDGET, [5, 6])
    return x, start, x.numpy(), start.numpy()


def mix(matrix, values):
    return np.einsum("ck,bkhw->bchw", matrix, values)


def clip(x_adv, x):
    return np.clip(np.clip(x_adv, x - BUDGET, x + BUDGET), -1, 1)


def check_golden(out, expected, x):
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    assert (np.abs(expected - x) < BUDGET - 1e-9).any() and (np.abs(expected - x) > BUDGET - 1e-9).any()


def test_noise_by_hand():
    x, _, x_np, _ = golden_inputs()
    draw = torch.rand((3, 4, 4), generator=torch.Generator().manual_seed(0)).double().numpy()
    expected = np.clip(x_np + (2 * draw - 1) * BUDGET, -1, 1)
    np.testing.assert_allclose(METHODS["noise"](x, budget=BUDGET).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["encoder", "encoder-untargeted", "vae", "facelock"])
def test_sign_step_by_hand(case):
    x, start, x_np, start_np = golden_inputs()
    both = DECODER @ ENCODER
    gradient = {  # up to a positive factor
        "encoder": -mix(ENCODER.T @ ENCODER, start_np),
        "encoder-untargeted": mix(ENCODER.T @ ENCODER, start_np - x_np),
        "vae": -mix(both.T @ both, start_np),
        "facelock": mix(ENCODER.T @ ENCODER, start_np - x_np),  # at i = 0 the latent term is alone
    }[case]
    out = run(case, x, Linear(), num_iters=1, start=start)
    check_golden(out, clip(start_np + GOLDEN_STEP * np.sign(gradient), x_np), x_np)


def test_facelock_by_hand():
    """Two steps of two: the latent term alone, then all three, each of them deciding some pixel's sign."""
    x, start, x_np, start_np = golden_inputs()
    generator = np.random.default_rng(3)
    u, v = 3e-4 * generator.standard_normal((2, 1, 3, 4, 4))

    first = clip(start_np + GOLDEN_STEP * np.sign(mix(ENCODER.T @ ENCODER, start_np - x_np)), x_np)
    raw = mix(DECODER @ ENCODER, first)
    inside = np.abs(raw) < 1
    assert inside.any() and not inside.all()
    y = np.clip(raw, -1, 1)
    terms = [
        0.2 * 2 / (3 * 4 * 4) * mix(ENCODER.T @ ENCODER, first - x_np),
        mix((DECODER @ ENCODER).T, inside * (2 * v * y)),  # of + sum(v y^2)
        mix((DECODER @ ENCODER).T, inside * -u),  # of - sum(u y)
    ]
    gradient = sum(terms)
    assert all((np.sign(gradient - term) != np.sign(gradient)).any() for term in terms)
    expected = clip(first + GOLDEN_STEP * (1 - 0.99 / 2) * np.sign(gradient), x_np)

    u, v = torch.from_numpy(u), torch.from_numpy(v)
    closures = (lambda y: (u * y).sum((1, 2, 3)), lambda y: (v * y.square()).sum((1, 2, 3)))
    out = run("facelock", x, Linear(), num_iters=2, start=start, closures=closures)
    check_golden(out, expected, x_np)


@pytest.mark.parametrize("case", ["cw", "cw-targeted"])
def test_cw_step_by_hand(case):
    """Adam's first step is lr * g / (|g| + 1e-8), on w = atanh(start)."""
    c, lr = 0.5, 0.02
    x, start, x_np, start_np = golden_inputs()
    a = np.clip((start_np + 1) / 2, 1e-6, 1 - 1e-6)
    x_adv = 2 * a - 1
    z = mix(ENCODER, x_adv)
    if case == "cw":
        d = z - mix(ENCODER, x_np)
        df_dz = -d / np.sqrt((d**2).sum(axis=3, keepdims=True) + 1e-8)  # a row is (b, c, h, :)
    else:
        df_dz = z / np.sqrt((z**2).sum(axis=(1, 2, 3), keepdims=True))
    dl_da = 2 * (a - (x_np + 1) / 2) + c * 2 * mix(ENCODER.T, df_dz)
    g = dl_da * (1 - x_adv**2) / 2
    w = np.arctanh(x_adv) - lr * g / (np.abs(g) + 1e-8)
    out = run(case, x, Linear(), num_iters=1, start=start, c=c, lr=lr)
    check_golden(out, clip(np.tanh(w), x_np), x_np)


# ---------------------------------------------------------------------------------------------------------
# the parts


def test_step_size():
    assert step_size_at(0, 100, 0.01) == 0.01
    assert step_size_at(50, 100, 0.01) == pytest.approx(0.00505, abs=1e-15)
    assert step_size_at(99, 100, 0.01) == pytest.approx(0.000199, abs=1e-15)


@pytest.mark.parametrize("maximize", [True, False])
def test_pgd_goes_along_the_sign_by_falling_steps(maximize):
    x = image(side=4, reach=0.1)
    slope = torch.where(image(side=4, seed=2) > 0, 1e-9, -1e9).to(x)
    out = pgd(
        x,
        lambda x_adv, i: (slope * x_adv).sum(dim=(1, 2, 3)),
        budget=0.5,
        step_size=0.1,
        num_iters=4,
        start=x,
        maximize=maximize,
    )
    moved = 0.1 * (1 + 0.7525 + 0.505 + 0.2575)
    expected = x + (1 if maximize else -1) * moved * slope.sign()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_project():
    x = torch.tensor([0.0, 0.0, 0.0, 0.95, -0.95, 0.5], dtype=torch.float64)
    x_adv = torch.tensor([0.05, -0.3, 0.2, 1.5, -1.5, 0.5], dtype=torch.float64)
    expected = torch.tensor([0.05, -0.1, 0.1, 1.0, -1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(project(x_adv, x, 0.1), expected, rtol=0, atol=1e-15)


def test_random_start_is_uniform_in_the_ball():
    x = image(side=64, reach=0.5)
    offset = (random_start(x, 0.1, [0]) - x) / 0.1
    assert offset.abs().max() <= 1 + 1e-12
    ordered = offset.flatten().sort().values
    uniform = torch.linspace(-1, 1, len(ordered), dtype=x.dtype)
    assert (ordered - uniform).abs().max() < 0.05


def test_random_start_is_cut_to_the_range():
    start = random_start(image(), 0.5, [0])
    assert start.abs().max() == 1


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
        run(case, bad, Linear(dtype=torch.float32), closures=closures)


@pytest.mark.parametrize("budget", [0, -0.03, float("nan")])
@every_case
def test_bad_budget(case, budget):
    with pytest.raises(ValueError, match="budget"):
        run(case, image(side=8), Linear(), budget=budget)


@every_case
def test_bad_start(case):
    x = image(2, side=8)
    with pytest.raises(ValueError, match="start is"):
        run(case, x, Linear(), start=x[:1])


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_one_seed_an_image(seeds):
    with pytest.raises(ValueError, match="seeds for 2 images"):
        random_start(image(2, side=8), BUDGET, seeds)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("at", "num_iters"), [(0, 1), (0, 40), (12, 13), (19, 40), (35, 36)])
def test_gradient_not_finite(value, at, num_iters):
    """In one image, in one iteration, even the last one; and a long run ends soon after it."""
    seen = []

    def loss(x_adv, i):
        factor = torch.ones(2, dtype=x_adv.dtype)
        factor[1] = value if i == at else 1.0
        return (x_adv.sum(dim=(1, 2, 3)) + 100) * factor

    with pytest.raises(GradientError, match="NaN or infinite"):
        pgd(
            image(2, side=4),
            loss,
            budget=BUDGET,
            step_size=0.01,
            num_iters=num_iters,
            callback=lambda i, losses: seen.append(i),
        )
    assert len(seen) < at + methods.CHECK_EVERY


@every_iterative_case
def test_broken_network(case):
    broken = Linear(encoder=np.full((3, 3), np.nan))
    with pytest.raises(GradientError):
        run(case, image(side=8), broken)


def test_gradient_zero_everywhere_warns():
    x = image(2, side=8)
    start = random_start(x, BUDGET, [1, 2])
    start[1] = x[1]
    with pytest.warns(RuntimeWarning, match="zero everywhere") as caught:
        out = run("encoder-untargeted", x, Linear(), num_iters=25, start=start)
    assert len(caught) == 1
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], start[0])


@pytest.mark.parametrize("case", ["cw", "cw-targeted"])
def test_cw_from_black_and_white(case):
    """At -1 and 1 tanh has no inverse, and in float32 its neighbours are far apart."""
    x = image(side=8, dtype=torch.float32).sign()
    x[0, 0, 0, :4] = 0
    out = run(case, x, Linear(dtype=torch.float32), num_iters=20, start=x)
    assert out.isfinite().all()
    assert (out - x).abs().max() <= BUDGET + 2e-7
    assert not torch.equal(out, x)


# ---------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize(("case", "n_graphs"), [("encoder", 1), ("facelock", 3)])
def test_compiled_is_the_same_as_one_graph(case, n_graphs, vaes, monkeypatch):
    """With the tracer alone, without a code generator: `fullgraph` fails where the iteration breaks up."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def closures(x):
        weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[:1])
        return (
            lambda y: torch.cosine_similarity((y * weights).flatten(1), (x * weights).flatten(1)),
            lambda y: (y - x).square().flatten(1).mean(dim=1),
        )

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for seed in (1, 2):  # the second batch is compiled no more
        x = image(2, seed=seed)
        given = {"num_iters": 6, "closures": closures(x)}
        plain = run(case, x, vaes[x.dtype], **given)
        compiled = run(case, x, vaes[x.dtype], compile=True, **given)
        torch.testing.assert_close(compiled, plain, atol=1e-9, rtol=0)
    assert len(graphs) == n_graphs  # facelock: no decode, LPIPS, LPIPS and face
    assert any("sign" in str(node.target) for node in graphs[0].graph.nodes)  # the step is in it


def test_compiled_takes_any_number_of_sizes(monkeypatch):
    """Left alone, torch.compile gives up after eight graphs, and a directory of many sizes would fail."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for side in range(4, 16):
        x = image(side=side)
        pgd(
            x,
            lambda x_adv, i: x_adv.square().flatten(1).mean(dim=1),
            budget=BUDGET,
            step_size=0.01,
            num_iters=2,
            compile=True,
        )
