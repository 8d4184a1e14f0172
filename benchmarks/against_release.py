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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "evaluation"))  # Python looks for modules in this file's folder only
sys.path.insert(0, str(ROOT))

import bench
import main_edit
import methods
import utils
from images import to_tensor
from models.loading import quiet
from models.sets import MODEL_SETS, choose

if TYPE_CHECKING:
    from torch import Tensor

    from protection import Protector

SIZE = (128, 128)  # px
FACE = (32, 32, 96, 96)
N_PORTRAITS = 10  # to be scored; each has an edit by every instruction and two methods
N_EDITED = 8  # portraits, by every instruction
SCORED_TOGETHER = 16  # eval_all.py's default
EDITED_TOGETHER = 8
WARM_UP = 2  # iterations


# ---------------------------------------------------------------------------------------------------------
# defenses


def plain_facelock(x: Tensor, protector: Protector) -> Tensor:
    """Runs facelock's plain loop: in every iteration a decode, and LPIPS and recogniser on both images."""
    import torch

    vae, run, boxes = protector.vae, protector.run, [[FACE]] * len(x)
    z0 = vae.encode(x).latent_dist.mean.detach()
    x_adv = methods.random_start(x, run.budget, range(len(x)))
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
        x_adv = methods.project(x_adv.detach() + step * gradient.sign(), x, run.budget)
    return x_adv


def protect(x: Tensor, protector: Protector) -> Tensor:
    """Protects as the scripts do."""
    return protector.protect(x, [[FACE]] * len(x), range(len(x)))


