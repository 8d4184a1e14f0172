"""The study's trainings on VERSION 2 pictures (data/*.npy, see render.py), by the clock instead of by steps.

    ./run.sh train2.py --name=NAME --start_from=FOLDER --until=18:05 [--crops=.6]           # plain
    ./run.sh train2.py --name=NAME --start_from=FOLDER --until=18:20 --calibrate            # as e2

The cosine runs over the wall time from the start to --until; a run started again goes on from NAME.pt with
what was left of the schedule, up to the new --until. Ends with models/NAME (averaged weights, nothing
standardised) and, with --standardise, latents of mean 0 and std 1 (do it before a calibration, not after).
"""
import argparse
import datetime
import json
import math
import time
from pathlib import Path

import common
import numpy as np
import torch
import world

HERE = Path(__file__).resolve().parent
common.STUDY = world.WORK = HERE  # logs and curves of this folder
import explore  # noqa: E402
import gain  # noqa: E402
from common import psnr  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402


def pictures():
    """The training pictures rendered so far."""
    count = int((HERE / "data/train1500.count").read_text())
    return np.load(HERE / "data/train1500.npy", mmap_mode="r")[:count]


def valid(name: str, count: int | None = None) -> torch.Tensor:
    return torch.from_numpy(np.load(HERE / f"data/{name}.npy")[:count].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def people(count, *, with_texture=False):
    return valid("valid8", count)


common.people = people


def rec(vae, x) -> str:
    was = vae.training
    with torch.no_grad():
        p = psnr(x, gain.reconstruct(vae.eval(), x))
    vae.train(was)
    return f"rec {p.mean():.2f} (min {p.min():.1f}) on {len(x)}"


def calibration(args) -> None:
    """e2's flags."""
    for key, value in dict(
        gain=11.0, over=0.25, weight=0.003, zero=4.0, attack_steps=5, attack_rate=0.3, least=0.8, purify=0.5,
        purify_weight=0.2, shrink=-4.0, shrink_weight=0.01, attacks=["zero", "zero", "zero", "grey", "latent"],
        attacked=2 / 3, noisy=1 / 3, batch=3,
    ).items():  # fmt: skip
        setattr(args, key, value)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True)
    p.add_argument("--start_from", type=Path, required=True)
    p.add_argument("--until", required=True, help="HH:MM, UTC")
    p.add_argument("--minutes", type=float, help="stop after so many minutes, pauses not counted, however the schedule stands")
    p.add_argument("--batch", type=int, default=4, help="whole pictures; four times as many crops")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--crops", type=float, default=0.0, help="share of the schedule on crops")
    p.add_argument("--calibrate", action="store_true")
    p.add_argument("--standardise", action="store_true")
    p.add_argument("--ema", type=float, default=0.98)
    p.add_argument("--eval_every", type=float, default=75.0, help="seconds")
    p.add_argument("--curve_every", type=float, default=240.0, help="seconds, with --calibrate")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    now = datetime.datetime.now(datetime.timezone.utc)
    hour, minute = map(int, a.until.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0).timestamp()

    args = argparse.Namespace(
        name=a.name, batch=a.batch, crops=0.0, steps=1, texture=0.0, noisy=0.0, noisy_target="self", budget=0.06,
        sharp=0.0, weight=0.0, eval_every=0, ramp=1, cap=20.0)  # fmt: skip
    if a.calibrate:
        calibration(args)
    data = pictures()
    vae = common.load(a.start_from).requires_grad_(True).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=a.lr, weight_decay=0.0)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(a.ema), use_buffers=False)
    path, step, p0 = HERE / f"{a.name}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        vae.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, p0 = state["step"], state["progress"]
    loss_fn = explore.make_loss(data, data, args)
    x40 = valid("valid40")
    world.log(a.name, f"{len(data)} pictures, step {step}, progress {p0:.2f}; {rec(average.module, x40)}")
    start = last_save = last_eval = last_curve = time.time()
    stop = min(end, start + 60 * a.minutes) if a.minutes else end
    seen, first = {}, step

    def save(progress):
        torch.save({"model": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "progress": progress, "flags": {k: str(v) for k, v in vars(a).items()}},
                   path.with_suffix(".tmp"))  # fmt: skip
        path.with_suffix(".tmp").rename(path)

    while (t := time.time()) < stop:
        progress = p0 + (1 - p0) * (t - start) / (end - start)
        args.crops = float(progress < a.crops)  # `step < crops * steps`, with a step of 0 below
        rate = min(1.0, (step + 1) / 20) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = a.lr * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = loss_fn(vae, 0, world.generator(a.seed, step))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step >= 20:
            average.update_parameters(vae)
        for key, value in losses.items():
            seen.setdefault(key, []).append(float(value.detach()))
        began, t = t, time.time()
        if t - began > 30 and a.minutes:  # the process was paused
            stop = min(end, stop + t - began)
        if t - last_eval > a.eval_every:
            means = "  ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in seen.items())
            world.log(a.name, f"step {step} p {progress:.2f}  {means}  {(t - start) / (step - first):.2f} s/step | {rec(average.module, x40)}")
            seen, last_eval = {}, time.time()
        if a.calibrate and t - last_curve > a.curve_every:
            curve(average.module, a.name, step)
            last_curve = time.time()
        if t - last_save > 120:
            save(progress)
            last_save = time.time()
    save(min(1.0, p0 + (1 - p0) * (stop - start) / (end - start)))
    vae = average.module.eval().requires_grad_(False)
    world.log(a.name, f"stopped at step {step}, {(time.time() - start) / max(1, step - first):.2f} s/step; {rec(vae, x40)}")
    x = torch.from_numpy(data[:160].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mode() for b in x.split(20)]).transpose(0, 1).flatten(1)
    world.log(a.name, f"latents mean {[round(v, 2) for v in z.mean(1).tolist()]} std {[round(v, 2) for v in z.std(1).tolist()]}")
    if a.standardise:
        explore.standardise(vae, data[:400])
        world.log(a.name, f"standardised; {rec(vae, x40)}")
    vae.save_pretrained(HERE / "models" / a.name)


def curve(vae, name: str, step: int) -> None:
    """4 of valid40 (not of the 8 fresh), 20 iterations."""
    began = time.time()
    common.people = lambda count, with_texture=False: valid("valid40", count)
    rows = gain.measure(vae.eval(), people=4, iterations=20, budgets=(0.06,), which=("encoder_u", "encoder_t"))
    common.people = people
    world.log(name, f"CURVE {step} {gain.line(rows)} ({time.time() - began:.0f} s)")
    with open(HERE / f"{name}.curve.jsonl", "a") as f:
        f.write(json.dumps({"step": step, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
