"""What the training scripts in `mini/` share: paths, rendered data, and a resumable training loop.

Run the trainings in this order, from any folder; a stopped one resumes (see assets/mini/README.md):
    python mini/train_vae.py && python mini/train_recognizer.py && python mini/train_recognizer.py --judge
    python mini/train_perceptual.py && python mini/train_clip.py && python mini/train_editor.py
For the second editor see train_kontext.py.
"""

from __future__ import annotations

import argparse
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
# the scripts of mini/ import the project's modules, as a user's script would
sys.path.insert(0, str(ROOT))

from images import to_tensor, to_uint8
from models.config import EDIT_KNOBS, ModelConfig, resolve
from utils import DEVICE_HELP, HelpFormatter, positive_float, positive_int

ASSETS = ROOT / "assets" / "mini"
WORK = ROOT / "mini" / "checkpoints"  # git-ignored: checkpoints, rendered data, logs

# Flags that may differ when a training resumes
FREE = {"device", "out", "work", "export_only", "steps", "eval_identities"}

SIDE = 128  # px, of a portrait

Request = tuple[int, int, int | None]  # identity, variation, prompt: the arguments of portraits.portrait


def _pixels(request: Request) -> np.ndarray:
    return np.asarray(portraits.portrait(*request))


def stream(requests: Sequence[Request], processes: int | None = None) -> Iterator[np.ndarray]:
    """Renders portraits in order, without caching: (128, 128, 3) uint8 each."""
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        yield from pool.imap(_pixels, requests, chunksize=64)


def cache_key(requests: Sequence[Request], more: bytes = b"") -> str:
    """Hashes what rendered data depends on: the generator's VERSION, the requests and `more`."""
    key = hashlib.sha256(f"portraits {portraits.VERSION}".encode())
    key.update(np.array([(i, v, -1 if p is None else p) for i, v, p in requests], dtype=np.int64).tobytes())
    key.update(more)
    return key.hexdigest()[:16]


def render(requests: Sequence[Request], processes: int | None = None) -> np.ndarray:
    """Renders portraits, or reads them from the cache -> (N, 128, 128, 3) uint8, memory-mapped.

    The cache notices a changed generator only by its portraits.VERSION.
    """
    path = WORK / "data" / f"{cache_key(requests)}.npy"
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


def pictures(requests: Sequence[Request], size: int) -> np.ndarray:
    """Renders portraits, resized like the models' images -> (N, size, size, 3) uint8."""
    pixels = render(requests)
    if pixels.shape[1] == size:
        return pixels
    out = np.empty((len(pixels), size, size, 3), dtype=np.uint8)
    for start in range(0, len(pixels), 256):
        images = to_tensor(pixels[start : start + 256])  # (n, 3, 128, 128) in [-1, 1]
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[start : start + 256] = to_uint8(images)
    return out


def _draw(generator: torch.Generator, images: torch.Tensor, *shape: int) -> torch.Tensor:
    """Draws from [0, 1) -> (*shape) on the images' device."""
    return torch.rand(shape, generator=generator).to(images.device)