def with_values(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """Copies flags, with some of them changed."""
    return argparse.Namespace(**vars(args) | values)


def facelock_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds of facelock's iterations."""
    way, took = plain_facelock if plain else protect, 0.0
    for iterations in (WARM_UP, args.iterations):  # the first time doesn't count
        protector = bench.protector_of("facelock", with_values(args, iterations=iterations))
        protector.preload()
        x = to_tensor(bench.portraits(1, SIZE)).to(protector.device)
        took = bench.seconds(partial(way, x, protector), protector.device)
    return took


def loading_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds from the end of the imports to the encoder attack's first iteration."""
    return start_up(args, plain)[0]


def loading_memory(args: argparse.Namespace, plain: bool) -> float:
    """Memory (GB) above the imports' until the encoder attack is through an iteration."""
    return start_up(args, plain)[1]


def start_up(args: argparse.Namespace, plain: bool) -> tuple[float, float]:
    """Starts the encoder attack, plainly with the whole editor loaded -> seconds of loading, GB."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    bench.import_libraries()
    protector = bench.protector_of("encoder", with_values(args, iterations=1))
    x = to_tensor(bench.portraits(1, SIZE)).to(protector.device)
    before, start = bench.peak_memory(protector.device), time.perf_counter()
    if plain:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            args.model_id, dtype=protector.chosen.dtype, safety_checker=None, requires_safety_checker=False
        ).to(protector.device)
        vae = pipeline.vae.requires_grad_(False)
        took = time.perf_counter() - start
        methods.pgd(x, methods.encoder_attack(x, vae), protector.run)
    else:
        protector.preload()
        took = time.perf_counter() - start
        protect(x, protector)
    return took, bench.peak_memory(protector.device) - before


# ---------------------------------------------------------------------------------------------------------
# metrics and edits


def clip_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds of CLIP-S and CLIP-I of 500 edits."""
    return scoring_time("clip", args, plain)


def face_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds of FR of 500 edits by recogniser and judge."""
    return scoring_time("faces", args, plain)


def scoring_time(job: str, args: argparse.Namespace, plain: bool) -> float:
    """Measures the metrics of a job of bench.py; plainly each pair and metric by itself."""
    import eval_all
    import numpy as np
    from pairing import Key
    from views import load_views

    chosen = choose(with_values(args, dtype="fp32"))
    metrics = [metric for metric in eval_all.METRICS if metric.name in bench.METRICS[job]]
    sources = {str(number): pixels for number, pixels in enumerate(bench.portraits(N_PORTRAITS, SIZE))}
    keys = [Key(0, prompt, name) for _ in range(2) for prompt in utils.edit_prompts for name in sources]
    draw = np.random.default_rng(0)
    noisy = [sources[key.name] + draw.normal(0, 8, (*SIZE, 3)) for key in keys]
    edits = np.clip(noisy, 0, 255).astype(np.uint8)  # (500, H, W, 3)
    groups = [[metric] for metric in metrics] if plain else [metrics]
    needs = [{need for metric in group for need in metric.needs} for group in groups]
    views = [load_views(of_group, chosen, utils.edit_prompts, {}) for of_group in needs]

    def work() -> None:
        together = 1 if plain else SCORED_TOGETHER
        for group, of_group in zip(groups, views, strict=True):
            for view in () if plain else of_group:
                for name, pixels in sources.items():
                    view.add_source(name, pixels)
            for first in range(0, len(keys), together):
                part = slice(first, first + together)
                seen: dict[str, Any] = {}
                for view in of_group:
                    if plain:
                        view.add_source(keys[first].name, sources[keys[first].name])
                    seen |= view(edits[part], keys[part])
                for metric in group:
                    metric.function(*(seen[need] for need in metric.needs))

    return bench.seconds(work, chosen.device)


def edit_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds of 200 edits by the mini editor and the files around them."""
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    mini = MODEL_SETS["mini"]
    names = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
    knobs = {name: mini.settings[name] for name in names}
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        for number, pixels in enumerate(bench.portraits(N_EDITED, SIZE)):
            Image.fromarray(pixels).save(folder / f"{number}.png")
        start = time.perf_counter()
        if not plain:
            line = f"--models=mini --device={args.device} --src_dir={folder} --edit_dir={name}/out --seed=0"
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = main_edit.main([*line.split(), f"--batch_size={EDITED_TOGETHER}"])
            if status:
                raise RuntimeError(f"main_edit.py failed: {told.getvalue()}")
            return time.perf_counter() - start
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(mini.editors["instruct-pix2pix"])
        pipeline.to(utils.pick_device(args.device)).set_progress_bar_config(disable=True)
        for path in sorted(folder.iterdir()):
            for number, prompt in utils.edit_prompts.items():
                seed = torch.Generator().manual_seed(0)
                (edited,) = pipeline(prompt, Image.open(path), generator=seed, **knobs).images
                edited.save(Path(name) / f"{number}_{path.name}")
        return time.perf_counter() - start


def help_time(args: argparse.Namespace, plain: bool) -> float:
    """Seconds of --help, of the slowest script, and what it may take."""
    if plain:
        return 1.0
    took = []
    for script in scripts():
        start = time.perf_counter()
        subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    return max(took)


def scripts() -> list[Path]:
    """Lists what people type: the files here and in evaluation/ that can be run."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py")])
    return [path for path in files if '__name__ == "__main__"' in path.read_text()]


# ---------------------------------------------------------------------------------------------------------
# command line


class Comparison(NamedTuple):
    """What is measured of both forms, and the ratio aimed at."""

    measure: Callable[[argparse.Namespace, bool], float]  # of the flags, and whether of the plain form
    target: float


COMPARISONS = {
    "facelock": Comparison(facelock_time, 1.25),
    "memory": Comparison(loading_memory, 4.0),
    "start": Comparison(loading_time, 3.0),
    "clip": Comparison(clip_time, 3.5),
    "faces": Comparison(face_time, 1.8),
    "edit": Comparison(edit_time, 1.5),
    "help": Comparison(help_time, 1.0),
}
WITH_UNET = {"memory", "start"}
BUNDLED = {"edit", "help"}  # need no random weights


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    some = utils.positive_int
    names = tuple(COMPARISONS)
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
        if wanted - BUNDLED:
            weights = bench.in_a_process(bench.write_weights, Path(directory), bool(wanted & WITH_UNET))
            vars(of_bench).update(weights)
        print("comparison     plain    project  ratio  target")
        for name in args.comparisons:
            measure, target = COMPARISONS[name]
            both = [partial(bench.in_a_process, measure, of_bench, plain) for plain in (True, False)]
            pairs = [[one() for one in both] for _ in range(args.repeats)]
            plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            found[name] = {"pairs": pairs, "plain": plain, "project": ours, "ratio": ratio, "target": target}
            mark = "" if ratio >= target else "  missed"
            line = f"{name:<10} {plain:9.3f} {ours:10.3f} {ratio:6.2f} {target:7.2f}{mark}"
            print(f"{line}  {measure.__doc__}", flush=True)
    if args.json:
        utils.write_file(args.json, f"{json.dumps(found, indent=2)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
