"""The defenses: image tensors in, protected image tensors out. Objectives, two loops, and nothing else.

Every image is float32 or float64 (B, 3, H, W) RGB in [-1, 1]; every budget and step is an L-infinity size in
that range (0.03 is 3.8/255 of a pixel). Notation: x is the clean image, x' the optimised one, E and D are
the VAE's encoder (the latent mean) and decoder, z0 = E(x), z = E(x') and y = clip(D(z), -1, 1). An editor
that is shown the image as z, and no words, finds the noise eps(z_k, k, z) in z_k = sqrt(a_k) s z +
sqrt(1 - a_k) e, with timestep k (K is its first), noise e, a_k of alphas_cumprod, s the scale of its latents.

A defense is a function that takes x and what it needs (`vae`, `face_similarity`, ...) and returns its
objective: a function of (x', t), t in [0, 1) being the share of iterations done, that gives one value an
image, (B,), to be maximised. To add one, write that function and enter it in METHODS: a parameter without a
default is something that protection.py must have to offer, one with a default is a flag.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from transforms import chains, in_coefficients, keeping_spectrum, normal, uniform

if TYPE_CHECKING:  # torch is imported where it is used, so that --help lists METHODS at once
    from torch import Generator, Tensor

LOSS_SCALE = 2.0**12  # keeps float16 gradients from vanishing; a power of two changes no digit and no sign
CHECK_EVERY = 10  # iterations between two looks at the gradients' flags: each look waits for the device

# Facelock's weight and schedule, those of the authors' release.
LATENT_WEIGHT = 0.2
PERCEPTUAL_FROM = 0.25  # share of the iterations after which the LPIPS term is on
FACE_FROM = 0.35  # share of the iterations from which the face term is on

Objective = Callable[["Tensor", float], "Tensor"]  # (x', t) -> (B,)
Draws = Sequence["Generator"]  # one an image


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
    """Drives the reconstruction to grey (the paper's "VAE attack", after Salman et al. 2023): -||D(z)||_2"""
    return lambda x_adv, t: -_norm(_decode(vae, _encode(vae, x_adv)))


def cw_l2_attack(x: Tensor, vae: Any, c: float = 0.03, targeted: bool = False) -> Objective:
    """Moves the latent by little change (the L2 attack of Carlini & Wagner 2017, on the encoder; for `adam`):

        -(sum(((x' - x) / 2)^2) + c f)
        targeted:    f = ||z||_2
        untargeted:  f = -sum over rows of each channel of ||z - z0||_2, as in the authors' release
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

    face_similarity(y) is cos(f(y), f(x)) and perceptual_distance(y) is LPIPS(y, x), each (B,). All terms push
    away from the person. While neither the face nor the LPIPS term is on, nothing is decoded.
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


def facelock_dim(
    x: Tensor, vae: Any, face_similarity: Any, generators: Draws, transforms: str = "resize", samples: int = 2
) -> Objective:
    """Takes the face from the reconstruction, as seen through random transforms T (DIM, Xie et al. 2019):

        -mean over samples of cos(f(T(y)), f(x))
    """
    similarity = eot(lambda y, t: face_similarity(y), transforms, generators, samples)
    return lambda x_adv, t: -similarity(_decode(vae, _encode(vae, x_adv)).clamp(-1, 1), t).to(x_adv.dtype)


def eot(objective: Objective, transforms: str, generators: Draws, samples: int) -> Objective:
    """Averages an objective over random transforms of its image (EOT, Athalye et al. 2018):

        mean over samples of objective(T(image), t)

    transforms: as `transforms.chains` reads them; they take turns, from one call to the next, too.
    """
    ways = itertools.cycle(chains(transforms))
    return lambda image, t: sum(objective(next(ways)(image, generators), t) for _ in range(samples)) / samples


# ---------------------------------------------------------------------------------------------------------
# the peers' defenses (docs/methods.md has their settings); k, e and T are drawn anew in each iteration


def photoguard(x: Tensor, vae: Any, editor: Any, generators: Draws, unrolled: int = 4) -> Objective:
    """Drives a short edit to grey (the diffusion attack of Salman et al. 2023): -||D(DDIM(e, z))||_2

    DDIM takes `unrolled` steps from k = K to 0, all of them with gradient. Theirs inpaints, guided by 7.5; an
    edit without words, where that guidance cancels, stands in.
    """
    return _of_latent(vae, lambda z: -_norm(_decode(vae, editor.edit(z, normal(generators, z), unrolled))))


def advdm(x: Tensor, vae: Any, editor: Any, generators: Draws) -> Objective:
    """Makes the image hard to denoise (AdvDM, Liang et al. 2023): mean((eps(z_k, k, z) - e)^2)"""
    return _of_latent(vae, lambda z: _mean_square(_misjudged(editor, z, generators)))


def sds(x: Tensor, vae: Any, editor: Any, generators: Draws, targeted: bool = True) -> Objective:
    """Drives the latent along the denoiser's error, not through it (Diff-Protect, Xue et al. 2024):

        targeted (SDS-, easily denoised):  -mean(g z),  g = eps(z_k, k, z) - e taken as a constant
        untargeted (SDS+):                  mean(g z)
    """

    def along(z: Tensor) -> Tensor:
        g = _misjudged(editor, z.detach(), generators)
        return (-1 if targeted else 1) * (g * z).flatten(1).mean(dim=1)

    return _of_latent(vae, along)


def mist(x: Tensor, vae: Any) -> Objective:
    """Drives the latent to a pattern's (the textural term of Mist, Liang & Wu 2023): -mean((z - E(p))^2)

    Theirs shows the word MIST; here p is a chequerboard of 16 fields on the long side.
    """
    down, right = (x.new_ones(side).cumsum(0).sub(1) * 16 // max(x.shape[2:]) for side in x.shape[2:])
    target = _encode(vae, ((down[:, None] + right) % 2 * 2 - 1).expand_as(x)).detach()
    return _of_latent(vae, lambda z: -_mean_square(z - target))


def pid(x: Tensor, vae: Any) -> Objective:
    """Moves the mean and the log variance v that E gives, whatever the words (PID, Li et al. 2024):

        mean((z - z0)^2) + mean((v - v0)^2)
    """

    def moments(image: Tensor) -> Tensor:  # z and v, (B, 2 C, h/8, w/8)
        return vae.encode(image).latent_dist.parameters.to(image.dtype)

    clean = moments(x).detach()
    return lambda x_adv, t: 2 * _mean_square(moments(x_adv) - clean)


def editshield(x: Tensor, vae: Any, generators: Draws) -> Objective:
    """Moves the latent whatever is done to the image (EditShield, Chen et al. 2024):

        mean over a crop, a blur and a rotation T of mean((E(T(x')) - z0)^2)

    Theirs compares noisy latents: the same noise in both cancels, and leaves a factor.
    """
    return eot(encoder_attack(x, vae, targeted=False), "crop,blur,rotate", generators, samples=3)


def diffusionguard(x: Tensor, vae: Any, editor: Any, generators: Draws) -> Objective:
    """Makes the editor's first step find much noise (DiffusionGuard, Choi et al. 2025): ||eps(e, K, z)||_2

    Theirs inpaints through random masks of the face; the image that InstructPix2Pix is shown stands in.
    """
    begin, first = editor.begin, editor.first
    return _of_latent(vae, lambda z: _norm(editor.predict_noise(begin(z, normal(generators, z)), first, z)))


def _of_latent(vae: Any, value: Callable[[Tensor], Tensor]) -> Objective:
    """Makes an objective of a function of z alone."""
    return lambda x_adv, t: value(_encode(vae, x_adv))


def _misjudged(editor: Any, z: Tensor, generators: Draws) -> Tensor:
    """eps(z_k, k, z) - e, with a timestep k and noise e of each image's own: like z"""
    k = uniform(generators, 0, len(editor.alphas_cumprod), z).long()
    e = normal(generators, z)
    return editor.predict_noise(editor.noised(z, k, e), k, z) - e


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

    x: (B, 3, H, W) in [-1, 1], left as it is; 16-bit floats are optimised in float32. Each image of a batch
    gets what it would get alone. Returns x' like x, max |x' - x| <= budget. Raises ValueError for a wrong
    image, GradientError for a gradient that is not finite; warns if an image's is zero everywhere.
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

    Unlike the authors' release it begins at `start`. x, the result and errors as in `pgd`.
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


def through(seen: Callable[[Tensor], Tensor], x: Tensor, objective: Objective, run: Run, loop: Any) -> Tensor:
    """Runs a loop whose variable u is an image only as `seen`: x' = seen(u)."""
    return seen(loop(x, lambda u, t: objective(seen(u), t), run))


def blurred_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by `pgd` in smooth perturbations, x' = x + G(u - x) (BlurGuard, Kim et al. 2025).

    Each image's G is the narrowest Gaussian after which noise of the budget leaves its spectrum as it is;
    theirs learns one for each region that SAM finds. x, the result and errors as in `pgd`.
    """
    x, start = _begin(x, run)
    smooth = keeping_spectrum(x, start - x)
    return through(lambda u: project(x + smooth(u - x), x, run.budget), x, objective, run, pgd)


def dct_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by `pgd` in JPEG's coefficients, |v| <= 1 step of quality 95 (DCT-Shield, Bala et al. 2025).

    Theirs has no budget in pixels. Start and steps are the same share of 1 as of the budget. x, the result
    and errors as in `pgd`.
    """
    x, start = _begin(x, run)
    moved = in_coefficients(x, quality=95)
    run_v = replace(run, budget=1.0, step_size=run.step_size / run.budget, start=(start - x) / run.budget)
    return through(lambda v: project(moved(v), x, run.budget), 0 * x, objective, run_v, pgd)


def stay(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Leaves the start as it is. x, the result and errors as in `pgd`."""
    return _begin(x, run)[1]


def random_start(x: Tensor, budget: float, seeds: Sequence[int]) -> Tensor:
    """Draws a uniform point of each image's L-infinity ball, cut to [-1, 1]; like x in shape and dtype.

    In float32, by one CPU generator an image. Raises ValueError unless there is one seed an image.
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
    run: Run = Run()  # its own step_size and num_iters; lr is that of all

    @property
    def parameters(self) -> dict[str, Any]:
        """What the objective takes beside x: knobs with their defaults, needs with `NEED`."""
        parameters = list(inspect.signature(self.objective).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def protect(self, x: Tensor, run: Run = Run(), mask: Tensor | None = None, **offers: Any) -> Tensor:
        """Runs the loop on what offers make. mask: a pixel's share of the budget, (B, 1, H, W) in [0, 1]."""
        x = _image(x, run.budget)
        objective = self.objective(x, **offers)
        if mask is None:
            return self.loop(x, objective, run)
        return through(lambda u: x + mask.to(x) * (u - x), x, objective, run, self.loop)


NEED = inspect.Parameter.empty
METHODS: dict[str, Method] = {
    "noise": Method(noise, stay, reads=()),
    "encoder": Method(encoder_attack),
    "vae": Method(vae_attack),
    "cw": Method(cw_l2_attack, adam, reads=("num_iters", "lr"), fp32=True),  # Adam sees a gradient's size
    "facelock": Method(facelock),
    "facelock-dim": Method(facelock_dim, run=Run(step_size=0.02, num_iters=25)),
    "photoguard": Method(photoguard),
    "advdm": Method(advdm),
    "sds": Method(sds),
    "mist": Method(mist),
    "pid": Method(pid),
    "editshield": Method(editshield),
    "diffusionguard": Method(diffusionguard),
    "blurguard": Method(encoder_attack, blurred_pgd),
    "dctshield": Method(encoder_attack, dct_pgd),
}
