"""Measures what a number of portraits would cost on this machine: hours, memory, floating-point operations.

    python bench.py --models=mini                            # the bundled stand-ins
    python bench.py --size=sd15 --portraits=500              # networks of the paper's size, random weights
    python bench.py --size=sd15 --resolution=1024 --what vae --iterations=1 --repeats=1 --checkpointing
    python bench.py --size=sd15 --input_side=6000x4000 --what encoder --iterations=2 --repeats=1

Prints, for each job, seconds an iteration and an image (a defense with the scripts' own iterations, an edit
with the set's own steps, a metric of one edit), hours for all portraits or for their edits by all 25
instructions, peak memory above what the imports take, and floating-point operations of an iteration and image
or of an edit (with --repeats above 1). Every row runs in a process of its own. Random weights cost the time
of trained ones; what they compute means nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

sys.path.insert(1, str(Path(__file__).resolve().parent / "evaluation"))  # its files find each other by name

import eval_all
import eval_facial
from pairing import Key
from scoring import measure
from views import Metric, View, load_views

import utils
from images import load_image, to_tensor
from methods import METHODS
from models.config import MINI, add_model_arguments, resolve, setting_help
from models.loading import ROOT, quiet
from protection import Protector, Settings

if TYPE_CHECKING:
    import torch

METRICS = {  # job -> of eval_all.py, those that share networks together
    "psnr": ("psnr",), "ssim": ("ssim",), "lpips": ("lpips",),
    "clip": ("clip_s", "clip_i"), "faces": (),  # all of eval_facial.py's
}  # fmt: skip
JOBS = (*METHODS, "edit", *METRICS)
SD15: dict[str, Any] = {  # InstructPix2Pix as made of Stable Diffusion 1.5, LPIPS-VGG, CLIP ViT-B/32
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "unet": {"sample_size": 64, "in_channels": 8, "cross_attention_dim": 768},
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "clip": {}, "trunk": "vgg",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a job is measured."""

    settings: Settings  # of a defense; an edit and a metric take its models
    input_side: tuple[int, int]  # (H, W)
    batch_size: int
    repeats: int


def write_weights(directory: Path, whole: bool) -> dict[str, Any]:
    """Writes random networks of SD15's sizes -> settings that choose them. whole: with the UNet, 1.7 GB."""
    import diffusers
    import lpips
    import torch
    import transformers
    from facenet_pytorch import InceptionResnetV1
    from safetensors.torch import save_file

    quiet()
    torch.manual_seed(0)
    # as many tokens as the real one gives to the text encoder, whatever the instruction's length
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MINI / "editor" / "tokenizer", model_max_length=77)
    vae = diffusers.AutoencoderKL(**SD15["vae"]).half()
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SD15["text"])).half()
    unet = diffusers.UNet2DConditionModel(**SD15["unet"]).half() if whole else None
    scheduler = diffusers.EulerAncestralDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear")
    diffusers.StableDiffusionInstructPix2PixPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(directory / "model_id")
    for name in ("recognizer", "judge"):
        network = InceptionResnetV1(pretrained=None)
        for parameter in network.parameters():
            if parameter.ndim == 4:  # else signals fade away layer by layer, and denormal numbers are slow
                torch.nn.init.kaiming_normal_(parameter)
        torch.save(network.half().state_dict(), directory / name)
    state = lpips.LPIPS(net=SD15["trunk"], pnet_rand=True, verbose=False).half().state_dict()
    (directory / "lpips").mkdir()
    save_file({key: value.clone() for key, value in state.items()}, directory / "lpips" / "model.safetensors")
    (directory / "lpips" / "config.json").write_text(json.dumps({"net": SD15["trunk"], "lpips": True}))
    clip = transformers.CLIPModel(transformers.CLIPConfig(**SD15["clip"])).half()
    for part in (clip, transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)):
        part.save_pretrained(directory / "clip")
    members = {flag: str(directory / flag) for flag in ("model_id", "lpips", "clip")}
    return members | {flag: [str(directory / flag)] for flag in ("recognizer", "judge")}


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, so that memory and imports are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def import_libraries() -> None:
    """Imports what the jobs would, so that it isn't counted among their memory."""
    import facenet_pytorch  # noqa: F401
    import lpips  # noqa: F401
    from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline  # noqa: F401
    from transformers import AutoModel, CLIPModel  # noqa: F401


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


