"""Measures what a number of portraits would cost on this machine: seconds, memory, hours.

    python bench.py --models=mini --portraits=500
    python bench.py --resolution=1024 --what vae --iterations=1 --repeats=1 --checkpointing
    python bench.py --input_side=6000x4000 --what encoder --iterations=2 --repeats=1
    python bench.py --model=round-trip --vae=madebyollin/taef2 --recognizer dlib --what facelock-wide

Prints, for each job, seconds per iteration and per image (a defense with its own number of iterations, an
edit with the set's own steps, a metric on one edit), hours for all portraits or for their edits by all 25
instructions, and peak memory above what the imports take. Each job runs in its own process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import utils
from evaluation import eval_all, eval_facial
from evaluation.features import load_features
from evaluation.pairing import Key
from evaluation.scoring import measure
from images import load_image, to_tensor
from methods import METHODS
from models.config import ATTACK, add_model_arguments, resolve
from models.editors import EDITORS
from models.loading import ROOT
from protection import Protector, Settings, methods_for

if TYPE_CHECKING:
    import torch

METRICS = {  # job -> of eval_all.py, those that share networks together
    "psnr": ("psnr",), "ssim": ("ssim",), "lpips": ("lpips",),
    "clip": ("clip_s", "clip_i"), "faces": (),  # all of eval_facial.py's
}  # fmt: skip
JOBS = (*methods_for(EDITORS[Settings.model]), "edit", *METRICS)
Loaded = tuple[Callable[[], Any], int, int]  # the work, how many iterations it does, and an image takes


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, so that memory and imports are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(device: torch.device) -> float:
    """Reads the peak so far of the device's memory, or of the process's, in GB."""
    import torch

    if utils.on_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak would begin with that of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    import resource  # which Windows hasn't

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # of macOS, in bytes


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Measures how long `work` takes, the device's queue included."""
    import torch

    start = time.perf_counter()
    work()
    if utils.on_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def portraits(n: int, size: tuple[int, int]) -> np.ndarray:
    """Gives n of the bundled portraits, brought to a size (H, W) -> (n, H, W, 3) uint8."""
    paths = sorted((ROOT / "assets" / "portraits" / "mini").glob("*.png"))
    found = [Image.fromarray(load_image(paths[number % len(paths)]).pixels) for number in range(n)]
    return np.stack([np.array(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in found])


def run_job(
    job: str, settings: Settings, side: tuple[int, int], batch: int, repeats: int
) -> dict[str, float]:
    """Measures one row of the table, in this process: seconds per `iteration` and `image`, `memory` in GB.

    side: (H, W) of the input. Raises UserError.
    """
    # what the jobs would import, so that it isn't counted among their memory
    import facenet_pytorch  # noqa: F401
    import lpips  # noqa: F401
    from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline  # noqa: F401
    from transformers import AutoModel, CLIPModel  # noqa: F401

    device = resolve(settings).device
    before = peak_memory(device)
    load = load_defense if job in METHODS else load_edit if job == "edit" else load_metrics
    work, timed, whole = load(job, settings, portraits(batch, side))
    if repeats > 1 or settings.compile:
        work()  # a first time that doesn't count
    iteration = statistics.median(seconds(work, device) for _ in range(repeats)) / timed
    memory = peak_memory(device) - before
    return {"iteration": iteration, "image": iteration * whole / batch, "memory": memory}


def load_defense(method: str, settings: Settings, pixels: np.ndarray) -> Loaded:
    """Loads a defense as the scripts run it."""
    protector = Protector(settings, method=method)
    protector.preload()
    images = to_tensor(pixels).to(protector.device)
    height, width = pixels.shape[1:3]
    boxes = [[(width // 4, height // 4, 3 * width // 4, 3 * height // 4)]] * len(images)
    has_iterations = "num_iters" in protector.method.reads
    iterations = (protector.run.num_iters, protector.method.run.num_iters) if has_iterations else (1, 1)
    return partial(protector.perturb, images, boxes, range(len(images))), *iterations


def load_edit(_: str, settings: Settings, pixels: np.ndarray) -> Loaded:
    """Loads the editor, to edit in as many steps as a defense is timed for."""
    config = resolve(settings)
    editor, images = config.load_editor(), to_tensor(pixels).to(config.device)
    own, editor.knobs["num_inference_steps"] = editor.knobs["num_inference_steps"], settings.num_iters
    prompts = [utils.edit_prompts[number % len(utils.edit_prompts)] for number in range(len(images))]
    return partial(editor, images, prompts, 0), settings.num_iters, own


def load_metrics(job: str, settings: Settings, pixels: np.ndarray) -> Loaded:
    """Loads metrics, for edits whose sources are known already; in float32 by default, as the scripts do."""
    config = resolve(settings, dtype="fp32" if settings.dtype == "auto" else settings.dtype)
    of_faces = itertools.chain(*eval_facial.groups(config).values())
    names = METRICS[job]
    metrics = [metric for metric in eval_all.METRICS if metric.name in names] if names else list(of_faces)
    needs = {need for one in metrics for need in one.needs}
    features = load_features(needs, config, utils.edit_prompts, {}, {})
    edits, keys = pixels[..., ::-1].copy(), [Key(0, 0, str(number)) for number in range(len(pixels))]
    for one, (key, source) in itertools.product(features, zip(keys, pixels, strict=True)):
        one.add_source(key.name, source)
    return partial(measure, metrics, features, edits, keys, to_tensor(pixels)), 1, 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    add, some = parser.add_argument, utils.positive_int
    add("--portraits", type=some, default=2000, metavar="N", help="how many the hours are for")
    add("--what", nargs="+", choices=(*JOBS, "instant"), default=JOBS, metavar="JOB", help="the jobs")
    add("--iterations", type=some, default=20, help="that are timed, or steps of an edit")
    add("--batch_size", type=some, default=1, help="images worked on together")
    add("--input_side", type=input_size, metavar="WxH", help="if not --resolution, square")
    for flag in ("--checkpointing", "--compile"):
        add(flag, action="store_true", help="as in defend.py")
    add("--repeats", type=some, default=3, help="of which the median counts; 1: no warm-up")
    add("--json", type=utils.path, metavar="FILE", help="writes the numbers there, too")
    add_model_arguments(parser, *ATTACK)
    return parser.parse_args(argv)


def input_size(text: str) -> tuple[int, int]:
    """argparse type: WxH -> (H, W)"""
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form WxH")
    return int(found[2]), int(found[1])


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Measures the jobs that the flags name -> exit status."""
    import torch

    if args.json:
        utils.check_directory(args.json.absolute().parent)
    settings = Settings.of(args, num_iters=args.iterations)
    config = resolve(settings)
    side = args.input_side or (config.resolution, config.resolution)
    on = torch.cuda.get_device_name(config.device) if utils.on_cuda(config.device) else platform.machine()
    about = f"the {args.models} models, input {side[1]}x{side[0]}, worked on at {config.resolution}, "
    about += f"batches of {args.batch_size}, --dtype {args.dtype}, medians of {args.repeats}; "
    about += f"{on}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; torch {torch.__version__}"
    print(f"{about}\njob            s/iteration     s/image       hours   memory GB")
    n_edits, rows = len(utils.edit_prompts), {}
    for job in args.what:
        rows[job] = row = in_a_process(run_job, job, settings, side, args.batch_size, args.repeats)
        row["hours"] = row["image"] * args.portraits * (1 if job in METHODS else n_edits) / 3600
        cells = "{iteration:11.4f} {image:11.4f} {hours:11.2f} {memory:11.2f}"
        print(f"{job:<14} {cells.format(**row)}", flush=True)
    print(f"hours: of {args.portraits} portraits, or of their edits by all {n_edits} instructions")
    if args.json:
        record = {"about": about, "portraits": args.portraits, "rows": rows}
        utils.write_file(args.json, json.dumps(record, indent=2).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
