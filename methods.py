"""The defenses: image tensors in, protected image tensors out. Pure tensor code, one function a method.

Every image is float32 or float64 (B, 3, H, W) RGB in [-1, 1]; every budget and step is an L-infinity size in
that range (0.03 is 3.8/255 of a pixel). `vae` is a diffusers autoencoder. In the equations E and D are its
encoder (the latent mean) and decoder, x the clean image, x' the optimised one, z0 = E(x) and z = E(x').

To add a defense, write its objective as a function `loss(x', i) -> (B,)`, hand it to `pgd`, and enter it in
`METHODS` (and its name in `utils.METHOD_NAMES`). The scripts pass each method the keywords that its signature
names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Keeps float16 gradients from vanishing; a power of two, so that it changes no digit and no sign.
LOSS_SCALE = 2.0**12
MAX_GRAPHS = 2**16  # of torch.compile: no limit
CHECK_EVERY = 10  # iterations between two looks at the gradients' flags: each look waits for the device

# Facelock's weight and schedule, those of the authors' release.
LATENT_WEIGHT = 0.2
PERCEPTUAL_FROM = 0.25  # share of the iterations after which the LPIPS term is on
FACE_FROM = 0.35  # share of the iterations from which the face term is on

Loss = Callable[[Tensor, int], Tensor]  # (x_adv, iteration) -> (B,)
Callback = Callable[[int, Tensor], None]  # (iteration, losses (B,), still on the device)


class GradientError(RuntimeError):
    """A gradient with NaN or infinity: nothing computed from it could be trusted."""


# ---------------------------------------------------------------------------------------------------------
# projected gradient descent


def step_size_at(i: int, num_iters: int, step_size: float) -> float:
    """The step of iteration `i` (from 0): step_size * (1 - 0.99 i / num_iters),
    as in the authors' release.
    """
    return step_size * (1 - 0.99 * i / num_iters)


def random_start(x: Tensor, budget: float, seeds: Sequence[int]) -> Tensor:
    """A uniform point of each image's L-infinity ball, cut to [-1, 1]; like x in shape and dtype.

    One CPU generator an image, so an image's start depends on its own seed and shape alone. It is drawn in
    float32 whatever x's dtype. Raises ValueError unless there is one seed an image.
    """
    _check(x, budget)
    if len(seeds) != len(x):
        raise ValueError(f"{len(seeds)} seeds for {len(x)} images")
    draws = [torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    offset = (2 * torch.stack(draws).to(x) - 1) * budget
    return project(x + offset, x, budget)


def project(x_adv: Tensor, x: Tensor, budget: float) -> Tensor:
    """The nearest point to x_adv with |x_adv - x| <= budget (up to rounding of the dtype) and in [-1, 1]."""
    return x_adv.clamp(x - budget, x + budget).clamp(-1, 1)


def pgd(
    x: Tensor,
    loss_fn: Loss,
    *,
    budget: float,
    step_size: float,
    num_iters: int,
    start: Tensor | None = None,
    maximize: bool = True,
    compile: bool = False,
    stages: Sequence[int] = (0,),
    callback: Callback | None = None,
) -> Tensor:
    """Projected sign-gradient ascent (Madry et al. 2018), or descent with maximize=False:

        x' <- project(x' +- step_size_at(i) * sign(grad sum_b loss_b(x')))

    x: (B, 3, H, W) in [-1, 1]; 16-bit floats are optimised in float32, where small steps still count.
    loss_fn(x_adv, i) returns one loss an image, (B,); their sum is differentiated, so a batch gives each
    image what it would get alone. start: default `random_start` with seed 0. compile: forward, backward and
    step as one graph of torch.compile, the same up to rounding; one graph for each of `stages`, the
    iterations from which the loss has another form, and all that it then knows of i. callback(i, losses) is
    called after each iteration with detached losses; reading them waits for the device.
    Returns x' like x (float32 at least), max |x' - x| <= budget. x is left as it is.
    Raises ValueError for a wrong shape or range and GradientError for a gradient that is not finite; warns
    if an image's gradient is all zero.
    """
    x, x_adv = _begin(x, start, budget)
    sign = 1 if maximize else -1
    steps = [sign * step_size_at(i, num_iters, step_size) for i in range(num_iters)]
    steps = torch.tensor(steps, dtype=x.dtype, device=x.device)  # sent there once
    differentiate = _traceable_gradient if compile else _gradient

    def iteration(x_adv: Tensor, step: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        losses, gradient = differentiate(loss_fn, x_adv, i)  # (B,), (B, 3, H, W)
        return project(x_adv + step * gradient.sign(), x, budget), losses, gradient

    if compile:
        iteration = _compiled(iteration)
    flags = _GradientFlags()
    for i in range(num_iters):
        form = max(stage for stage in stages if stage <= i) if compile else i
        x_adv, losses, gradient = iteration(x_adv, steps[i], form)
        flags.update(gradient, last=i == num_iters - 1)
        if callback is not None:
            callback(i, losses)
    return x_adv


def _gradient(loss_fn: Loss, x_adv: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """(losses (B,), LOSS_SCALE times the gradient of their sum), both detached"""
    x_adv = x_adv.detach().requires_grad_(True)
    losses = loss_fn(x_adv, i)
    (gradient,) = torch.autograd.grad(LOSS_SCALE * losses.sum(), x_adv)
    return losses.detach(), gradient


def _traceable_gradient(loss_fn: Loss, x_adv: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """`_gradient` in the form that torch.compile takes whole; it knows no gradient checkpointing"""

    def total(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss_fn(x_adv, i)
        return LOSS_SCALE * losses.sum(), losses

    gradient, losses = torch.func.grad(total, has_aux=True)(x_adv)
    return losses, gradient


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a graph for each image size, batch size and stage. Its limit of eight guards against
    code that never settles; a directory with three sizes of portraits would reach it, and fail.
    """
    import torch._dynamo

    limits = torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS)
    return limits(torch.compile(function, fullgraph=True, dynamic=False))


class _GradientFlags:
    """Non-finite and all-zero gradients, noted on the device and read every CHECK_EVERY iterations."""

    def __init__(self) -> None:
        self.seen = 0
        self.broken: Tensor | None = None
        self.zero: Tensor | None = None
        self.warned = False

    def update(self, gradient: Tensor, last: bool) -> None:
        largest = gradient.detach().abs().flatten(1).amax(dim=1)  # (B,); NaN and infinity survive a maximum
        broken = ~largest.isfinite().all()
        zero = (largest == 0).any()
        self.broken = broken if self.broken is None else self.broken | broken
        self.zero = zero if self.zero is None else self.zero | zero
        self.seen += 1
        if not last and self.seen % CHECK_EVERY:
            return
        if self.broken:
            raise GradientError(f"the gradient is NaN or infinite within the first {self.seen} iterations")
        if self.zero and not self.warned:
            self.warned = True
            warnings.warn(
                f"the gradient of an image was zero everywhere within the first {self.seen} iterations: "
                "its steps change nothing",
                RuntimeWarning,
                stacklevel=4,
            )


def _image(x: Tensor, budget: float) -> Tensor:
    """x, checked and detached, in float32 at least."""
    _check(x, budget)
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _begin(x: Tensor, start: Tensor | None, budget: float) -> tuple[Tensor, Tensor]:
    """(x, x_adv): the image and where its optimisation starts, within the budget."""
    x = _image(x, budget)
    start = random_start(x, budget, seeds=[0] * len(x)) if start is None else start.detach().to(x)
    if start.shape != x.shape:
        raise ValueError(f"start is {tuple(start.shape)}, the image {tuple(x.shape)}")
    return x, project(start, x, budget)


def _check(x: Tensor, budget: float) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"an image must be a float (B, 3, H, W) tensor, not {x.dtype} {tuple(x.shape)}")
    if not budget > 0:
        raise ValueError(f"the budget must be positive, not {budget}")
    if not bool((x.abs() <= 1).all()):
        raise ValueError("an image must be in [-1, 1]")


