"""What the training scripts in `mini/` share: where things are, rendered data, and one resumable loop.

Run the trainings in this order, from anywhere; each resumes where it was stopped (see assets/mini/README.md):
    python mini/train_vae.py && python mini/train_recognizer.py && python mini/train_recognizer.py --judge
    python mini/train_perceptual.py && python mini/train_clip.py && python mini/train_editor.py
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import portraits
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts of mini/ use the project's own modules, as a user's script would

from utils import to_tensor

ASSETS = ROOT / "assets" / "mini"
WORK = ROOT / "mini" / "checkpoints"  # git-ignored: checkpoints, rendered data, logs

Request = tuple[int, int, int | None]  # identity, variation, prompt: the arguments of portraits.portrait


def _pixels(request: Request) -> np.ndarray:
    return np.asarray(portraits.portrait(*request))


def stream(requests: Sequence[Request], processes: int | None = None) -> Iterator[np.ndarray]:
    """Renders portraits in order, nothing kept: (128, 128, 3) uint8 each."""
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        yield from pool.imap(_pixels, requests, chunksize=64)


def render(requests: Sequence[Request], processes: int | None = None) -> np.ndarray:
    """Renders portraits, or reads them from the cache -> (N, 128, 128, 3) uint8, memory-mapped.

    The cache's name is a hash of the generator's source and the requests, so a changed generator is seen.
    """
    key = hashlib.sha256(Path(portraits.__file__).read_bytes())
    key.update(np.array([(i, v, -1 if p is None else p) for i, v, p in requests], dtype=np.int64).tobytes())
    path = WORK / "data" / f"{key.hexdigest()[:16]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        shape = (len(requests), *_pixels(requests[0]).shape)
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        for row, pixels in enumerate(stream(requests, processes)):
            array[row] = pixels
        array.flush()
        aside.rename(path)
    return np.load(path, mmap_mode="r")


def pictures(requests: Sequence[Request], size: int) -> torch.Tensor:
    """Rendered portraits, resized as models.py resizes them -> (N, 3, size, size) uint8."""
    pixels = render(requests)
    out = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(pixels), 256):
        images = to_tensor(pixels[start : start + 256])  # (n, 3, 128, 128) in [-1, 1]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[start : start + 256] = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return out


def to_float(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 pictures -> float32 in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


def jitter(
    images: torch.Tensor, generator: torch.Generator, *, shift: float, light: float, noise: float
) -> torch.Tensor:
    """Light augmentation of (B, 3, H, W) in [-1, 1], drawn per image: shift (fraction of the side),
    brightness and contrast, and Gaussian noise of a standard deviation between 0 and `noise`."""

    def draw(*shape: int, normal: bool = False) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) if normal else torch.rand(shape, generator=generator)
        return values.to(images.device)

    count = len(images)
    move = torch.eye(2, 3, device=images.device).repeat(count, 1, 1)  # (B, 2, 3)
    move[:, :, 2] = (2 * draw(count, 2) - 1) * 2 * shift  # a side is 2 units long
    grid = F.affine_grid(move, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = 1 + light * (2 * draw(count, 1, 1, 1) - 1)
    images = gain * images + light * (2 * draw(count, 1, 1, 1) - 1)
    images = images + noise * draw(count, 1, 1, 1) * draw(*images.shape, normal=True)
    return images.clamp(-1, 1)


def generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator of its own for each step, so that a resumed training draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def log(name: str, text: str) -> None:
    """Prints a line and appends it, with the time, to mini/checkpoints/NAME.log."""
    print(text, flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / f"{name}.log", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def require_checkpoint(name: str) -> None:
    """For --export_only: ends the script where there is nothing to export."""
    if not (WORK / f"{name}.pt").exists():
        raise SystemExit(f"error: {WORK / name}.pt is not there; train first, without --export_only")


def train(
    name: str,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, int, torch.Generator], dict[str, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.995,
    seed: int = 0,
    save_every: int = 100,
    log_every: int = 20,
) -> nn.Module:
    """One resumable training: AdamW, linear warm-up, cosine decay to 1 % of `lr`, averaged weights.

    `loss_fn(model, step, generator)` returns named scalars of which "loss" is minimised (forward passes run
    in bfloat16 autocast, which is twice as fast on current CPUs and GPUs). Every `save_every` steps the state
    goes to mini/checkpoints/NAME.pt; a killed run goes on from there. Returns the averaged model, in eval
    mode.
    """
    path = WORK / f"{name}.pt"
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=False)
    first = 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        log(name, f"resumed at step {first}")
    seen: dict[str, list[float]] = {}
    began = time.perf_counter()
    model.train()
    for step in range(first, steps):
        rate = min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses = loss_fn(model, step, generator(seed, step))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= warmup:
            average.update_parameters(model)
        for key, value in losses.items():
            seen.setdefault(key, []).append(float(value.detach()))
        done = step + 1
        if done % log_every == 0:
            pace = (time.perf_counter() - began) / (done - first)
            means = "  ".join(f"{key} {sum(values) / len(values):.4f}" for key, values in seen.items())
            log(name, f"step {done}/{steps}  {means}  {pace:.2f} s/step")
            seen = {}
        if done % save_every == 0 or done == steps:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
            }
            WORK.mkdir(parents=True, exist_ok=True)
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    return average.module.eval()


def load_average(name: str, model: nn.Module) -> nn.Module:
    """`model` with the averaged weights of the last checkpoint, in eval mode."""
    state = torch.load(WORK / f"{name}.pt", map_location="cpu", weights_only=True)
    log(name, f"averaged weights of step {state['step']}")
    state["average"].pop("n_averaged")
    average = {key.removeprefix("module."): value for key, value in state["average"].items()}
    model.load_state_dict(average)
    return model.eval()