def jitter(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    shift: float,
    light: float,
    noise: float,
    tint: float = 0.0,
) -> torch.Tensor:
    """Augments (B, 3, H, W) in [-1, 1] lightly, each image with its own draw: shift (fraction of the side),
    brightness and contrast, Gaussian noise with a standard deviation between 0 and `noise`, and colours
    mixed by a matrix I + t N(0, 1) with t between 0 and `tint`."""
    count = len(images)
    move = torch.eye(2, 3, device=images.device).repeat(count, 1, 1)  # (B, 2, 3)
    move[:, :, 2] = (2 * _draw(generator, images, count, 2) - 1) * 2 * shift  # a side is 2 units long
    grid = F.affine_grid(move, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = 1 + light * (2 * _draw(generator, images, count, 1, 1, 1) - 1)
    images = gain * images + light * (2 * _draw(generator, images, count, 1, 1, 1) - 1)
    if tint:
        strength = tint * _draw(generator, images, count, 1, 1)
        normal = torch.randn(count, 3, 3, generator=generator).to(images.device)
        mix = torch.eye(3, device=images.device) + strength * normal
        images = torch.einsum("bij,bjhw->bihw", mix, images)
    strength = noise * _draw(generator, images, count, 1, 1, 1)
    images = images + strength * torch.randn(images.shape, generator=generator).to(images.device)
    return images.clamp(-1, 1)


def generator(seed: int, step: int) -> torch.Generator:
    """Makes a CPU generator for one step, so that a resumed training draws the same numbers."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def parser_of(
    doc: str, *, steps: int, identities: int, batch: int, lr: float, seed: int, out: str
) -> argparse.ArgumentParser:
    """Makes a parser with the flags that all trainings share, and this training's defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=steps, help="also the cosine schedule's length")
    parser.add_argument("--identities", type=positive_int, default=identities, help="to train on")
    parser.add_argument("--batch", type=positive_int, default=batch, help="pictures or pairs a step")
    parser.add_argument("--lr", type=positive_float, default=lr, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=seed, help="of weights, data and batches")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--out", type=Path, default=ASSETS / out, help="where the model goes")
    parser.add_argument("--work", type=Path, default=WORK, help="for checkpoint, rendered data and log")
    parser.add_argument(
        "--export_only", action="store_true", help="write and evaluate what the last checkpoint holds"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags; refuses people that only the judge may see, and sets WORK to --work."""
    global WORK
    args = parser.parse_args(argv)
    first = vars(args).get("first", 0)
    if first not in range(portraits.JUDGE.start - args.identities + 1):
        parser.error(
            f"--identities {args.identities}: from {first}, some of them would be the judge's people"
        )
    WORK = args.work
    return args


def mini_set(device: str = "cpu", **flags: object) -> ModelConfig:
    """Chooses the mini models as the scripts do, in float32; flags: values of other flags."""
    knobs = {name: value for name in EDIT_KNOBS if (value := flags.pop(name, None)) is not None}
    return resolve(models="mini", device=device, dtype="fp32", edit=knobs, **flags)


def log(name: str, text: str) -> None:
    """Prints a line and appends it, with the time, to mini/checkpoints/NAME.log."""
    print(text, flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / f"{name}.log", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


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
    flags: argparse.Namespace | None = None,
    save_every: int = 100,
    log_every: int = 20,
) -> nn.Module:
    """Trains, resumably: AdamW, linear warm-up, cosine decay to 1 % of `lr`, averaged weights.

    `loss_fn(model, step, generator)` returns named scalars; "loss" is minimised. Forward passes run in
    bfloat16 autocast, which is twice as fast on current CPUs and GPUs. Every `save_every` steps the state
    goes to mini/checkpoints/NAME.pt; a killed run resumes from there. With `steps` 0 nothing is trained and
    the last checkpoint is used (--export_only). A checkpoint made with other `flags` is refused (--steps may
    be larger than before). Returns the averaged model, in eval mode.
    """
    path = WORK / f"{name}.pt"
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=False)
    first = 0
    recorded = {key: str(value) for key, value in vars(flags).items() if key not in FREE} if flags else {}
    if not (steps or path.exists()):
        raise SystemExit(f"error: {path} is not there; train first, without --export_only")
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        before = state.get("flags", {})
        other = sorted(key for key in before.keys() & recorded.keys() if before[key] != recorded[key])
        if steps and (other or first > steps):
            differing = ", ".join(f"--{key}" for key in other or ["steps"])
            raise SystemExit(f"error: {path} was trained with another {differing}; choose another --work")
        log(name, f"step {first} of {path}")
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
        if step >= min(warmup, steps - 1):
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
                "flags": recorded,
            }
            WORK.mkdir(parents=True, exist_ok=True)
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    return average.module.eval()
