"""The defenses: image tensors in, protected image tensors out. Objectives and their table.

Every image is float32 or float64 (B, 3, H, W) RGB in [-1, 1]; every budget and step is an L-infinity size in
that range (0.03 is 3.8/255 of a pixel). Notation: x is the clean image, x' the optimised one, E and D are
the VAE's encoder (the latent mean) and decoder, z0 = E(x), z = E(x') and y = clip(D(z), -1, 1). An editor
that is given the image as z, and no words, predicts the noise eps(z_k, k, z) in z_k = sqrt(a_k) s z +
sqrt(1 - a_k) e, with timestep k (K is the first), noise e, a_k of alphas_cumprod, s the scale of its latents.

A defense is a function that takes x and what it needs (`vae`, `face_similarity`, ...) and returns its
objective, which a loop of loops.py maximises: a function of (x', t) that returns one value per image, (B,);
t in [0, 1) is the share of iterations done. To add a defense, write that function and enter it in METHODS: a
parameter without a default is something that protection.py must offer, one with a default is a flag.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from images import MOST_PIXELS
from loops import (
    Objective,
    Run,
    adam,
    blurred_pgd,
    climb,
    dct_pgd,
    l2_pgd,
    mi_pgd,
    pgd,
    sized_pgd,
    stay,
)
from transforms import Draws, Window, chains, normal, uniform

if TYPE_CHECKING:  # torch is imported where it is used, so that --help lists METHODS at once
    from torch import Tensor

# Facelock's weight and schedule, those of the authors' release.
LATENT_WEIGHT = 0.2
PERCEPTUAL_FROM = 0.25  # share of the iterations after which the LPIPS term is on
FACE_FROM = 0.35  # share of the iterations from which the face term is on

MIX = "resize+mirror+light,rotate+shift,resize+mirror+blur"  # what facelock_dim's samples are seen through
LOOKS = "pose+noise+hide,pose+blur+hide"  # ... and facelock_wide's
# what may happen to a picture before it is edited; only coarse changes survive it
WASHING = "coarse+jpeg,coarse+shrink,coarse+shrink+jpeg"

# ---------------------------------------------------------------------------------------------------------
# the defenses


def noise(x: Tensor) -> Objective:
    """Keeps uniform noise of the whole budget, as a control: the objective is 0."""
    return lambda x_adv, t: 0 * _norm(x_adv)


def instant(x: Tensor, refine: int = 0) -> Objective:
    """Keeps what the network of --protector returns at once: the objective is 0.

    refine: number of iterations that follow, of the method that the network was trained on.
    """
    return noise(x)


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
    """Moves the latent by a small change (L2 attack of Carlini & Wagner 2017, on the encoder; for `adam`):

        -(sum(((x' - x) / 2)^2) + c f)
        targeted:    f = ||z||_2
        untargeted:  f = -sum over rows of each channel of ||z - z0||_2, as in the authors' release
    """
    z0 = _encode(vae, x).detach()

    def f(z: Tensor) -> Tensor:
        rows = ((z - z0).square().sum(dim=-1) + 1e-8).sqrt()  # (B, C, h/8); its gradient at 0 is defined
        return _norm(z) if targeted else -rows.flatten(1).sum(dim=1)

    def objective(x_adv: Tensor, t: float) -> Tensor:
        change = (x_adv - x).square().flatten(1).sum(dim=1) / 4  # (B,)
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
    x: Tensor,
    vae: Any,
    face_similarity: Callable[[Tensor], Tensor],
    face_window: Window,
    generators: Draws,
    transforms: str = MIX,
    samples: int = 4,
) -> Objective:
    """Removes the face from the reconstruction, seen through random transforms T (DIM, Xie et al. 2019):

        -mean over samples of cos(f(T(y)), f(x))

    T is centred on the face, in its surroundings, `face_window`.
    """
    similarity = eot(lambda y, t: face_similarity(y), transforms, generators, samples, face_window)
    return lambda x_adv, t: -similarity(_decode(vae, _encode(vae, x_adv)).clamp(-1, 1), t).to(x_adv.dtype)


def facelock_wide(
    x: Tensor,
    vae: Any,
    face_similarity: Callable[[Tensor], Tensor],
    face_window: Window,
    generators: Draws,
    transforms: str = LOOKS,
    samples: int = 2,
    wash: str = "none",
) -> Objective:
    """Removes the face from the reconstruction, for unseen recognisers, too, by many strong transforms T:

        -mean over samples of cos(f(T(y)), f(x)),  y = clip(D(E(W(x'))), -1, 1)

    Several recognisers f are best, by the mean of their similarities. T as in `facelock_dim`; W is what
    happens to the picture before it is edited: nothing, or, for facelock-wash, JPEG and resizing.
    """
    similarity = eot(lambda y, t: face_similarity(y), transforms, generators, samples, face_window)
    ways = itertools.cycle(chains(wash))

    def objective(x_adv: Tensor, t: float) -> Tensor:
        y = _decode(vae, _encode(vae, next(ways)(x_adv, generators))).clamp(-1, 1)
        return -similarity(y, t).to(x_adv.dtype)

    return objective


def eot(
    objective: Objective, transforms: str, generators: Draws, samples: int, window: Window | None = None
) -> Objective:
    """Averages an objective over random transforms of its image (EOT, Athalye et al. 2018):

        mean over samples of objective(T(image), t)

    transforms: as `transforms.chains` reads them; they alternate, also from call to call. window: what
    geometric transforms are centred on, by default the whole image.
    """
    ways = itertools.cycle(chains(transforms))

    def mean(image: Tensor, t: float) -> Tensor:
        return sum(objective(next(ways)(image, generators, window), t) for _ in range(samples)) / samples

    return mean


# ---------------------------------------------------------------------------------------------------------
# other papers' defenses (settings: docs/methods.md); k, e and T are drawn anew in each iteration


def photoguard(x: Tensor, vae: Any, editor: Any, generators: Draws, unrolled: int = 4) -> Objective:
    """Drives a short edit to grey (the diffusion attack of Salman et al. 2023): -||D(DDIM(e, z))||_2

    DDIM takes `unrolled` steps from k = K to 0, all of them with gradient. Theirs inpaints with guidance 7.5;
    an edit without words, where guidance cancels, stands in.
    """
    return _of_latent(vae, lambda z: -_norm(_decode(vae, editor.edit(z, normal(generators, z), unrolled))))


def advdm(x: Tensor, vae: Any, editor: Any, generators: Draws) -> Objective:
    """Makes the image hard to denoise (AdvDM, Liang et al. 2023): mean((eps(z_k, k, z) - e)^2)"""
    return _of_latent(vae, lambda z: _mean_square(_misjudged(editor, z, generators)))


def sds(x: Tensor, vae: Any, editor: Any, generators: Draws, targeted: bool = True) -> Objective:
    """Drives the latent along the denoiser's error, without its gradient (Diff-Protect, Xue et al. 2024):

        targeted (SDS-, easily denoised):  -mean(g z),  g = eps(z_k, k, z) - e taken as a constant
        untargeted (SDS+):                  mean(g z)
    """

    def along(z: Tensor) -> Tensor:
        g = _misjudged(editor, z.detach(), generators)
        return (-1 if targeted else 1) * (g * z).flatten(1).mean(dim=1)

    return _of_latent(vae, along)


def mist(x: Tensor, vae: Any) -> Objective:
    """Drives the latent to that of a pattern p (textural term of Mist, Liang & Wu 2023): -mean((z - E(p))^2)

    Their pattern shows the word MIST; here it is a chequerboard of 16 squares on the long side.
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

    Theirs compares noisy latents: the noise, the same in both, cancels and leaves a factor.
    """
    return eot(encoder_attack(x, vae, targeted=False), "crop,blur,rotate", generators, samples=3)


def diffusionguard(x: Tensor, vae: Any, editor: Any, generators: Draws) -> Objective:
    """Makes the editor's first step predict much noise (DiffusionGuard, Choi et al. 2025): ||eps(e, K, z)||_2

    Theirs inpaints through random masks of the face; InstructPix2Pix's conditioning image stands in.
    """
    begin, first = editor.begin, editor.first
    return _of_latent(vae, lambda z: _norm(editor.predict_noise(begin(z, normal(generators, z)), first, z)))


def veto(x: Tensor, vae: Any, attention: Any, generators: Draws) -> Objective:
    """Blurs the attention between the canvas (noised z) and the image (VETO, Grebe et al. 2026):

        mean over a schedule of 10 steps of H(canvas to image) + H(image to canvas),  H = -sum(A log A)

    A is the attention of the first block, mean over heads. As in theirs, the image's z is a constant.
    """
    def entropy(z: Tensor, sigma: float) -> Tensor:
        z_k = attention.noised(z, sigma, normal(generators, z))
        (block,) = attention.blocks(attention.double[:1], z_k, sigma, z.detach())
        return block.entropy("canvas", "image") + block.entropy("image", "canvas")

    return _of_latent(vae, lambda z: sum(entropy(z, sigma) for sigma in attention.schedule(z, 10)) / 10)


def decontext(x: Tensor, vae: Any, attention: Any, generators: Draws) -> Objective:
    """Turns a canvas of noise, at 980 to 999 of 1000, away from the image (DeContext, Shen et al. 2025):
    -mean over early single blocks, heads and canvas tokens of the share of attention paid to the image"""
    early = attention.single[: round(26 / 38 * len(attention.single))]  # theirs are 26 of 38

    def turned(z: Tensor) -> Tensor:
        sigma = uniform(generators, 980, 1000, z).floor() / 1000
        blocks = attention.blocks(early, normal(generators, z), sigma, z)
        return -sum(block.share("canvas", "image") for block in blocks) / len(early)

    return _of_latent(vae, turned)


def _of_latent(vae: Any, value: Callable[[Tensor], Tensor]) -> Objective:
    """Makes an objective of a function of z alone."""
    return lambda x_adv, t: value(_encode(vae, x_adv))


def _misjudged(editor: Any, z: Tensor, generators: Draws) -> Tensor:
    """Computes eps(z_k, k, z) - e, with each image's own timestep k and noise e: like z"""
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
# the table


class Method(NamedTuple):
    """Describes a defense: its objective, the loop that maximises it, and what the loop reads of `Run`.

    version: raise it when the method's pixels change, for whatever reason: earlier results then no longer
    count as finished. tests/test_golden.py detects such a change.
    """

    objective: Callable[..., Objective]
    loop: Callable[[Tensor, Objective, Run], Tensor] = pgd
    reads: tuple[str, ...] = ("step_size", "num_iters")  # beside budget and start
    fp32: bool = False  # networks in float32 whatever --dtype says
    run: Run = Run()  # its own defaults; lr is the same for all
    mask: str = "none"  # its own --budget_mask
    is_network: bool = False  # whether it starts where a network says, not at random
    most_pixels: int = MOST_PIXELS  # of an image, limited by the loop's memory
    version: int = 1

    @property
    def parameters(self) -> dict[str, Any]:
        """Lists what the objective takes besides x: knobs with their defaults, needs with `NEED`."""
        parameters = list(inspect.signature(self.objective).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def protect(self, x: Tensor, run: Run | None = None, mask: Tensor | None = None, **offers: Any) -> Tensor:
        """Runs the loop on the objective of x and `offers`, as `climb` does. run: default: the method's."""
        return climb(x, partial(self.objective, **offers), run or self.run, self.loop, mask)

    def refined(self, after: Method, refine: int) -> Method:
        """Returns a network's method plus `refine` iterations of `after`, which it was trained on."""
        run = replace(after.run, num_iters=refine)
        return after._replace(run=run, mask=self.mask, is_network=True, version=self.version)


NEED = inspect.Parameter.empty
L2 = ("step_size", "num_iters", "rms")  # what l2_pgd reads
MI = ("step_size", "num_iters", "momentum")  # what mi_pgd reads
WIDE = Run(0.2, step_size=0.015, num_iters=32)
METHODS: dict[str, Method] = {
    "noise": Method(noise, stay, reads=()),
    "encoder": Method(encoder_attack),
    "vae": Method(vae_attack),
    "cw": Method(  # Adam sees a gradient's size
        cw_l2_attack, adam, reads=("num_iters", "lr"), fp32=True, most_pixels=MOST_PIXELS // 2
    ),
    "facelock": Method(facelock),
    "facelock-dim": Method(facelock_dim, sized_pgd, run=Run(0.11, step_size=0.04, num_iters=16), mask="face"),
    "facelock-wide": Method(facelock_wide, l2_pgd, L2, run=WIDE, mask="face"),
    "facelock-wash": Method(
        partial(facelock_wide, wash=WASHING), l2_pgd, L2, run=WIDE, mask="face",
        version=2, most_pixels=MOST_PIXELS // 4
    ),
    "instant": Method(instant, stay, reads=(), mask="face", is_network=True, version=3),
    "photoguard": Method(photoguard),
    "advdm": Method(advdm),
    "sds": Method(sds),
    "mist": Method(mist),
    "pid": Method(pid),
    "editshield": Method(editshield, most_pixels=MOST_PIXELS // 5),
    "diffusionguard": Method(diffusionguard),
    "blurguard": Method(encoder_attack, blurred_pgd, most_pixels=MOST_PIXELS // 4),
    "dctshield": Method(encoder_attack, dct_pgd, most_pixels=MOST_PIXELS // 2),
    "veto": Method(veto, mi_pgd, MI, run=Run(8 / 255, 4 / 255), most_pixels=MOST_PIXELS // 2),
    "decontext": Method(decontext, run=Run(0.1, 0.005, 800)),
}
# For users: what a method is for, what one sees, what destroys it, and how long it takes on two CPU cores at
# 512 px, with a tiny autoencoder and three recognisers. The other methods are for comparison.
RECOMMENDED = {
    "facelock-wide": "For a picture that reaches the editor unchanged. Visible as freckles and wrinkles "
    "on the face, not elsewhere. JPEG and resizing undo much of it. Two minutes on two CPU cores.",
    "facelock-wash": "For a picture that is compressed or resized on its way. Looks like facelock-wide. "
    "JPEG and resizing together undo up to a quarter. Two to three minutes on two CPU cores.",
    "facelock-dim": "Quicker, for a picture that reaches the editor unchanged. More visible, as grain "
    "on the face. JPEG and resizing undo much of it. A minute on two CPU cores.",
    "instant": "At once, by a network for this autoencoder. Visible as a pattern on the face, "
    "much the same for everybody. JPEG and resizing undo much of it. A tenth of a second.",
}
