"""Compares the project's speed and memory with the plain forms of the authors' release; for maintainers.

    python benchmarks/against_release.py
    python benchmarks/against_release.py --comparisons facelock clip --repeats=1 --json=ratios.json

A plain form decodes in every iteration and sees both images anew, loads the whole editor for its autoencoder,
and embeds each image of each pair for each metric. Networks are random ones of SD 1.5's size, images 128x128;
`edit` takes the bundled networks. Prints the medians of both and of their ratios, beside the ratio aimed at.
Each measurement runs in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "evaluation")]  # Python looks for modules in this file's folder only

from pairing import Key
from scoring import measure

import bench
import loops
import main_edit
import methods
import utils
from images import save_png, to_tensor
from models.loading import quiet
from models.sets import MODEL_SETS, choose

if TYPE_CHECKING:
    from torch import Tensor

    from protection import Protector

SIZE = (128, 128)  # px
FACE = (32, 32, 96, 96)
N_PORTRAITS = 10  # to be scored; each has an edit by every instruction and two methods
N_EDITED = 8  # portraits, by every instruction


def plain_facelock(x: Tensor, protector: Protector) -> Tensor:
    """Runs facelock's plain loop: in every iteration a decode, and LPIPS and recogniser on both images."""
    import torch

    vae, run, boxes = protector.vae, protector.run, [[FACE]] * len(x)
    z0 = vae.encode(x).latent_dist.mean.detach()
    x_adv = loops.random_start(x, run.budget, range(len(x)))
    for i in range(run.num_iters):
        t = i / run.num_iters
        x_adv = x_adv.detach().requires_grad_(True)
        z = vae.encode(x_adv).latent_dist.mean
        y = vae.decode(z).sample.clamp(-1, 1)
        face = (protector.recognizer.embed(y, boxes) * protector.recognizer.embed(x, boxes)).sum(dim=1)
        loss = methods.LATENT_WEIGHT * (z - z0).square().flatten(1).mean(dim=1)
        loss = loss + (t > methods.PERCEPTUAL_FROM) * protector.perceptual(y, x).flatten()
        loss = loss - (t >= methods.FACE_FROM) * face
        (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
        step = run.step_size * (1 - 0.99 * t)
        x_adv = loops.project(x_adv.detach() + step * gradient.sign(), x, run.budget)
    return x_adv


def protect(x: Tensor, protector: Protector) -> Tensor:
    """Protects as the scripts do."""
    return protector.protect(x, [[FACE]] * len(x), range(len(x)))


def facelock(args: argparse.Namespace, plain: bool) -> float:
    """Measures the seconds of facelock's iterations."""
    way, took = plain_facelock if plain else protect, 0.0
    for iterations in (2, args.iterations):  # the first time doesn't count
        protector = bench.protector_of("facelock", args, iterations)
        protector.preload()
        x = to_tensor(bench.portraits(1, SIZE)).to(protector.device)
        took = bench.seconds(partial(way, x, protector), protector.device)
    return took


def start_up(what: str, args: argparse.Namespace, plain: bool) -> float:
    """Starts the encoder attack, plainly with the whole editor loaded -> its `seconds` or its `memory`."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    bench.import_libraries()
    protector = bench.protector_of("encoder", args, 1)
    x = to_tensor(bench.portraits(1, SIZE)).to(protector.device)
    before, start = bench.peak_memory(protector.device), time.perf_counter()
    if plain:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            args.model_id, dtype=protector.chosen.dtype, safety_checker=None, requires_safety_checker=False
        )
        vae = pipeline.to(protector.device).vae.requires_grad_(False)
        attack = partial(loops.pgd, x, methods.encoder_attack(x, vae), protector.run)
    else:
        protector.preload()
        attack = partial(protect, x, protector)
    took = time.perf_counter() - start
    attack()
    return {"seconds": took, "memory": bench.peak_memory(protector.device) - before}[what]


def scoring(job: str, args: argparse.Namespace, plain: bool) -> float:
    """Measures the seconds of bench.py's metrics of a job; plainly each pair and metric by itself."""
    names, together = bench.METRICS[job], 1 if plain else 16  # eval_all.py's default
    groups = [bench.metrics_and_views(own, args) for own in ([[one] for one in names] if plain else [names])]
    sources = {str(number): pixels for number, pixels in enumerate(bench.portraits(N_PORTRAITS, SIZE))}
    keys = [Key(0, prompt, name) for _ in range(2) for prompt in utils.edit_prompts for name in sources]
    draw = np.random.default_rng(0)
    noisy = [sources[key.name] + draw.normal(0, 8, (*SIZE, 3)) for key in keys]
    edits = np.clip(noisy, 0, 255).astype(np.uint8)  # (500, H, W, 3)

    def work() -> None:
        for metrics, views in groups:
            known: set[str] = set()
            for first in range(0, len(keys), together):
                part = slice(first, first + together)
                for name in dict.fromkeys(key.name for key in keys[part] if plain or key.name not in known):
                    known.add(name)
                    for view in views:
                        view.add_source(name, sources[name])
                measure(metrics, views, edits[part], keys[part], None)

    return bench.seconds(work, choose(args).device)


def edit(args: argparse.Namespace, plain: bool) -> float:
    """Measures the seconds of the mini editor's edits and the files around them."""
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    mini = MODEL_SETS["mini"]
    knobs = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
    settings = {name: mini.settings[name] for name in knobs}
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        for number, pixels in enumerate(bench.portraits(N_EDITED, SIZE)):
            save_png(folder / f"{number}.png", pixels)
        start = time.perf_counter()
        if not plain:
            line = f"--models=mini --device={args.device} --src_dir={folder} --edit_dir={name}/out"
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = main_edit.main([*line.split(), "--seed=0", "--batch_size=8"])
            if status:
                raise RuntimeError(f"main_edit.py failed: {told.getvalue()}")
            return time.perf_counter() - start
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(mini.editors["instruct-pix2pix"])
        pipeline.to(utils.pick_device(args.device)).set_progress_bar_config(disable=True)
        for path in sorted(folder.iterdir()):
            for number, prompt in utils.edit_prompts.items():
                seed = torch.Generator().manual_seed(0)
                (edited,) = pipeline(prompt, Image.open(path), generator=seed, **settings).images
                edited.save(Path(name) / f"{number}_{path.name}")
        return time.perf_counter() - start


def slowest_help(args: argparse.Namespace, plain: bool) -> float:
    """Measures the seconds of --help, of the slowest script; plainly what it may take."""
    helps = [[sys.executable, script, "--help"] for script in ([] if plain else scripts())]
    call = partial(subprocess.run, check=True, capture_output=True)
    return max((bench.seconds(partial(call, line), utils.pick_device("cpu")) for line in helps), default=1.0)


def scripts() -> list[Path]:
    """Lists what people type: the files here and in evaluation/ that can be run."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py")])
    return [path for path in files if '__name__ == "__main__"' in path.read_text()]


COMPARISONS = {  # what is measured by the flags, and of which form; the ratio aimed at; and in words
    "facelock": (facelock, 1.25, "Seconds of facelock's iterations."),
    "memory": (partial(start_up, "memory"), 4.0, "Memory (GB) until the encoder attack is at work."),
    "start": (partial(start_up, "seconds"), 3.0, "Seconds until its first iteration."),
    "clip": (partial(scoring, "clip"), 3.5, "Seconds of CLIP-S and CLIP-I of 500 edits."),
    "faces": (partial(scoring, "faces"), 1.8, "Seconds of FR of 500 edits by recogniser and judge."),
    "edit": (edit, 1.5, "Seconds of 200 edits by the mini editor and the files around them."),
    "help": (slowest_help, 1.0, "Seconds of --help, of the slowest script, and what it may take."),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    some, names = utils.positive_int, tuple(COMPARISONS)
    parser.add_argument("--comparisons", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--iterations", type=some, default=20, help="of facelock")
    parser.add_argument("--repeats", type=some, default=3, help="of which the median counts")
    parser.add_argument("--json", type=utils.path, metavar="FILE", help="writes the numbers there, too")
    parser.add_argument("--device", default="auto", help=utils.DEVICE_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Prints plain form, project and ratio of each comparison that the flags name -> exit status."""
    if args.json:
        utils.check_directory(args.json.absolute().parent)
    flags = {"size": "sd15", "resolution": SIZE[0], "device": args.device, "iterations": args.iterations}
    of_bench = bench.parse_args([f"--{flag}={value}" for flag, value in flags.items()])
    wanted, found = set(args.comparisons), {}
    with tempfile.TemporaryDirectory(prefix="bench_") as directory:
        if wanted - {"edit", "help"}:  # which need no random weights
            with_unet = bool(wanted & {"memory", "start"})
            vars(of_bench).update(bench.in_a_process(bench.write_weights, Path(directory), with_unet))
        print("comparison     plain    project  ratio  target")
        for name in args.comparisons:
            measure, target, what = COMPARISONS[name]
            both = [partial(bench.in_a_process, measure, of_bench, plain) for plain in (True, False)]
            pairs = [[one() for one in both] for _ in range(args.repeats)]
            plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            found[name] = {"pairs": pairs, "plain": plain, "project": ours, "ratio": ratio, "target": target}
            mark = "" if ratio >= target else "  missed"
            line = f"{name:<10} {plain:9.3f} {ours:10.3f} {ratio:6.2f} {target:7.2f}{mark}"
            print(f"{line}  {what}", flush=True)
    if args.json:
        utils.write_file(args.json, f"{json.dumps(found, indent=2)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
