"""Trains the mini editor's autoencoder (diffusers' AutoencoderKL, f=8, 16 channels) -> assets/mini/editor/vae

About 25 minutes on two CPU cores; a killed run goes on from its last checkpoint when started again:
    python mini/train_vae.py

Export and measure what an unfinished training has reached:
    python mini/train_vae.py --export_only

Latents of training portraits have zero mean and unit standard deviation in every channel: the statistics
are folded into the 1x1 convolutions around the latent when the weights are written. So scaling_factor is 1,
and the image latents, which the InstructPix2Pix pipeline does not scale, are those that it denoises.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import portraits
import torch
import world
from diffusers import AutoencoderKL
from torch.nn import functional as F

from images import save_png, to_tensor, to_uint8
from utils import pick_device, positive_int

NAME = "vae"
CHANNELS = 16  # of the latent; 4 blur at 19 dB
CROP = 64  # px; a quarter of the cost of a whole picture
VARIATIONS = 4  # pictures of each identity
CENTRE = (slice(36, 100), slice(32, 96))  # rows, columns of the face: its PSNR is reported by itself


def build() -> AutoencoderKL:
    """Makes the untrained autoencoder, 0.97 M parameters.

    No attention in the middle: that of a crop would not be that of a whole picture.
    """
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def requests(identities: range, variations: int, seed: int) -> list[world.Request]:
    """Lists `variations` pictures of each identity, two of three of them edited."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 25, (len(identities), variations))
    plain = rng.random((len(identities), variations)) < 1 / 3
    return [
        (identity, variation, None if plain[row, variation] else int(prompts[row, variation]))
        for row, identity in enumerate(identities)
        for variation in range(variations)
    ]


def make_loss(pictures: np.ndarray, args: argparse.Namespace):
    """Makes the loss: L1 + MSE + a tiny KL, on crops for three quarters of the steps, then on whole pictures.

    A whole picture has the pixels of four crops, so a batch of either costs the same.
    """
    device = pick_device(args.device)

    def loss_fn(vae: AutoencoderKL, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        crops = step < 0.75 * args.steps
        count = args.batch if crops else max(1, args.batch // 4)
        rows = torch.randint(len(pictures), (count,), generator=generator).tolist()
        chosen = [pictures[row] for row in rows]
        if crops:
            corners = torch.randint(chosen[0].shape[0] - CROP + 1, (count, 2), generator=generator).tolist()
            chosen = [p[y : y + CROP, x : x + CROP] for p, (y, x) in zip(chosen, corners, strict=True)]
        images = to_tensor(np.stack(chosen)).to(device)  # (B, 3, 64, 64) or (B/4, 3, 128, 128)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        l1, mse = F.l1_loss(output, images), F.mse_loss(output, images)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": l1 + mse + args.kl_weight * kl, "l1": l1, "mse": mse, "kl": kl}

    return loss_fn


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes every latent channel zero-mean and unit-std over `pictures`, without changing reconstructions.

    z' = (z - mean) / std goes into quant_conv (whose second half is the log-variance), its inverse into
    post_quant_conv; both are 1x1 and unpadded, so this is exact. Returns mean and std, each (C,).
    """
    device = next(vae.parameters()).device
    parts = [encode(vae, pictures[row : row + 32], device) for row in range(0, len(pictures), 32)]
    latents = torch.cat(parts).transpose(0, 1).flatten(1).double()  # (C, N*16*16)
    mean, std = latents.mean(1).float().to(device), latents.std(1).float().to(device)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:CHANNELS] = (before.bias[:CHANNELS] - mean) / std
    before.weight[:CHANNELS] /= std[:, None, None, None]
    before.bias[CHANNELS:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    return mean, std


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """Encodes (B, H, W, 3) uint8 -> the latents' modes, float32 (B, C, H/8, W/8), on the CPU."""
    return vae.encode(to_tensor(pictures).to(device)).latent_dist.mode().float().cpu()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> np.ndarray:
    """Passes (B, H, W, 3) uint8 once through the autoencoder -> the same shape and type."""
    return to_uint8(vae.decode(vae.encode(to_tensor(pictures).to(device)).latent_dist.mode()).sample)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the PSNR of 8-bit pictures (B, ...) -> dB, (B,)."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10 * np.log10(255**2 / np.maximum(error.reshape(len(a), -1).mean(1), 1e-3))


def reconstructions(
    vae: AutoencoderKL, identities: range, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Renders people never trained on, and passes them through the autoencoder -> both, (N, H, W, 3)."""
    pictures = world.render(requests(identities, VARIATIONS, seed=0))
    batches = [pictures[row : row + 16] for row in range(0, len(pictures), 16)]
    return pictures, np.concatenate([reconstruct(vae, batch, device) for batch in batches])


def evaluate(folder: Path, args: argparse.Namespace) -> None:
    """Logs the PSNR on validation identities, of the weights as written, in float32; and writes a sheet."""
    device = pick_device(args.device)
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    identities = portraits.VALIDATION[: args.eval_identities]
    pictures, outputs = reconstructions(vae, identities, device)
    batches = [pictures[row : row + 16] for row in range(0, len(pictures), 16)]
    latents = torch.cat([encode(vae, batch, device) for batch in batches])
    whole, face = psnr(pictures, outputs), psnr(pictures[:, *CENTRE], outputs[:, *CENTRE])
    world.log(
        NAME,
        f"{len(pictures)} pictures of {len(identities)} validation identities: "
        f"PSNR {whole.mean():.2f} dB (std {whole.std():.2f}, lowest {whole.min():.2f}), "
        f"face {face.mean():.2f} dB; latents mean {latents.mean():.3f}, std {latents.std():.3f}",
    )
    columns = [np.concatenate(pair) for pair in zip(pictures[:16], outputs[:16], strict=True)]
    save_png(world.WORK / f"{NAME}.png", np.concatenate(columns, axis=1))
    world.log(NAME, f"sheet (above the picture, below its reconstruction): {world.WORK / f'{NAME}.png'}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(
        __doc__, steps=4_500, identities=2_000, batch=16, lr=2e-3, seed=0, out="editor/vae"
    )
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="of the KL divergence per latent value")
    parser.add_argument("--eval_identities", type=positive_int, default=50, help="of the validation range")
    return world.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    # bfloat16 autocast (0.2 s a step) is 1.8 times as fast as float32 here; channels_last is slower under it.
    vae = build().to(pick_device(args.device))
    pictures = world.render(requests(portraits.TRAIN[: args.identities], VARIATIONS, args.seed))
    vae = world.train(
        NAME,
        vae,
        make_loss(pictures, args),
        steps=0 if args.export_only else args.steps,
        lr=args.lr,
        weight_decay=0.0,
        seed=args.seed,
        flags=args,
        log_every=50,
    )
    mean, std = standardise(vae, pictures[:1000])
    spread = f"std {std.min():.2f} to {std.max():.2f}"
    world.log(NAME, f"latents before standardising: |mean| <= {mean.abs().max():.2f}, {spread}")
    vae.half().save_pretrained(args.out)
    evaluate(args.out, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
