"""Trains the mini editor's autoencoder (diffusers' AutoencoderKL, f=8, 5 channels) -> assets/mini/editor/vae

Training has two steps; a killed one resumes from its last checkpoint when started again:
    python mini/train_vae.py --out=mini/checkpoints/plain
    python mini/train_vae.py --calibrate --start_from=mini/checkpoints/plain --steps=900 --batch=12 --lr=6e-4

The second makes the VAE react to protective perturbations as Stable Diffusion's does. A VAE of this size,
trained on these pictures alone, passes perturbations on unchanged. So every training step attacks pictures by
a few signed-gradient steps and rewards the reconstruction for moving, up to GAIN decibels more than the
picture itself. Plain pictures, noisy pictures, and attacked pictures after JPEG or downscaling are
reconstructed as before. The VAE is a stand-in, tuned to react as published; this says nothing about why real
VAEs react.

With --ramp the calibration's weight grows from 0; without it, the first steps spoil all pictures. A VAE that
is trained from scratch learns the difference between green and magenta last, or never: --colour_weight adds
the error of colour differences, and pulls one channel towards green - magenta.

Latents of training portraits have zero mean and unit standard deviation before the calibration, and a common
scale after it, folded into the 1x1 convolutions around the latent. So scaling_factor is 1, and the image
latents, which the InstructPix2Pix pipeline does not scale, have the scale of those that it denoises.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import crops
import numpy as np
import portraits
import torch
import world
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from images import save_png, to_tensor, to_uint8
from utils import pick_device, positive_int

CHANNELS = 5  # of the latent; Stable Diffusion's has 4
GUIDED = 4  # the channel that --colour_weight pulls to green - magenta
CROP = 64  # px; a quarter of the cost of a whole picture
VARIATIONS = 4  # pictures per identity
CENTRE = (slice(36, 100), slice(32, 96))  # rows and columns of the face, whose PSNR is reported separately

# The calibration. One attack is drawn per step: the targeted encoder attack ("zero"), the VAE attack ("grey")
# or the untargeted encoder attack ("latent"); the first needs the most training, and is listed three times.
ATTACKS = ("zero", "zero", "zero", "grey", "latent")
BUDGET = 0.06  # the largest; the smallest is 0.8 times as large
ATTACK_STEPS, ATTACK_RATE = 5, 0.3  # signed-gradient steps, each 0.3 of the budget
GAIN = 11.0  # dB that the reconstruction should move more than the picture
WEIGHT = 0.003  # per dB too little; four times that for the targeted attack
OVER = 0.25  # per dB too much, as a share of WEIGHT
SHRINK, SHRINK_WEIGHT = -4.0, 0.01  # dB by which a targeted attack should reduce the norm that it minimises
PURE_WEIGHT = 0.2  # of the reconstruction loss of purified attacks


def build(channels: int = CHANNELS, layers: int = 2) -> AutoencoderKL:
    """Makes the untrained autoencoder with a real one's structure. layers: per block."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=layers,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,  # FLUX's pipelines read it
        force_upcast=False,
        mid_block_add_attention=True,
    )


def requests(identities: range, variations: int, seed: int) -> list[world.Request]:
    """Lists `variations` pictures of each identity, about two thirds of them edited."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 25, (len(identities), variations))
    plain = rng.random((len(identities), variations)) < 1 / 3
    return [
        (identity, variation, None if plain[row, variation] else int(prompts[row, variation]))
        for row, identity in enumerate(identities)
        for variation in range(variations)
    ]


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """Computes the PSNR of images (B, 3, H, W), clipped to [-1, 1] -> dB (B,)."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-6))


def power(values: Tensor) -> Tensor:
    """Computes the mean square of each: (B, ...) -> dB (B,)."""
    return 10 * torch.log10(values.float().square().flatten(1).mean(1))


