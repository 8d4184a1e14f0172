"""How much a VAE amplifies protective perturbations: gain = PSNR in - PSNR between reconstructions, dB.

    python gain.py FOLDER [--people 8] [--iterations 30] [--budgets .06] [--methods noise encoder ...]
    python gain.py FOLDER --full        # 16 people, 100 iterations, .03 and .06, all methods
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import common
import numpy as np
import torch
from common import psnr
from PIL import Image

import methods
import models

ALL = ("noise", "encoder_u", "encoder_t", "vae", "facelock")
RECOGNIZER = LPIPS = None


@torch.no_grad()
def reconstruct(vae, x):
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in x.split(4)])


def protect(vae, x, method, budget, iterations):
    start = methods.random_start(x, budget, range(len(x)))
    common_ = dict(budget=budget, start=start)
    loop = dict(step_size=0.01, num_iters=iterations, **common_)
    if method == "noise":
        return methods.noise(x, **common_)
    if method.startswith("encoder"):
        return methods.encoder_attack(x, vae, targeted=method.endswith("_t"), **loop)
    if method == "vae":
        return methods.vae_attack(x, vae, **loop)
    global RECOGNIZER, LPIPS
    if RECOGNIZER is None:
        cpu, mini = torch.device("cpu"), models.MODEL_SETS["mini"]
        RECOGNIZER = models.load_recognizer(mini.recognizer, cpu, torch.float32)
        LPIPS = models.load_perceptual(mini.perceptual, cpu, torch.float32)
    boxes = [[(0, 0, x.shape[3], x.shape[2])]] * len(x)
    face = models.face_similarity_to(RECOGNIZER, x, boxes)
    distance = models.perceptual_distance_to(LPIPS, x)
    return methods.facelock(x, vae, face, distance, **loop)


def jpeg_resize(x, quality=75, scale=0.5):
    """JPEG, then half the size and back (bilinear, antialiased)."""
    out = []
    for image in x:
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        out.append(np.array(Image.open(buffer).convert("RGB")))
    y = torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if scale != 1:
        small = torch.nn.functional.interpolate(y, scale_factor=scale, mode="bilinear", antialias=True)
        y = torch.nn.functional.interpolate(small, size=y.shape[2:], mode="bilinear", antialias=True)
    return y.clamp(-1, 1)


def measure(vae, *, people=8, iterations=30, budgets=(0.06,), which=ALL, texture=False, purify=False, keep=None):
    x = common.people(people, with_texture=texture)
    clean = reconstruct(vae, x)
    rows = {"rec": psnr(x, clean).mean().item(), "rec_min": psnr(x, clean).min().item()}
    z = vae.encode(x[:4]).latent_dist.mode()
    for budget in budgets:
        for method in which:
            began = time.perf_counter()
            parts = x.split(4)
            adv = torch.cat([protect(vae, part, method, budget, iterations) for part in parts])
            seconds = (time.perf_counter() - began) / people
            adv = ((adv + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # as saved
            out = reconstruct(vae, adv)
            before, after = psnr(x, adv).mean().item(), psnr(clean, out).mean().item()
            row = {"in": before, "out": after, "gain": before - after, "s": seconds}
            row["dz"] = ((vae.encode(adv[:4]).latent_dist.mode() - z).std() / z.std()).item()
            if purify:
                for name, args in {"jpeg": (75, 1), "resize": (100, 0.5), "both": (75, 0.5)}.items():
                    a, b = reconstruct(vae, jpeg_resize(x, *args)), reconstruct(vae, jpeg_resize(adv, *args))
                    row[name] = psnr(a, b).mean().item()
                    row[name + "_vs_clean"] = psnr(clean, b).mean().item()
                    row[name + "_clean_vs_clean"] = psnr(clean, a).mean().item()
            rows[f"{method}@{budget}"] = row
            if keep is not None:
                keep[f"{method}@{budget}"] = (adv, out)
    if keep is not None:
        keep["clean"] = (x, clean)
    return rows


def line(rows) -> str:
    parts = [f"rec {rows['rec']:.2f} (min {rows['rec_min']:.1f})"]
    parts += [f"{k} {v['in']:.1f}->{v['out']:.1f} gain {v['gain']:+.1f} dz {v['dz']:.2f}" for k, v in rows.items() if "@" in k]
    return " | ".join(parts)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("folder", type=Path)
    p.add_argument("--people", type=int, default=8)
    p.add_argument("--iterations", type=int, default=30)
    p.add_argument("--budgets", type=float, nargs="+", default=[0.06])
    p.add_argument("--methods", nargs="+", default=list(ALL))
    p.add_argument("--texture", action="store_true")
    p.add_argument("--purify", action="store_true")
    p.add_argument("--full", action="store_true")
    p.add_argument("--sheet", type=Path)
    a = p.parse_args()
    if a.full:
        a.people, a.iterations, a.budgets = 16, 100, [0.03, 0.06]
    vae = common.load(a.folder)
    keep = {} if a.sheet else None
    rows = measure(vae, people=a.people, iterations=a.iterations, budgets=a.budgets, which=a.methods,
                   texture=a.texture, purify=a.purify, keep=keep)
    for key, row in rows.items():
        print(key, {k: round(v, 3) for k, v in row.items()} if isinstance(row, dict) else round(row, 2), flush=True)
    with open(common.STUDY / "gain.jsonl", "a") as f:
        f.write(json.dumps({"folder": str(a.folder), "people": a.people, "iterations": a.iterations,
                            "texture": a.texture, "rows": rows}) + "\n")
    if keep is not None:
        n = min(8, a.people)
        strips = []
        for name, (adv, out) in keep.items():
            for t in (adv, out):
                strips.append(torch.cat(list(t[:n]), dim=2))
        sheet = torch.cat(strips, dim=1)
        Image.fromarray(((sheet.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()).save(a.sheet)
        print("sheet rows:", [f"{k} {w}" for k in keep for w in ("in", "out")])


if __name__ == "__main__":
    main()
