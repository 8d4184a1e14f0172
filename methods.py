"""The defenses: image tensors in, protected image tensors out. Objectives, two loops, and nothing else.

Every image is float32 or float64 (B, 3, H, W) RGB in [-1, 1]; every budget and step is an L-infinity size in
that range (0.03 is 3.8/255 of a pixel). Notation: x is the clean image, x' the optimised one, E and D are
the VAE's encoder (the latent mean) and decoder, z0 = E(x), z = E(x') and y = clip(D(z), -1, 1).

A defense is a function that takes x and what it needs (`vae`, `face_similarity`, ...) and returns its
objective: a function of (x', t), t in [0, 1) being the share of iterations done, that gives one value an
image, (B,), to be maximised. To add one, write that function and enter it in METHODS: a parameter without a
default is something that protection.py must have to offer, one with a default is a flag.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch is imported where it is used, so that --help lists METHODS at once
    from torch import Tensor

LOSS_SCALE = 2.0**12  # keeps float16 gradients from vanishing; a power of two changes no digit and no sign
CHECK_EVERY = 10  # iterations between two looks at the gradients' flags: each look waits for the device

# Facelock's weight and schedule, those of the authors' release.
LATENT_WEIGHT = 0.2
PERCEPTUAL_FROM = 0.25  # share of the iterations after which the LPIPS term is on
FACE_FROM = 0.35  # share of the iterations from which the face term is on

Objective = Callable[["Tensor", float], "Tensor"]  # (x', t) -> (B,)


# ---------------------------------------------------------------------------------------------------------
# the defenses


def noise(x: Tensor) -> Objective:
    """Asks for nothing: the control, uniform noise of the whole budget. 0"""
    return lambda x_adv, t: 0 * _norm(x_adv)


def encoder_attack(x: Tensor, vae: Any, targeted: bool = True) -> Objective:
    """Drives the latent to zero or away from the clean one (the encoder attack of Salman et al. 2023):

        targeted:    -||z||_2
        untargeted:  mean((z - z0)^2)
    """
    if targeted:
        return lambda x_adv, t: -_norm(_encode(vae, x_adv))
    z0 = _encode(vae, x).detach()
    return lambda x_adv, t: _mean_square(_encode(vae, x_adv) - z0)


def vae_attack(x: Tensor, vae: Any) -> Objective:
    """Drives the reconstruction to grey, 0 (the paper's "VAE attack", after Salman et al. 2023):

        -||D(z)||_2,  not clipped
    """
    return lambda x_adv, t: -_norm(_decode(vae, _encode(vae, x_adv)))


def cw_l2_attack(x: Tensor, vae: Any, c: float = 0.03, targeted: bool = False) -> Objective:
    """Moves the latent by little change (the L2 attack of Carlini & Wagner 2017, on the encoder; for `adam`):

        -(sum(((x' - x) / 2)^2) + c f)
        targeted:    f = ||z||_2
        untargeted:  f = -sum over latent rows of ||z - z0||_2

    A latent row is one row of one channel, as in the authors' release.
    """
    z0 = _encode(vae, x).detach()

    def f(z: Tensor) -> Tensor:
        rows = ((z - z0).square().sum(dim=-1) + 1e-8).sqrt()  # (B, C, h/8); its gradient at 0 is defined
        return _norm(z) if targeted else -rows.flatten(1).sum(dim=1)

    def objective(x_adv: Tensor, t: float) -> Tensor:
        change = ((x_adv - x) / 2).square().flatten(1).sum(dim=1)  # (B,)
        return -(change + c * f(_encode(vae, x_adv)))

    return objective


def facelock(
    x: Tensor,
    vae: Any,
    face_similarity: Callable[[Tensor], Tensor],
    perceptual_distance: Callable[[Tensor], Tensor],
) -> Objective:
    """Makes a reconstruction that no longer shows the person (FaceLock, Wang et al. 2025):

        -[t >= 0.35] cos(f(y), f(x)) + 0.2 mean((z - z0)^2) + [t > 0.25] LPIPS(y, x)

    face_similarity(y) is cos(f(y), f(x)) and perceptual_distance(y) is LPIPS(y, x), each (B,), with
    everything of the clean image computed once by whoever made them. All three terms push away from the
    person. While neither the face nor the LPIPS term is on, nothing is decoded.
    """
    z0 = _encode(vae, x).detach()

    def objective(x_adv: Tensor, t: float) -> Tensor:
        z = _encode(vae, x_adv)
        value = LATENT_WEIGHT * _mean_square(z - z0)
        if t > PERCEPTUAL_FROM:
            y = _decode(vae, z).clamp(-1, 1)
            value = value + perceptual_distance(y).to(z.dtype)
            if t >= FACE_FROM:
                value = value - face_similarity(y).to(z.dtype)
        return value

    return objective


def _encode(vae: Any, x: Tensor) -> Tensor:
    """E(x), in x's dtype whatever the network's: (B, 3, H, W) -> the latent mean, (B, C, h/8, w/8)"""
    return vae.encode(x).latent_dist.mean.to(x.dtype)


def _decode(vae: Any, z: Tensor) -> Tensor:
    """D(z), not clipped: (B, C, h/8, w/8) -> (B, 3, h, w)"""
    return vae.decode(z).sample.to(z.dtype)


def _norm(values: Tensor) -> Tensor:
    """||.||_2 of each image: (B, ...) -> (B,)"""
    return values.flatten(1).norm(dim=1)


def _mean_square(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return values.square().flatten(1).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------
# the loops


@dataclass(frozen=True)
class Run:
    """How a loop goes. Budget and step are L-infinity sizes in [-1, 1]."""

    budget: float = 0.03
    step_size: float = 0.01  # the first one; it falls linearly to 1 % of it
    num_iters: int = 100
    lr: float = 0.03  # of Adam
    start: Tensor | None = None  # where x' begins; default: `random_start` with seed 0
    callback: Callable[[int, Tensor], None] | None = None  # gets (iteration, values (B,), on the device)


def pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by projected sign-gradient steps (Madry et al. 2018), of the authors' release's sizes:

        x' <- project(x' + step_i sign(grad sum_b objective_b(x'))),  step_i = step_size (1 - 0.99 i / N)

    x: (B, 3, H, W) in [-1, 1]; 16-bit floats are optimised in float32, where small steps still count. The sum
    over images is differentiated, so a batch gives each image what it would get alone. Returns x' like x
    (float32 at least), max |x' - x| <= budget. x is left as it is. Raises ValueError for a wrong shape or
    range and GradientError for a gradient that is not finite; warns if an image's gradient is all zero.
    """
    import torch

    x, x_adv = _begin(x, run)
    peaks: list[Tensor] = []
    for i in range(run.num_iters):
        x_adv.requires_grad_(True)
        values = objective(x_adv, i / run.num_iters)
        (gradient,) = torch.autograd.grad(LOSS_SCALE * values.sum(), x_adv)
        step = run.step_size * (1 - 0.99 * i / run.num_iters)
        x_adv = project(x_adv.detach() + step * gradient.sign(), x, run.budget)
        _watch(gradient, peaks, i, run)
        if run.callback:
            run.callback(i, values.detach())
    return x_adv


def adam(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by Adam (Kingma & Ba 2015) on w, x' = tanh(w) (Carlini & Wagner 2017); projects at the end.

    Adam's state is kept per element, so the images of a batch don't mix. Unlike the authors' release it
    begins at `start`. x, the result and errors as in `pgd`.
    """
    import torch

    x, x_adv = _begin(x, run)
    w = torch.atanh(x_adv.clamp(2e-6 - 1, 1 - 2e-6)).requires_grad_(True)
    optimizer = torch.optim.Adam([w], lr=run.lr)
    peaks: list[Tensor] = []
    for i in range(run.num_iters):
        values = objective(w.tanh(), i / run.num_iters)
        (w.grad,) = torch.autograd.grad(-values.sum(), w)
        optimizer.step()
        _watch(w.grad, peaks, i, run)
        if run.callback:
            run.callback(i, values.detach())
    return project(w.detach().tanh(), x, run.budget)


def stay(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Leaves the start as it is. x, the result and errors as in `pgd`."""
    return _begin(x, run)[1]


def random_start(x: Tensor, budget: float, seeds: Sequence[int]) -> Tensor:
    """Draws a uniform point of each image's L-infinity ball, cut to [-1, 1]; like x in shape and dtype.

    One CPU generator an image, so an image's start depends on its own seed and shape alone. It is drawn in
    float32 whatever x's dtype. Raises ValueError unless there is one seed an image.
    """
    import torch

    _check(x, budget)
    if len(seeds) != len(x):
        raise ValueError(f"{len(seeds)} seeds for {len(x)} images")
    draws = [torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return project(x + (2 * torch.stack(draws).to(x) - 1) * budget, x, budget)


def project(x_adv: Tensor, x: Tensor, budget: float) -> Tensor:
    """Gives the nearest point to x_adv with |x_adv - x| <= budget, up to the dtype's rounding, in [-1, 1]."""
    return x_adv.clamp(x - budget, x + budget).clamp(-1, 1)


class GradientError(RuntimeError):
    """A gradient with NaN or infinity: nothing computed from it could be trusted."""


def _watch(gradient: Tensor, peaks: list[Tensor], i: int, run: Run) -> None:
    """Notes each image's largest gradient, and reads what was noted every CHECK_EVERY iterations."""
    import torch

    peaks.append(gradient.abs().flatten(1).amax(dim=1))  # (B,); NaN and infinity survive a maximum
    if len(peaks) < CHECK_EVERY and i < run.num_iters - 1:
        return
    seen = torch.stack(peaks)
    if not seen.isfinite().all():
        raise GradientError(f"the gradient is NaN or infinite within the first {i + 1} iterations")
    if (seen == 0).any():  # said once: it is the same line
        text = "the gradient of an image was zero everywhere: its steps change nothing"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    peaks.clear()


def _begin(x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """(x, x'): the image in float32 at least, and where its optimisation starts, within the budget."""
    x = _image(x, run.budget)
    start = random_start(x, run.budget, [0] * len(x)) if run.start is None else run.start.detach().to(x)
    if start.shape != x.shape:
        raise ValueError(f"start is {tuple(start.shape)}, the image {tuple(x.shape)}")
    return x, project(start, x, run.budget)


def _image(x: Tensor, budget: float) -> Tensor:
    """The image, checked, in float32 at least."""
    import torch

    _check(x, budget)
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _check(x: Tensor, budget: float) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"an image must be a float (B, 3, H, W) tensor, not {x.dtype} {tuple(x.shape)}")
    if not budget > 0:
        raise ValueError(f"the budget must be positive, not {budget}")
    if not bool((x.abs() <= 1).all()):
        raise ValueError("an image must be in [-1, 1]")


# ---------------------------------------------------------------------------------------------------------
# the table


class Method(NamedTuple):
    """A defense: its objective, the loop that maximises it, and what of `Run` that loop reads."""

    objective: Callable[..., Objective]
    loop: Callable[[Tensor, Objective, Run], Tensor] = pgd
    reads: tuple[str, ...] = ("step_size", "num_iters")  # beside budget and start
    fp32: bool = False  # networks in float32 whatever --dtype says

    @property
    def parameters(self) -> dict[str, Any]:
        """What the objective takes beside x: knobs with their defaults, needs with `NEED`."""
        parameters = list(inspect.signature(self.objective).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def protect(self, x: Tensor, run: Run = Run(), **offers: Any) -> Tensor:
        """Runs the loop on the objective that `offers` (needs and knobs) make."""
        x = _image(x, run.budget)
        return self.loop(x, self.objective(x, **offers), run)


NEED = inspect.Parameter.empty
METHODS: dict[str, Method] = {
    "noise": Method(noise, stay, reads=()),
    "encoder": Method(encoder_attack),
    "vae": Method(vae_attack),
    "cw": Method(cw_l2_attack, adam, reads=("num_iters", "lr"), fp32=True),  # Adam sees a gradient's size
    "facelock": Method(facelock),
}
