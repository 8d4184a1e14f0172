"""Gains on the 8 fresh people (101,000 to 101,007) at .06, 100 iterations, part by part -> measure.jsonl.

    ./run.sh measure.py FOLDER [--iterations=100] [--methods encoder_t encoder_u noise]
"""
import argparse
import json
import time

import common
import torch
import train2
from common import psnr

import gain

p = argparse.ArgumentParser()
p.add_argument("folder")
p.add_argument("--iterations", type=int, default=100)
p.add_argument("--methods", nargs="+", default=["noise", "encoder_t", "encoder_u"])
p.add_argument("--stop", default="18:23", help="start no part after this, HH:MM")
a = p.parse_args()
vae = common.load(a.folder)
x = train2.valid("valid8")
clean = gain.reconstruct(vae, x)
r = psnr(x, clean)
print(f"{a.folder}: rec {r.mean():.2f} (min {r.min():.1f}) on 8 | {train2.rec(vae, train2.valid('valid40'))}", flush=True)
for method in a.methods:
    rows = []
    for part, start in enumerate((0, 4)):
        if time.strftime("%H:%M") >= a.stop:
            break
        began = time.time()
        xs = x[start : start + 4]
        adv = gain.protect(vae, xs, method, 0.06, a.iterations)
        adv = ((adv + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # as saved
        out = gain.reconstruct(vae, adv)
        before, after = psnr(xs, adv), psnr(clean[start : start + 4], out)
        rows += [(round(b, 2), round(c, 2)) for b, c in zip(before.tolist(), after.tolist())]
        g = [b - c for b, c in rows]
        mean = [sum(v) / len(rows) for v in zip(*rows)]
        print(f"{method} n={len(rows)} in {mean[0]:.1f} out {mean[1]:.1f} gain {sum(g) / len(g):+.2f} "
              f"(lowest {min(g):+.1f}, highest {max(g):+.1f}) {(time.time() - began) / 4:.1f} s a person", flush=True)
        with open(train2.HERE / "measure.jsonl", "a") as f:
            f.write(json.dumps({"folder": a.folder, "method": method, "iterations": a.iterations, "rows": rows}) + "\n")