def opponents(images: Tensor) -> Tensor:
    """Computes colour differences, green - magenta and red - blue: (B, 3, H, W) -> (B, 2, H, W)."""
    red, green, blue = images.unbind(1)
    return torch.stack([green - (red + blue) / 2, red - blue], dim=1)


def loss_of(vae: AutoencoderKL, images: Tensor, target: Tensor, noise: Tensor | float, kl_weight: float):
    """Computes L1 + MSE + a tiny KL -> named scalars. noise: the latent's distance from the mean, in std."""
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    l1, mse = F.l1_loss(output, target), F.mse_loss(output, target)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    shown = F.avg_pool2d(opponents(images)[:, 0], 8)  # green - magenta at the latent's size
    return {
        "loss": l1 + mse + kl_weight * kl,
        "l1": l1,
        "mse": mse,
        "kl": kl,
        "colour": F.l1_loss(opponents(output), opponents(target)),
        "guide": F.mse_loss(mean[:, GUIDED], 8 * shown),
    }


def make_loss(pictures: np.ndarray, args: argparse.Namespace):
    """Makes the loss. Plain training sees crops for three fifths of the steps, then whole pictures.

    A whole picture has the pixels of four crops, so a batch of either costs the same.
    """
    device = pick_device(args.device)

    def loss_fn(vae: AutoencoderKL, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        crop = step < 0.6 * args.steps and not args.calibrate
        count = args.batch if crop else max(1, args.batch // 4)
        rows = torch.randint(len(pictures), (count,), generator=generator).tolist()
        chosen = [pictures[row] for row in rows]
        if crop:
            corners = torch.randint(chosen[0].shape[0] - CROP + 1, (count, 2), generator=generator).tolist()
            chosen = [p[y : y + CROP, x : x + CROP] for p, (y, x) in zip(chosen, corners, strict=True)]
        clean = images = to_tensor(np.stack(chosen)).to(device)  # (B, 3, 64, 64) or (B/4, 3, 128, 128)
        if args.calibrate:  # a third of them with random noise, to be reconstructed with it
            noisy = images[-(count // 3) :]
            size = BUDGET * torch.rand(len(noisy), 1, 1, 1, generator=generator)
            noise = size * (2 * torch.rand(noisy.shape, generator=generator) - 1)
            images = torch.cat([images[: -len(noisy)], (noisy + noise.to(device)).clamp(-1, 1)])
        side = images.shape[-1] // 8
        noise = torch.randn(count, vae.config.latent_channels, side, side, generator=generator).to(device)
        losses = loss_of(vae, images, images, noise, args.kl_weight)
        losses["loss"] = losses["loss"] + args.colour_weight * (losses["colour"] + losses["guide"])
        if args.calibrate:
            found = fragility(vae, clean[: -len(noisy)], generator, args.kl_weight)
            share = min(1, (step + 1) / (args.ramp or 1))
            losses = losses | found | {"loss": losses["loss"] + share * found["fragile"]}
        return losses

    return loss_fn


def fragility(
    vae: AutoencoderKL, x: Tensor, generator: torch.Generator, kl_weight: float
) -> dict[str, Tensor]:
    """Computes the calibration's loss on x (B, 3, H, W), which it attacks -> named scalars."""
    kind = ATTACKS[int(torch.randint(len(ATTACKS), (), generator=generator))]
    share = 0.8 + 0.2 * float(torch.rand((), generator=generator))
    adv = perturb(vae, x, kind, share * BUDGET, generator)
    with torch.no_grad():
        z0 = vae.encode(x).latent_dist.mode()
        y0 = vae.decode(z0).sample.float()
    z = vae.encode(adv).latent_dist.mode()
    y = vae.decode(z).sample.float()
    moved = decibels(y, y0)
    short = moved - (decibels(adv, x) - GAIN)  # dB by which the reconstruction moved too little
    weight = WEIGHT * (4 if kind == "zero" else 1)
    loss = weight * (F.relu(short) + OVER * F.relu(-short)).mean()
    if kind != "latent":  # the norm that the attack minimises
        fell = power(z) - power(z0) if kind == "zero" else power(y) - power(y0)
        loss = loss + SHRINK_WEIGHT * F.relu(fell - share * SHRINK).mean()
    seen = purified(adv[:1], generator)
    loss = loss + PURE_WEIGHT * loss_of(vae, seen, seen, 0.0, kl_weight)["loss"]
    return {"fragile": loss, "short": short.mean(), kind: moved.mean()}


def perturb(vae: AutoencoderKL, x: Tensor, kind: str, budget: float, generator: torch.Generator) -> Tensor:
    """Attacks x (B, 3, H, W) within the budget, from a random start -> the same shape."""
    with torch.no_grad():
        z0 = vae.encode(x).latent_dist.mode()
    start = 2 * torch.rand(x.shape, generator=generator) - 1
    adv = (x + budget * start.to(x)).clamp(-1, 1)
    for _ in range(ATTACK_STEPS):
        adv.requires_grad_(True)
        z = vae.encode(adv).latent_dist.mode()
        value = vae.decode(z).sample if kind == "grey" else z - z0 if kind == "latent" else z
        (gradient,) = torch.autograd.grad(value.float().square().sum(), adv)
        step = ATTACK_RATE * budget * (1 if kind == "latent" else -1)  # away from z0, or towards 0
        adv = adv.detach() + step * gradient.sign()
        adv = adv.clamp(x - budget, x + budget).clamp(-1, 1)
    return adv.detach()


def purified(x: Tensor, generator: torch.Generator) -> Tensor:
    """Compresses images (B, 3, H, W) as JPEG, or shrinks them to .45 to .8 and enlarges them, or both."""
    way = int(torch.randint(3, (), generator=generator))
    if way != 1:
        x = crops.jpeg(x, generator)
    if way != 0:
        side = round(x.shape[-1] * (0.45 + 0.35 * float(torch.rand((), generator=generator))))
        for size in (side, x.shape[-1]):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.clamp(-1, 1)


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: np.ndarray, each: bool) -> tuple[Tensor, Tensor]:
    """Normalises the latents of `pictures` to zero mean and unit deviation, without changing reconstructions.

    each: every channel separately; otherwise all channels are divided by one deviation and the mean stays,
    which changes no attack. The scaling goes into quant_conv (whose second half is the log-variance), its
    inverse into post_quant_conv; both are 1x1 and unpadded, so this is exact. Returns mean and std, (C,).
    """
    device = next(vae.parameters()).device
    parts = [encode(vae, pictures[row : row + 32], device) for row in range(0, len(pictures), 32)]
    latents = torch.cat(parts).transpose(0, 1).flatten(1).double()  # (C, N*16*16)
    mean, std = latents.mean(1).float().to(device), latents.std(1).float().to(device)
    if not each:
        mean, std = torch.zeros_like(mean), std.square().mean().sqrt().expand_as(std)
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = vae.config.latent_channels
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    return mean, std


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Encodes (B, H, W, 3) uint8 -> the latents' modes, float32 (B, C, H/8, W/8), on the CPU."""
    return vae.encode(to_tensor(pictures).to(device)).latent_dist.mode().float().cpu()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> np.ndarray:
    """Encodes and decodes (B, H, W, 3) uint8 -> the same shape and type."""
    return to_uint8(vae.decode(vae.encode(to_tensor(pictures).to(device)).latent_dist.mode()).sample)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the PSNR of 8-bit pictures (B, ...) -> dB, (B,)."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10 * np.log10(255**2 / np.maximum(error.reshape(len(a), -1).mean(1), 1e-3))


def reconstructions(
    vae: AutoencoderKL, identities: range, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Renders new people and reconstructs them -> pictures and reconstructions, (N, H, W, 3)."""
    pictures = world.render(requests(identities, VARIATIONS, seed=0))
    batches = [pictures[row : row + 16] for row in range(0, len(pictures), 16)]
    return pictures, np.concatenate([reconstruct(vae, batch, device) for batch in batches])


def evaluate(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Logs the PSNR on validation identities with the written weights in float32, and writes a sheet.

    check.py measures how much the VAE amplifies an attack.
    """
    device = pick_device(args.device)
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    identities = portraits.VALIDATION[: args.eval_identities]
    pictures, outputs = reconstructions(vae, identities, device)
    batches = [pictures[row : row + 16] for row in range(0, len(pictures), 16)]
    latents = torch.cat([encode(vae, batch, device) for batch in batches])
    whole, face = psnr(pictures, outputs), psnr(pictures[:, *CENTRE], outputs[:, *CENTRE])
    world.log(
        name,
        f"{len(pictures)} pictures of {len(identities)} validation identities: "
        f"PSNR {whole.mean():.2f} dB (std {whole.std():.2f}, lowest {whole.min():.2f}), "
        f"face {face.mean():.2f} dB; latents mean {latents.mean():.3f}, std {latents.std():.3f}",
    )
    columns = [np.concatenate(pair) for pair in zip(pictures[:16], outputs[:16], strict=True)]
    save_png(world.WORK / f"{name}.png", np.concatenate(columns, axis=1))
    world.log(name, f"sheet (above the picture, below its reconstruction): {world.WORK / f'{name}.png'}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(
        __doc__, steps=4_500, identities=1_450, batch=16, lr=1e-3, seed=0, out="editor/vae"
    )
    parser.add_argument("--calibrate", action="store_true", help="the second step, from a finished VAE")
    parser.add_argument("--ramp", type=int, default=0, help="steps in which the calibration gets its weight")
    parser.add_argument("--colour_weight", type=float, default=0.0, help="of colours, beside the pictures")
    parser.add_argument("--start_from", type=Path, help="a finished VAE, trained further")
    parser.add_argument("--channels", type=positive_int, default=CHANNELS, help="of the latent of a new one")
    parser.add_argument("--layers", type=positive_int, default=2, help="in each block of a new one")
    parser.add_argument("--first", type=int, default=0, help="identity to train on, --identities from there")
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="of the KL divergence per latent value")
    parser.add_argument("--eval_identities", type=positive_int, default=50, help="of the validation range")
    args = world.parse(parser, argv)
    if args.calibrate and args.batch < 12:
        parser.error(f"--batch {args.batch} is less than the three pictures (12) that --calibrate needs")
    if args.channels <= GUIDED:
        parser.error(f"--channels {args.channels}: at least {GUIDED + 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    name = "vae_calibrated" if args.calibrate else "vae"
    # bfloat16 autocast is 1.8 times as fast as float32 here; channels_last is slower under it.
    vae = build(args.channels, args.layers)
    if args.start_from:
        vae = AutoencoderKL.from_pretrained(args.start_from, dtype=torch.float32)
    people = portraits.TRAIN[args.first :][: args.identities]
    pictures = world.render(requests(people, VARIATIONS, args.seed))
    vae = world.train(
        name,
        vae.to(pick_device(args.device)),
        make_loss(pictures, args),
        steps=0 if args.export_only else args.steps,
        lr=args.lr,
        warmup=20 if args.start_from else 100,
        weight_decay=0.0,
        ema_decay=0.98 if args.start_from else 0.995,
        seed=args.seed,
        flags=args,
        log_every=50,
    )
    mean, std = standardise(vae, pictures[:1000], each=not args.calibrate)
    spread = f"std {std.min():.2f} to {std.max():.2f}"
    world.log(name, f"latents before standardising: |mean| <= {mean.abs().max():.2f}, {spread}")
    vae.half().save_pretrained(args.out)
    evaluate(name, args.out, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
