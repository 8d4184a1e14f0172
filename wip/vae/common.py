"""Shared by the study's scripts: pictures, a cheap texture, PSNR, and where things are."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np

STUDY = Path(__file__).resolve().parent
OLD = Path("/work/old")
sys.path[:0] = [str(OLD), str(OLD / "mini")]

import torch  # noqa: E402
import portraits  # noqa: E402
import world  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from PIL import Image  # noqa: E402

world.WORK = STUDY
torch.set_num_threads(1)
BUNDLED = OLD / "assets/mini/editor/vae"


def _band(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    """Smooth noise of one octave: standard deviation about 1, grain `cell` px. (size, size)"""
    small = rng.standard_normal((size // cell + 2, size // cell + 2)).astype(np.float32)
    big = np.asarray(Image.fromarray(small).resize((size + cell, size + cell), Image.BICUBIC))
    dy, dx = rng.integers(0, cell, 2) if cell > 1 else (0, 0)
    band = big[dy : dy + size, dx : dx + size]
    return band / band.std()


def texture(pixels: np.ndarray, seed: int, strength: float = 1.0, jpeg: bool = True) -> np.ndarray:
    """A flat (H, W, 3) uint8 picture -> one with multiplicative octave noise, camera grain and JPEG."""
    rng = np.random.default_rng([20_260_101, seed])
    size = len(pixels)
    shade = sum(w * _band(rng, size, cell) for cell, w in ((1, 0.4), (2, 0.7), (4, 0.7), (8, 0.4)))
    amount = strength * rng.uniform(0.015, 0.045)
    out = pixels.astype(np.float32) * (1 + amount * shade[:, :, None])
    grain = rng.standard_normal(pixels.shape).astype(np.float32)
    out = out + strength * rng.uniform(0.5, 3.0) * (0.6 * grain + 0.8 * grain.mean(2, keepdims=True))
    out = np.clip(np.rint(out), 0, 255).astype(np.uint8)
    if jpeg:
        buffer = io.BytesIO()
        Image.fromarray(out).save(buffer, "JPEG", quality=int(rng.integers(80, 97)))
        out = np.asarray(Image.open(buffer).convert("RGB"))
    return out


def textured(pictures: np.ndarray, first: int = 0) -> np.ndarray:
    return np.stack([texture(p, first + row) for row, p in enumerate(pictures)])


def training_pictures(identities: int = 2000, variations: int = 2, seed: int = 0):
    """(N, 128, 128, 3) uint8, flat and textured, of training people; cached."""
    import train_vae

    flat = world.render(train_vae.requests(portraits.TRAIN[:identities], variations, seed), processes=1)
    path = STUDY / "data" / f"textured_{identities}_{variations}.npy"
    if not path.exists():
        np.save(path, textured(flat))
    return flat, np.load(path, mmap_mode="r")


def people(count: int, *, with_texture: bool = False) -> torch.Tensor:
    """Plain source pictures of validation people -> (count, 3, 128, 128) in [-1, 1]."""
    pictures = world.render([(i, 0, None) for i in portraits.VALIDATION[:count]], processes=1)
    pictures = textured(pictures, 5_000_000) if with_texture else np.asarray(pictures)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of pictures in [-1, 1], (B, 3, H, W) -> dB (B,)"""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-8))


def load(folder: str | Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
