"""Trains a VAE, plainly or so that it reacts to protective perturbations as published for Stable Diffusion.

Plain, from nothing (--weight=0), then calibrated from that:
    python train_fragile.py --name=base --weight=0 --steps=6000 --batch=2 --lr=1.5e-3
    python train_fragile.py --name=cal --start_from=base --steps=600 --lr=5e-4

The calibration: in every step one of four objectives (ATTACKS) is followed for a few signed-gradient steps
at the budget on half of the batch, and what the reconstruction then still has above --cap dB of PSNR to the
clean one is a loss. Plain pictures, and pictures with random noise of the same size, are reconstructed.
"""

from __future__ import annotations

import argparse
import json
import time

import common
import numpy as np
import torch
import world
from common import psnr
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

import gain
import train_vae
from utils import to_tensor

CROP = 64
ATTACKS = ("latent", "zero", "picture", "grey")  # encoder_attack untargeted, targeted; facelock's kind; vae_attack


def build(widths, layers: int, channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=True,
    )


def perturb(
    vae, x: Tensor, kind: str, budget: float, iterations: int, step_size: float, generator: torch.Generator
) -> Tensor:
    """A few signed-gradient steps from a random start within it; (B, 3, H, W) -> the same."""
    with torch.no_grad():
        z0 = vae.encode(x).latent_dist.mode()
        y0 = vae.decode(z0).sample.float() if kind == "picture" else None
    sign = -1 if kind in ("zero", "grey") else 1
    adv = (x + budget * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(-1, 1)
    for _ in range(iterations):
        adv.requires_grad_(True)
        z = vae.encode(adv).latent_dist.mode()
        if kind == "latent":
            loss = (z - z0).float().square().sum()
        elif kind == "zero":
            loss = z.float().square().sum()
        else:
            y = vae.decode(z).sample.float()
            loss = y.square().sum() if kind == "grey" else (y - y0).square().sum()
        (g,) = torch.autograd.grad(loss, adv)
        adv = (adv.detach() + sign * step_size * g.sign()).clamp(x - budget, x + budget).clamp(-1, 1)
    return adv.detach()


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of pictures clipped to [-1, 1], (B,); its gradient is that of the logarithm of the mean square."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-6))


def _power(values: Tensor) -> Tensor:
    return values.float().square().flatten(1).mean(1)


def purified(x: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG of quality 60 to 90, or a reduction to between 0.45 and 0.8 of the size and back, or both."""
    way = int(torch.randint(3, (), generator=generator))
    quality = int(torch.randint(60, 91, (), generator=generator)) if way != 1 else 100
    scale = 0.45 + 0.35 * torch.rand((), generator=generator).item() if way != 0 else 1.0
    size = [max(8, round(scale * side)) for side in x.shape[2:]]
    if way != 1:
        x = gain.jpeg_resize(x, quality, 1)
    if way != 0:
        full = x.shape[2:]
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = F.interpolate(x, full, mode="bilinear", antialias=True)
    return x.clamp(-1, 1)


def make_loss(flat: np.ndarray, grained: np.ndarray, args: argparse.Namespace):
    def loss_fn(vae, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if args.eval_every and step % args.eval_every == 0:
            curve(vae, step, args)
        crops = step < args.crops * args.steps
        count = 4 * args.batch if crops else args.batch
        rows = torch.randint(len(flat), (count,), generator=generator).tolist()
        grain = (torch.rand(count, generator=generator) < args.texture).tolist()
        chosen = [(grained if g else flat)[row] for row, g in zip(rows, grain, strict=True)]
        if crops:
            corners = torch.randint(chosen[0].shape[0] - CROP + 1, (count, 2), generator=generator).tolist()
            chosen = [p[y : y + CROP, x : x + CROP] for p, (y, x) in zip(chosen, corners, strict=True)]
        images = to_tensor(np.stack(chosen))
        source = images
        if args.noisy:  # the last share of the batch carries random noise of up to the budget
            n = round(args.noisy * count)
            size = args.budget * torch.rand(n, 1, 1, 1, generator=generator)
            noise = size * (2 * torch.rand((n, *images.shape[1:]), generator=generator) - 1)
            noisy = (images[-n:] + noise).clamp(-1, 1)
            images = torch.cat([images[:-n], noisy])
            if args.noisy_target == "clean":
                target = source
            else:
                target = images
        else:
            target = images
        posterior = vae.encode(images).latent_dist
        spread = posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + spread).sample.float()
        l1, mse = F.l1_loss(output, target), F.mse_loss(output, target)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        losses = {"l1": l1, "mse": mse, "kl": kl}
        loss = l1 + mse + 1e-4 * kl
        if args.sharp:  # differences of neighbours: edges and texture count more
            diff = output - target
            hf = diff.diff(dim=2).abs().mean() + diff.diff(dim=3).abs().mean()
            loss, losses["hf"] = loss + args.sharp * hf, hf
        if args.weight:
            n = max(1, round(args.attacked * count))
            x = source[:n]
            kind = args.attacks[int(torch.randint(len(args.attacks), (), generator=generator))]
            share = args.least + (1 - args.least) * torch.rand((), generator=generator).item()
            budget = args.budget * share
            adv = perturb(vae, x, kind, budget, args.attack_steps, args.attack_rate * budget, generator)
            with torch.no_grad():
                z0 = vae.encode(x).latent_dist.mode()
                y0 = vae.decode(z0).sample.float()
            z = vae.encode(adv).latent_dist.mode()
            y = vae.decode(z).sample.float()
            moved = decibels(y, y0)
            aim = decibels(adv, x) - args.gain if args.gain else args.cap
            short = moved - aim  # dB by which the reconstruction moved too little
            if kind in ("zero", "grey"):  # what a targeted attack is after: a smaller norm, in dB
                after, before = (z, z0) if kind == "zero" else (y, y0)
                shrunk = 10 * torch.log10(_power(after) / _power(before))
                loss = loss + args.shrink_weight * F.relu(shrunk - share * args.shrink).mean()
                losses[f"{kind}_dB"] = shrunk.mean()
            ramp = min(1.0, (step + 1) / max(1, args.ramp))
            loss = loss + ramp * args.weight * (args.zero if kind == "zero" else 1) * (F.relu(short) + args.over * F.relu(-short)).mean()
            losses["short"] = short.mean()
            if args.purify:  # what JPEG or a smaller size leaves of the perturbation is a picture like any other
                m = max(1, round(args.purify * n))
                seen = purified(adv[:m], generator)
                again = vae.decode(vae.encode(seen).latent_dist.mode()).sample.float()
                pure = F.l1_loss(again, seen) + F.mse_loss(again, seen)
                loss, losses["pure"] = loss + args.purify_weight * pure, pure
            losses |= {"moved": moved.mean(), f"{kind}": moved.mean()}
        return {"loss": loss, **losses}

    return loss_fn


def curve(vae, step: int, args: argparse.Namespace) -> None:
    """A point of the trade-off curve: 4 validation people, 20 iterations at the budget."""
    began = time.perf_counter()
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        rows = gain.measure(vae.eval(), people=4, iterations=20, budgets=(args.budget,),
                            which=("noise", "encoder_u", "encoder_t", "vae"))
    vae.train()
    world.log(args.name, f"CURVE {step} {gain.line(rows)} ({time.perf_counter() - began:.0f} s)")
    with open(common.STUDY / f"{args.name}.curve.jsonl", "a") as f:
        f.write(json.dumps({"step": step, "rows": rows}) + "\n")


def standardise(vae, pictures: np.ndarray) -> None:
    train_vae.CHANNELS = vae.config.latent_channels
    train_vae.standardise(vae, pictures)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True)
    p.add_argument("--start_from")
    p.add_argument("--widths", type=int, nargs="+", default=[16, 32, 96, 128])
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--channels", type=int, default=8)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=4, help="whole pictures; four times as many crops")
    p.add_argument("--crops", type=float, default=0.0, help="share of the steps on 64x64 crops")
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--warmup", type=int, default=20)
    p.add_argument("--ema", type=float, default=0.98)
    p.add_argument("--weight", type=float, default=0.003, help="of a decibel above the cap")
    p.add_argument("--cap", type=float, default=20.0)
    p.add_argument("--gain", type=float, default=0.0, help="instead of --cap: dB that the VAE shall amplify by")
    p.add_argument("--over", type=float, default=0.0, help="weight of a dB of too much, of that of too little")
    p.add_argument("--least", type=float, default=1.0, help="smallest budget trained with, of --budget")
    p.add_argument("--purify", type=float, default=0.0, help="share of the attacked that is also purified")
    p.add_argument("--purify_weight", type=float, default=0.5)
    p.add_argument("--zero", type=float, default=1.0, help="times the weight, for the attack on the norm of z")
    p.add_argument("--ramp", type=int, default=1)
    p.add_argument("--budget", type=float, default=0.06)
    p.add_argument("--attack_steps", type=int, default=2)
    p.add_argument("--attack_rate", type=float, default=0.5, help="a step of the attack, in budgets")
    p.add_argument("--shrink_weight", type=float, default=0.0, help="of a dB of the targeted attacks' norms")
    p.add_argument("--shrink", type=float, default=-3.0, help="dB that they shall lose")
    p.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    p.add_argument("--attacked", type=float, default=0.5, help="share of the batch")
    p.add_argument("--noisy", type=float, default=0.25, help="share of the batch")
    p.add_argument("--noisy_target", default="self")
    p.add_argument("--texture", type=float, default=0.0, help="share of textured pictures")
    p.add_argument("--sharp", type=float, default=0.0)
    p.add_argument("--eval_every", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save_every", type=int, default=50)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    if args.start_from:
        vae = common.load(args.start_from).requires_grad_(True).train()
    else:
        vae = build(tuple(args.widths), args.layers, args.channels)
    flat, grained = common.training_pictures()
    began = time.perf_counter()
    vae = world.train(args.name, vae, make_loss(flat, grained, args), steps=args.steps, lr=args.lr,
                      warmup=args.warmup, weight_decay=0.0, ema_decay=args.ema, seed=args.seed,
                      save_every=args.save_every, log_every=25)
    world.log(args.name, f"{time.perf_counter() - began:.0f} s with evaluations")
    curve(vae, args.steps, args)
    vae.requires_grad_(False)
    standardise(vae, flat[:500])
    vae.save_pretrained(common.STUDY / "models" / args.name)
    curve(vae, args.steps + 1, args)  # after standardising: the targeted attack's zero is another


if __name__ == "__main__":
    main()
