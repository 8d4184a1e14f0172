"""How the defenses climb: loops that maximise an objective within a budget. Tensors in, tensors out.

Every image is float32 or float64 (B, 3, H, W) RGB in [-1, 1], every budget and step an L-infinity size in
that range; x is the clean image, x' the optimised one. An objective is a function of (x', t) that returns
one value per image, (B,); t in [0, 1) is the share of iterations done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transforms import in_coefficients, keeping_spectrum

if TYPE_CHECKING:  # torch is imported where it is used, so that --help lists METHODS at once
    from torch import Tensor

LOSS_SCALE = 2.0**12  # keeps float16 gradients from vanishing; a power of two changes no digit and no sign
COLOUR = 0.4  # weight of colour in l2_pgd: grey changes pass for skin and wrinkles, coloured ones for a rash
CHECK_EVERY = 10  # iterations between two checks of the gradients: each check waits for the device

Objective = Callable[["Tensor", float], "Tensor"]  # (x', t) -> (B,)


@dataclass(frozen=True)
class Run:
    """Sets how a loop runs. Budget and step are L-infinity sizes in [-1, 1]."""

    budget: float = 0.03
    step_size: float = 0.01  # the first; steps shrink linearly to 1 % of it
    num_iters: int = 100
    lr: float = 0.03  # of Adam
    rms: float = 0.045  # of `l2_pgd`: largest root mean square of the change, where it is allowed
    momentum: float = 0.9  # of `mi_pgd`: share of the earlier gradients that is kept
    # where x' starts, or a function that makes it, which saves a copy; default: `random_start` with seed 0
    start: Tensor | Callable[[], Tensor] | None = None
    is_warm: bool = False  # whether `start` is a good guess, which `l2_pgd` starts from, too
    callback: Callable[[int, Tensor], None] | None = None  # gets (iteration, values (B,), on the device)


def pgd(
    x: Tensor,
    objective: Objective,
    run: Run,
    way: Callable[[Tensor], Tensor] = lambda g: g.sign_(),
    within: Callable[[Tensor], Tensor] = lambda moved: moved,
) -> Tensor:
    """Climbs by projected sign-gradient steps (Madry et al. 2018) of the sizes in the authors' release:

        x' <- project(x' + step_i sign(grad sum_b objective_b(x'))),  step_i = step_size (1 - 0.99 i / N)

    x: (B, 3, H, W) in [-1, 1], left as it is; 16-bit floats are optimised in float32. Each image of a batch
    gets what it would get alone. way: turns the gradient into a step, by default its sign. within: a further
    constraint on x', applied after each step. Returns x' like x, max |x' - x| <= budget. Raises ValueError
    for a wrong image, GradientError for a gradient that is not finite; warns if an image's gradient is zero
    everywhere.
    """
    import torch

    x, x_adv = _begin(x, run)
    peaks: list[Tensor] = []
    for i in range(run.num_iters):
        x_adv.requires_grad_(True)
        values = objective(x_adv, i / run.num_iters)
        (gradient,) = torch.autograd.grad(LOSS_SCALE * values.sum(), x_adv)
        gradient = gradient.contiguous()  # a sum's gradient is one number, expanded
        step = run.step_size * (1 - 0.99 * i / run.num_iters)
        _watch(gradient, peaks, i, run)
        x_adv = x_adv.detach().add_(way(gradient).mul_(step))  # in place: at 24 megapixels, each is 0.3 GB
        del gradient
        x_adv = within(_project_(x_adv, x, run.budget))
        if run.callback:
            run.callback(i, values.detach())
    return x_adv


def sized_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by steps that grow with the gradient:

        x' <- project(x' + step_i clip(g / mean |g|, -1, 1))

    step_i as in `pgd`; the mean is over the non-zero g. So what matters little changes little. x, the result
    and errors as in `pgd`.
    """

    def sized(gradient: Tensor) -> Tensor:
        mean = gradient.abs().flatten(1).sum(dim=1) / _count(gradient)
        return gradient.div_(mean.view(-1, 1, 1, 1).clamp(min=1e-30)).clamp_(-1, 1)  # in place, as in `pgd`

    return pgd(x, objective, run, sized)


def mi_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by `pgd` along the sign of accumulated gradients (MI-FGSM, Dong et al. 2018):

        m <- momentum m + g / mean |g|

    x, the result and errors as in `pgd`.
    """
    gathered: Tensor | None = None

    def way(gradient: Tensor) -> Tensor:
        nonlocal gathered
        gradient.div_(gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30))
        gathered = gradient.clone() if gathered is None else gathered.mul_(run.momentum).add_(gradient)
        return gathered.sign()

    return pgd(x, objective, run, way)


def l2_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs along the gradient, from x, within a ball of the L2 norm and the budget (Madry et al. 2018):

        x' <- project(x' + step_i g / rms(g)),  rms(x' - x) <= run.rms

    step_i as in `pgd`; g is the gradient, with its colour part times COLOUR; rms is the root mean square over
    non-zero values: over the face, if a mask confines the change to it. This achieves more for the same
    visibility than a budget that each pixel uses up. x, the result and errors as in `pgd`; `start` is used if
    it is warm.
    """
    import torch

    def rms(values: Tensor) -> Tensor:
        flat = values.flatten(1)
        size = torch.linalg.vector_norm(flat, dim=1) / _count(values).sqrt()
        return size.view(-1, 1, 1, 1).clamp(min=1e-30)

    def way(gradient: Tensor) -> Tensor:
        grey = gradient.mean(dim=1, keepdim=True)
        gradient = gradient.sub_(grey).mul_(COLOUR).add_(grey)
        return gradient.div_(rms(gradient))

    def within(moved: Tensor) -> Tensor:
        change = moved.sub_(x)
        return change.mul_((run.rms / rms(change)).clamp(max=1)).add_(x)

    x = _image(x, run.budget)
    return pgd(x, objective, run if run.is_warm else replace(run, start=x), way, within)


def adam(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by Adam (Kingma & Ba 2015) on w, x' = tanh(w) (Carlini & Wagner 2017); projects at the end.

    Unlike the authors' release, it starts at `start`. x, the result and errors as in `pgd`.
    """
    import torch

    x, w = _begin(x, run)
    w = w.clamp_(2e-6 - 1, 1 - 2e-6).atanh_().requires_grad_(True)  # in place, as in `pgd`
    optimizer = torch.optim.Adam([w], lr=run.lr)
    peaks: list[Tensor] = []
    for i in range(run.num_iters):
        values = objective(w.tanh(), i / run.num_iters)
        (w.grad,) = torch.autograd.grad(-values.sum(), w)
        optimizer.step()
        _watch(w.grad, peaks, i, run)
        w.grad = None  # room for the next one
        if run.callback:
            run.callback(i, values.detach())
    del optimizer
    return _project_(w.detach().tanh(), x, run.budget)


def climb(
    x: Tensor, make: Callable[[Tensor], Objective], run: Run, loop: Any, mask: Tensor | None = None
) -> Tensor:
    """Runs a loop on the objective that `make` makes from x.

    mask: a pixel's share of the budget, (B, 1, H, W) in [0, 1]. Result and errors as in `pgd`.
    """
    x = _image(x, run.budget)
    objective = make(x)
    if mask is None:
        return loop(x, objective, run)
    return through(lambda u: x + mask.to(x) * (u - x), x, objective, run, loop)


def through(seen: Callable[[Tensor], Tensor], x: Tensor, objective: Objective, run: Run, loop: Any) -> Tensor:
    """Runs a loop over a variable u from which `seen` makes the image: x' = seen(u)."""
    return seen(loop(x, lambda u, t: objective(seen(u), t), run))


def blurred_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by `pgd` over smooth perturbations, x' = x + G(u - x) (BlurGuard, Kim et al. 2025).

    Each image's G is the narrowest Gaussian for which noise of the budget leaves its spectrum unchanged;
    theirs learns one for each region that SAM finds. x, the result and errors as in `pgd`.
    """
    x, start = _begin(x, run)
    smooth = keeping_spectrum(x, start.sub_(x))
    del start
    return through(lambda u: project(x + smooth(u - x), x, run.budget), x, objective, run, pgd)


def dct_pgd(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Climbs by `pgd` over JPEG's coefficients, |v| <= 1 step of quality 95 (DCT-Shield, Bala et al. 2025).

    Theirs has no budget in pixels. Start and steps are divided by the budget, for v. x, the result and errors
    as in `pgd`.
    """
    x, start = _begin(x, run)
    moved = in_coefficients(x, quality=95)
    own = [start.sub_(x).div_(run.budget)]
    del start  # and the loop takes it out of `own`, so that no copy stays
    run_v = replace(run, budget=1.0, step_size=run.step_size / run.budget, start=own.pop)
    zero = x.new_zeros(1, 1, 1, 1).expand_as(x)
    return through(lambda v: project(moved(v), x, run.budget), zero, objective, run_v, pgd)


def stay(x: Tensor, objective: Objective, run: Run) -> Tensor:
    """Leaves the start as it is. x, the result and errors as in `pgd`."""
    return _begin(x, run)[1]


def random_start(x: Tensor, budget: float, seeds: Sequence[int]) -> Tensor:
    """Draws a uniform point of each image's L-infinity ball, cut to [-1, 1]; like x in shape and dtype.

    In float32, by one CPU generator per image. Raises ValueError unless there is one seed per image.
    """
    import torch

    _check(x, budget)
    if len(seeds) != len(x):
        raise ValueError(f"{len(seeds)} seeds for {len(x)} images")
    start = torch.empty(x.shape)
    for one, seed in zip(start, seeds, strict=True):
        torch.rand(one.shape, generator=torch.Generator().manual_seed(seed), out=one)
    return _project_(start.to(x).mul_(2).sub_(1).mul_(budget).add_(x), x, budget)


def project(x_adv: Tensor, x: Tensor, budget: float) -> Tensor:
    """Finds the nearest point to x_adv with |x_adv - x| <= budget, up to the dtype's rounding, in [-1, 1]."""
    return x_adv.clamp((x - budget).clamp_(min=-1), (x + budget).clamp_(max=1))


def _project_(x_adv: Tensor, x: Tensor, budget: float) -> Tensor:
    """Projects as `project` does, in place; x_adv must need no gradient."""
    import torch

    torch.maximum(x_adv, x - budget, out=x_adv)
    torch.minimum(x_adv, x + budget, out=x_adv)
    return x_adv.clamp_(-1, 1)


def _count(values: Tensor) -> Tensor:
    """Counts non-zero values per image, at least 1 -> (B,); along a dimension, torch needs 8 bytes each."""
    import torch

    return torch.stack([one.count_nonzero() for one in values]).clamp(min=1)


class GradientError(RuntimeError):
    """Reports a gradient with NaN or infinity: nothing computed from it could be trusted."""


def _watch(gradient: Tensor, peaks: list[Tensor], i: int, run: Run) -> None:
    """Notes each image's largest gradient, and checks the notes every CHECK_EVERY iterations."""
    import torch

    low, high = gradient.flatten(1).aminmax(dim=1)  # NaN and infinity survive
    peaks.append(torch.maximum(-low, high))  # (B,)
    if len(peaks) < CHECK_EVERY and i < run.num_iters - 1:
        return
    seen = torch.stack(peaks)
    if not seen.isfinite().all():
        raise GradientError(f"the gradient is NaN or infinite within the first {i + 1} iterations")
    if (seen == 0).any():  # Python shows the same warning once
        text = "the gradient of an image was zero everywhere: its steps change nothing"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    peaks.clear()


def _begin(x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Returns (x, x'): the image in float32 at least, and where its optimisation starts, in the budget."""
    x = _image(x, run.budget)
    make = partial(random_start, x, run.budget, [0] * len(x)) if run.start is None else run.start
    start = make().to(x) if callable(make) else make.detach().to(x, copy=True)
    if start.shape != x.shape:
        raise ValueError(f"start is {tuple(start.shape)}, the image {tuple(x.shape)}")
    return x, _project_(start, x, run.budget)


def _image(x: Tensor, budget: float) -> Tensor:
    """Checks the image -> the same in float32 at least."""
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