# ---------------------------------------------------------------------------------------------------------
# the VAE, differentiable, in the image's dtype whatever the network's


def _encode(vae: Any, x: Tensor) -> Tensor:
    """E(x): (B, 3, H, W) -> the latent mean, (B, C, h/8, w/8)"""
    return vae.encode(x).latent_dist.mean.to(x.dtype)


def _decode(vae: Any, z: Tensor) -> Tensor:
    """D(z): (B, C, h/8, w/8) -> (B, 3, h, w), not clipped"""
    return vae.decode(z).sample.to(z.dtype)


def _norm(values: Tensor) -> Tensor:
    """||.||_2 of each image: (B, ...) -> (B,)"""
    return values.flatten(1).norm(dim=1)


def _mean_square(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return values.square().flatten(1).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------
# the defenses


def noise(x: Tensor, *, budget: float, start: Tensor | None = None) -> Tensor:
    """The control: `start` itself, by default uniform noise of the whole budget (`random_start`, seed 0).

    What the same budget does without an objective. x, the result and errors as in `pgd`.
    """
    return _begin(x, start, budget)[1]


def encoder_attack(
    x: Tensor,
    vae: Any,
    *,
    budget: float,
    step_size: float,
    num_iters: int,
    targeted: bool = True,
    start: Tensor | None = None,
    compile: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """The encoder attack (PhotoGuard, Salman et al. 2023), towards a zero latent or away from the clean one:

        targeted:    minimise  ||z||_2
        untargeted:  maximise  mean((z - z0)^2)

    x, the result and errors as in `pgd`. The decoder is not used.
    """
    with torch.no_grad():
        z0 = None if targeted else _encode(vae, _image(x, budget))

    def loss(x_adv: Tensor, i: int) -> Tensor:
        z = _encode(vae, x_adv)
        return _norm(z) if targeted else _mean_square(z - z0)

    return pgd(
        x,
        loss,
        budget=budget,
        step_size=step_size,
        num_iters=num_iters,
        start=start,
        maximize=not targeted,
        compile=compile,
        callback=callback,
    )


def vae_attack(
    x: Tensor,
    vae: Any,
    *,
    budget: float,
    step_size: float,
    num_iters: int,
    start: Tensor | None = None,
    compile: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """The VAE attack: a reconstruction that is grey (0 in [-1, 1]).

        minimise  ||D(z)||_2, the reconstruction not clipped

    The paper's "VAE attack", after Salman et al. 2023. x, the result and errors as in `pgd`.
    """

    def loss(x_adv: Tensor, i: int) -> Tensor:
        return _norm(_decode(vae, _encode(vae, x_adv)))

    return pgd(
        x,
        loss,
        budget=budget,
        step_size=step_size,
        num_iters=num_iters,
        start=start,
        maximize=False,
        compile=compile,
        callback=callback,
    )


def cw_l2_attack(
    x: Tensor,
    vae: Any,
    *,
    budget: float,
    num_iters: int,
    c: float = 0.03,
    lr: float = 0.03,
    targeted: bool = False,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The L2 attack of Carlini & Wagner 2017 on the encoder: Adam on w, with a = (tanh(w) + 1) / 2 in [0, 1],

        minimise  sum((a - (x + 1) / 2)^2) + c * f(2 a - 1)
        untargeted:  f(x') = -sum over latent rows of ||E(x') - z0||_2
        targeted:    f(x') = ||E(x')||_2

    and a projection to the budget at the end. A latent row is one row of one channel, as in the authors'
    release; unlike there, the VAE is fed [-1, 1], Adam starts at `start`, and the budget is in [-1, 1].
    x, the result and errors as in `pgd`.
    """
    x, x_adv = _begin(x, start, budget)
    x01 = (x + 1) / 2
    a = ((x_adv + 1) / 2).clamp(1e-6, 1 - 1e-6)
    w = torch.atanh(2 * a - 1).requires_grad_(True)
    with torch.no_grad():
        z0 = None if targeted else _encode(vae, x)

    def f(x_adv: Tensor) -> Tensor:
        z = _encode(vae, x_adv)
        if targeted:
            return _norm(z)
        rows = ((z - z0).square().sum(dim=-1) + 1e-8).sqrt()  # (B, C, h/8); its gradient at 0 is defined
        return -rows.flatten(1).sum(dim=1)

    # Adam's state is kept per element, so the images of a batch don't mix.
    optimizer = torch.optim.Adam([w], lr=lr)
    flags = _GradientFlags()
    for i in range(num_iters):
        a = (w.tanh() + 1) / 2
        losses = (a - x01).square().flatten(1).sum(dim=1) + c * f(2 * a - 1)  # (B,)
        (w.grad,) = torch.autograd.grad(losses.sum(), w)
        flags.update(w.grad, last=i == num_iters - 1)
        optimizer.step()
        if callback is not None:
            callback(i, losses.detach())
    return project(w.detach().tanh(), x, budget)


def facelock(
    x: Tensor,
    vae: Any,
    face_similarity: Callable[[Tensor], Tensor],
    perceptual_distance: Callable[[Tensor], Tensor],
    *,
    budget: float,
    step_size: float,
    num_iters: int,
    start: Tensor | None = None,
    compile: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """FaceLock (Wang et al. 2025): a VAE reconstruction y = clip(D(z), -1, 1)
    that no longer shows the person.

        maximise  -[i >= 0.35 N] cos(f(y), f(x)) + 0.2 mean((z - z0)^2) + [i > 0.25 N] LPIPS(y, x)

    face_similarity(y) is cos(f(y), f(x)) and perceptual_distance(y) is LPIPS(y, x), each (B,), with
    everything of the clean image computed once by whoever made them. All three terms push away from the
    person, so each step goes along the gradient's sign. While neither the face nor the LPIPS term is on,
    nothing is decoded. x, the result and errors as in `pgd`.
    """
    with torch.no_grad():
        z0 = _encode(vae, _image(x, budget))

    def terms_on(i: int) -> tuple[bool, bool]:
        return i >= FACE_FROM * num_iters, i > PERCEPTUAL_FROM * num_iters  # face, perceptual

    def loss(x_adv: Tensor, i: int) -> Tensor:
        face_on, perceptual_on = terms_on(i)
        z = _encode(vae, x_adv)
        objective = LATENT_WEIGHT * _mean_square(z - z0)
        if face_on or perceptual_on:
            y = _decode(vae, z).clamp(-1, 1)
            if perceptual_on:
                objective = objective + perceptual_distance(y).to(z.dtype)
            if face_on:
                objective = objective - face_similarity(y).to(z.dtype)
        return objective

    stages = [i for i in range(num_iters) if i == 0 or terms_on(i) != terms_on(i - 1)]
    return pgd(
        x,
        loss,
        budget=budget,
        step_size=step_size,
        num_iters=num_iters,
        start=start,
        compile=compile,
        stages=stages,
        callback=callback,
    )


METHODS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "encoder": encoder_attack,
    "vae": vae_attack,
    "cw": cw_l2_attack,
    "facelock": facelock,
}