def operations(work: Callable[[], Any], plan: Plan) -> float:
    """Counts the operations (10^12) of convolutions, matrix products and attention; NaN if not affordable."""
    from torch.utils.flop_counter import FlopCounterMode

    if plan.repeats == 1 or plan.settings.compile:
        return math.nan
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def portraits(n: int, size: tuple[int, int]) -> np.ndarray:
    """Gives n of the bundled portraits, brought to a size (H, W) -> (n, H, W, 3) uint8."""
    paths = sorted((ROOT / "assets" / "portraits" / "mini").glob("*.png"))
    found = [Image.fromarray(load_image(paths[number % len(paths)]).pixels) for number in range(n)]
    return np.stack([np.array(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in found])


def run_job(job: str, plan: Plan) -> dict[str, float]:
    """Measures one row of the table, in this process: seconds an `iteration` and `image`, `memory` in GB, and
    `operations` (10^12) of an iteration and image of a defense, else of an image. Raises UserError.
    """
    import_libraries()
    device = resolve(plan.settings).device
    before = peak_memory(device)
    # each gives works, and a function of their costs -> those of an iteration and of an image
    load = load_defense if job in METHODS else load_edit if job == "edit" else load_metrics
    works, cost = load(job, plan)
    for work in works if plan.repeats > 1 or plan.settings.compile else ():
        work()  # a first time that doesn't count
    times = [statistics.median(seconds(work, device) for _ in range(plan.repeats)) for work in works]
    iteration, image = cost(*times)
    memory = peak_memory(device) - before  # operations are counted later: that keeps tensors alive
    of_iteration, of_image = cost(*(operations(work, plan) for work in works))
    flops = of_iteration / plan.batch_size if job in METHODS else of_image
    return {"iteration": iteration, "image": image, "memory": memory, "operations": flops}


def load_defense(method: str, plan: Plan) -> tuple[list[Callable], Callable]:
    """Loads a defense as the scripts run it; an image costs what the method's own iterations do."""
    protector = Protector(plan.settings, method=method)
    protector.preload()
    images = to_tensor(portraits(plan.batch_size, plan.input_side)).to(protector.device)
    height, width = protector.config.editor.working_size(plan.input_side, protector.resolution)
    boxes = [[(width // 4, height // 4, 3 * width // 4, 3 * height // 4)]] * len(images)
    work = partial(protector.perturb, images, boxes, range(len(images)))
    own = protector.method.run.num_iters
    measured, whole = (plan.settings.num_iters, own) if "num_iters" in protector.method.reads else (1, 1)
    return [work], lambda spent: (spent / measured, spent / measured * whole / len(images))


def load_edit(_: str, plan: Plan) -> tuple[list[Callable], Callable]:
    """Loads the editor with the set's own steps and guidance, to edit in one step and in three."""
    config = resolve(plan.settings)
    editor = config.load_editor()
    steps = editor.knobs["num_inference_steps"]
    images = to_tensor(portraits(plan.batch_size, plan.input_side)).to(config.device)
    prompts = [utils.edit_prompts[number % len(utils.edit_prompts)] for number in range(len(images))]

    def work(few: int) -> None:
        editor.knobs["num_inference_steps"] = few
        editor(images, prompts, 0)

    def cost(one: float, three: float) -> tuple[float, float]:
        step = (three - one) / 2
        return step, (one + (steps - 1) * step) / len(images)

    return [partial(work, few) for few in (1, 3)], cost


def load_metrics(job: str, plan: Plan) -> tuple[list[Callable], Callable]:
    """Loads metrics, for edits whose sources are known already; in float32 by default, as the scripts do."""
    metrics, views = metrics_and_views(METRICS[job], plan)
    sources = portraits(plan.batch_size, plan.input_side)
    edits, keys = sources[..., ::-1].copy(), [Key(0, 0, str(number)) for number in range(len(sources))]
    for view in views:
        for key, source in zip(keys, sources, strict=True):
            view.add_source(key.name, source)

    def work() -> None:
        measure(metrics, views, edits, keys, to_tensor(sources))

    return [work], lambda spent: (math.nan, spent / len(sources))


def metrics_and_views(names: Sequence[str], plan: Plan) -> tuple[list[Metric], list[View]]:
    """Loads metrics by name, with the networks that they need together. Raises UserError."""
    config = resolve(plan.settings, dtype="fp32" if plan.settings.dtype == "auto" else plan.settings.dtype)
    of_faces = itertools.chain(*eval_facial.groups(config).values())
    metrics = [metric for metric in eval_all.METRICS if metric.name in names] if names else list(of_faces)
    needs = {need for metric in metrics for need in metric.needs}
    return metrics, load_views(needs, config, utils.edit_prompts, {}, {})


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    some = utils.positive_int
    parser.add_argument("--portraits", type=some, default=2000, metavar="N", help="how many hours are for")
    parser.add_argument("--size", choices=("sd15",), help="random weights of SD 1.5's size, not the set's")
    parser.add_argument("--what", nargs="+", choices=JOBS, default=JOBS, metavar="JOB", help="the jobs")
    parser.add_argument("--iterations", type=some, default=20, help="that are timed; facelock's aren't alike")
    parser.add_argument("--batch_size", type=some, default=1, help="images worked on together")
    parser.add_argument("--resolution", type=some, help=setting_help("side in px", "resolution"))
    parser.add_argument("--input_side", type=input_size, metavar="WxH", help="if not --resolution, square")
    for flag in ("--checkpointing", "--compile"):
        parser.add_argument(flag, action="store_true", help="as in defend.py")
    parser.add_argument("--repeats", type=some, default=3, help="of which the median counts; 1: no warm-up")
    parser.add_argument("--json", type=utils.path, metavar="FILE", help="writes the numbers there, too")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def plan_of(args: argparse.Namespace) -> Plan:
    """Turns the flags into a plan."""
    settings = Settings.of(args, num_iters=args.iterations)
    side = resolve(settings).resolution
    return Plan(settings, args.input_side or (side, side), args.batch_size, args.repeats)


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
    plan = plan_of(args)
    height, width = plan.input_side
    config = resolve(plan.settings)
    cuda = utils.on_cuda(config.device)
    on = torch.cuda.get_device_name(config.device) if cuda else platform.machine()
    of = f"random weights of size {args.size}" if args.size else f"the {args.models} models"
    about = f"{of}, input {width}x{height}, worked on at {config.resolution}, batches of {args.batch_size}, "
    about += f"--dtype {args.dtype}; {on}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; "
    about += f"torch {torch.__version__}; medians of {args.repeats}"
    print(f"{about}\njob            s/iteration     s/image       hours   memory GB       TFLOP")
    n_edits, rows = len(utils.edit_prompts), {}
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        if args.size:
            editing = {"edit", *(name for name in METHODS if "editor" in METHODS[name].parameters)}
            random = in_a_process(write_weights, Path(name), bool(editing & set(args.what)))
            plan = replace(plan, settings=replace(plan.settings, **random))
        for job in args.what:
            row = in_a_process(run_job, job, plan)
            row["hours"] = row["image"] * args.portraits * (1 if job in METHODS else n_edits) / 3600
            rows[job] = row
            cells = "{iteration:11.4f} {image:11.4f} {hours:11.2f} {memory:11.2f} {operations:11.4f}"
            print(f"{job:<14} {cells.format(**row)}".replace("nan", "  -"), flush=True)
    print(f"hours: of {args.portraits} portraits, or of their edits by all {n_edits} instructions")
    if args.json:
        record = {"about": about, "portraits": args.portraits, "rows": rows}
        utils.write_file(args.json, json.dumps(record, indent=2).replace("NaN", "null").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
