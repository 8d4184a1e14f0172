"""Times and memory of the main job: the defenses, editing and the metrics, on your machine.

    python bench.py --models=mini                            # the bundled stand-ins
    python bench.py --size=sd15 --resolution=512             # models of the paper's size, random weights
    python bench.py --size=sd15 --resolution=1024 --what vae --iterations=1 --repeats=1 --checkpointing
    python bench.py --size=sd15 --input_side=6000x4000 --what encoder --iterations=2 --repeats=1
    python bench.py --against-release                        # the plain forms beside these, and ratios

Prints, for each job, seconds an iteration, seconds an image, images an hour, peak memory above the imports'
own, and floating-point operations (a defense's only with --repeats above 1: counting takes a run of its own,
and memory). Random weights (made in a temporary directory) cost the time of trained ones; what they compute
means nothing. Every row runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import utils
from utils import METHOD_NAMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parent
FULL_ITERATIONS = 100  # of a protected image, the scripts' default
METRICS = ("psnr", "ssim", "lpips", "clip", "faces")
JOBS = (*METHOD_NAMES, "edit", *METRICS)
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCRIPTS = (
    "defend.py", "edit.py", "main_defend.py", "main_edit.py", "bench.py",
    *(f"evaluation/{name}.py" for name in (
        "eval_psnr", "eval_ssim", "eval_lpips", "eval_clip_s", "eval_clip_i", "eval_facial", "eval_all",
        "purify", "cheats", "figure",
    )),
)  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument(
        "--size",
        choices=("sd15",),
        help="random weights of this size instead of a model set: the SD 1.5 editor, LPIPS-VGG, "
        "InceptionResnetV1, CLIP ViT-B/32",
    )
    parser.add_argument(
        "--what", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS)
    )
    parser.add_argument("--iterations", type=utils.positive_int, default=20, help="of a defense")
    parser.add_argument("--batch_size", type=utils.positive_int, default=1, help="images worked on together")
    parser.add_argument(
        "--resolution", type=utils.positive_int, help=models.set_help("side in px", "resolution")
    )
    parser.add_argument(
        "--input_side", type=input_size, metavar="WxH", help="of the input (default: --resolution, square)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="as in defend.py")
    parser.add_argument("--compile", action="store_true", help="as in defend.py")
    parser.add_argument(
        "--repeats", type=utils.positive_int, default=3, help="of which the median counts; 1: no warm-up"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the numbers, too")
    parser.add_argument(
        "--against-release", action="store_true", help="compare with the plain forms instead; see COMPARISONS"
    )
    parser.add_argument(
        "--comparisons", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS), metavar="NAME",
        help=f"of --against-release: {', '.join(COMPARISONS)}",
    )  # fmt: skip
    models.add_model_arguments(parser)
    return parser.parse_args(argv)


def input_size(text: str) -> tuple[int, int]:
    """argparse type: WxH -> (H, W)"""
    try:
        width, height = (utils.positive_int(part) for part in text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form WxH") from None
    return height, width


# ---------------------------------------------------------------------------------------------------------
# models of real size, at random


def make_weights(size_of: str, directory: Path) -> dict[str, str]:
    """Writes random weights of the size asked for, as float16 -> the flags that choose them.

    size_of: "editor" writes the whole pipeline (2.1 GB), "vae" its VAE alone.
    """
    import lpips
    import torch
    from diffusers import AutoencoderKL
    from facenet_pytorch import InceptionResnetV1
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    models.quiet()
    torch.manual_seed(0)  # in a process of its own
    small = utils.pick_dtype("fp16", utils.pick_device("cpu"))  # as hubs have them
    vae = AutoencoderKL(**SD15_VAE).to(small)
    tokenizer = CLIPTokenizer.from_pretrained(models.MINI / "editor" / "tokenizer")
    if size_of == "editor":
        _write_pipeline(vae, tokenizer, small, directory / "editor")
    else:
        vae.save_pretrained(directory / "editor" / "vae")
    for name in ("recognizer", "judge"):
        network = InceptionResnetV1(pretrained=None)
        for parameter in network.parameters():
            if parameter.ndim == 4:  # else signals fade away layer by layer, and denormal numbers are slow
                torch.nn.init.kaiming_normal_(parameter)
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, directory / f"{name}.safetensors")
    (directory / "perceptual").mkdir()
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    save_file(state, directory / "perceptual" / "model.safetensors")
    (directory / "perceptual" / "config.json").write_text(json.dumps({"net": "vgg", "lpips": True}))
    CLIPModel(CLIPConfig()).to(small).save_pretrained(directory / "clip")
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(
        directory / "clip"
    )
    return {
        "model_id": str(directory / "editor"),
        "recognizer": str(directory / "recognizer.safetensors"),
        "judge": str(directory / "judge.safetensors"),
        "lpips": str(directory / "perceptual"),
        "clip": str(directory / "clip"),
    }


def _write_pipeline(vae: Any, tokenizer: Any, dtype: torch.dtype, directory: Path) -> None:
    """InstructPix2Pix at SD 1.5's size."""
    import torch
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made at the size that is written
    try:
        unet = UNet2DConditionModel(sample_size=64, in_channels=8, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    finally:
        torch.set_default_dtype(usual)
    StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


# ---------------------------------------------------------------------------------------------------------
# measuring


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a fresh process: memory and imports are its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class Memory:
    """Peak memory from here on, above what is in use here: of the device, or of the process.

    Where the system doesn't let the process's peak begin anew (Linux does), it is above the peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.cuda = device if utils.on_cuda(device) else None
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.before = torch.cuda.memory_allocated(self.cuda)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = self._process("VmRSS")

    def peak(self) -> float:
        """GB"""
        import torch

        if self.cuda is not None:
            return (torch.cuda.max_memory_allocated(self.cuda) - self.before) / 1e9
        return (self._process("VmHWM") - self.before) / 1e9

    @staticmethod
    def _process(field: str) -> int:
        status = Path("/proc/self/status")
        if not status.exists():  # macOS: the peak is all there is, in bytes
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = status.read_text().splitlines()
        (line,) = [line for line in lines if line.startswith(f"{field}:")]
        return int(line.split()[1]) * 1024


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes, the device's queue included."""
    import torch

    start = time.perf_counter()
    work()
    if utils.on_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def operations(work: Callable[[], Any]) -> float:
    """Floating-point operations (10^12) of convolutions, products and attention, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def input_shape(args: argparse.Namespace) -> tuple[int, int]:
    """(H, W) of what is protected, edited or scored."""
    return args.input_side or (args.resolution, args.resolution)


def portraits(n: int, size: tuple[int, int]) -> Any:
    """(n, H, W, 3) uint8: the bundled synthetic portraits, brought to a size."""
    import numpy as np
    from PIL import Image

    paths = sorted((ROOT / "assets" / "portraits" / "mini").glob("*.png"))
    found = [Image.open(paths[number % len(paths)]).convert("RGB") for number in range(n)]
    return np.stack([np.array(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in found])


def defense_arguments(args: argparse.Namespace, flags: dict[str, str], method: str) -> argparse.Namespace:
    """What defend.py's parser makes of it."""
    import defend

    line = ["--input_path", "-", "--defend_method", method, "--num_iters", str(args.iterations)]
    line += ["--models", args.models, "--device", args.device, "--dtype", args.dtype]
    line += ["--resolution", str(args.resolution)]
    line += ["--checkpointing"] if args.checkpointing else []
    line += ["--compile"] if args.compile and method not in ("noise", "cw") else []
    for flag in ("model_id", "recognizer", "judge", "lpips"):
        line += [f"--{flag}", flags[flag]] if flag in flags else []
    return defend.parse_args(line)


# ---------------------------------------------------------------------------------------------------------
# the main job


def run_job(job: str, args: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """One row of the table, in this process."""
    if job in METHOD_NAMES:
        return run_defense(job, args, flags)
    return run_edit(args, flags) if job == "edit" else run_metric(job, args, flags)


def run_defense(method: str, args: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """The scripts' own way to a method; seconds an image at FULL_ITERATIONS."""
    import defend

    of_method = defense_arguments(args, flags, method)
    size = input_shape(args)
    sources = portraits(args.batch_size, size)
    tools = defend.Tools(of_method)
    memory = Memory(tools.device)
    tools.preload(of_method)
    images = utils.to_tensor(sources).to(tools.device)
    height, width = utils.working_size(size, args.resolution)
    boxes = [[(width // 4, height // 4, 3 * width // 4, 3 * height // 4)]] * len(images)

    def work() -> Tensor:
        return defend.protect(images, of_method, tools, boxes=boxes, seeds=range(len(images)))

    if args.repeats > 1 or args.compile:
        work()
    took = statistics.median(seconds(work, tools.device) for _ in range(args.repeats))
    peak = memory.peak()  # before anything is counted, which keeps tensors alive
    iterations = 1 if method == "noise" else args.iterations
    per_image = took / iterations * (1 if method == "noise" else FULL_ITERATIONS) / args.batch_size
    return {
        "iteration": took / iterations,
        "image": per_image,
        "memory": peak,
        "operations": None
        if args.compile or args.repeats == 1  # a long one
        else operations(work) / iterations / args.batch_size,
    }


def run_edit(args: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """An edit at the set's own steps and guidance, from one of one step and one of three."""
    import dataclasses

    chosen = models.choose(args)
    if "model_id" in flags:
        chosen = dataclasses.replace(chosen, editors={"instruct-pix2pix": flags["model_id"]})
    device, dtype = models.set_up(args)
    memory = Memory(device)
    editor = models.load_editor(chosen, "instruct-pix2pix", device, dtype, progress=False)
    images = utils.to_tensor(portraits(args.batch_size, input_shape(args))).to(device)
    prompts = [utils.edit_prompts[number % len(utils.edit_prompts)] for number in range(args.batch_size)]

    def work(steps: int) -> Tensor:
        editor.models = dataclasses.replace(chosen, num_inference_steps=steps)
        editor.pipeline.vae.encode.known.clear()
        return editor(images, prompts, 0)

    work(1)
    short, long = (
        statistics.median(seconds(lambda steps=steps: work(steps), device) for _ in range(args.repeats))
        for steps in (1, 3)
    )
    step = (long - short) / 2
    peak = memory.peak()
    of_short, of_long = operations(lambda: work(1)), operations(lambda: work(3))
    steps = chosen.num_inference_steps
    flops = of_short + (steps - 1) * (of_long - of_short) / 2
    return {
        "iteration": step,
        "image": (short + (steps - 1) * step) / args.batch_size,
        "memory": peak,
        "operations": flops / args.batch_size,
    }


def run_metric(job: str, args: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """A metric of one edit whose source is known already."""
    import torch

    sys.path.insert(0, str(ROOT / "evaluation"))
    import eval_lpips
    import eval_psnr
    import eval_ssim

    device, _ = models.set_up(args)
    memory = Memory(device)
    sources = portraits(args.batch_size, input_shape(args))
    edits = 255 - sources
    if job in ("psnr", "ssim", "lpips"):
        scoring = metric_arguments(args, flags)
        metric = {
            "psnr": lambda: eval_psnr.psnr,
            "ssim": lambda: eval_ssim.ssim,
            "lpips": lambda: eval_lpips.load(scoring),
        }[job]()
        pair = utils.to_tensor(edits), utils.to_tensor(sources)

        def work() -> Tensor:
            return metric(*pair)
    else:
        scorer, keys = scorer_of(job, args, flags, sources)

        def work() -> Tensor:
            return scorer(edits, keys)

    work()
    took = statistics.median(seconds(work, device) for _ in range(args.repeats))
    peak = memory.peak()
    with torch.no_grad():
        flops = operations(work) / args.batch_size
    return {"iteration": None, "image": took / args.batch_size, "memory": peak, "operations": flops}


def metric_arguments(args: argparse.Namespace, flags: dict[str, str]) -> argparse.Namespace:
    """The flags of an evaluation script."""
    dtype = "fp32" if args.dtype == "auto" else args.dtype
    return argparse.Namespace(
        models=args.models,
        device=args.device,
        dtype=dtype,
        recognizer=flags.get("recognizer"),
        judge=flags.get("judge"),
        lpips=flags.get("lpips"),
        clip=flags.get("clip"),
        resolution=None,
    )


def scorer_of(job: str, args: argparse.Namespace, flags: dict[str, str], sources: Any) -> tuple[Any, Any]:
    """The evaluation's scorer of CLIP or faces, that knows the sources -> (scorer, the sources' keys)."""
    sys.path.insert(0, str(ROOT / "evaluation"))
    import common
    import eval_clip_i
    import eval_clip_s
    import eval_facial

    scoring = metric_arguments(args, flags)
    if job == "clip":
        clip = models.load_clip(models.choose(scoring).clip, *models.set_up(scoring))
        metrics = {
            "clip_s": eval_clip_s.clip_s,
            "clip_i": lambda edit, source, _: eval_clip_i.clip_i(edit, source),
        }
        scorer = common.ClipScorer(clip, metrics, utils.edit_prompts)
    else:
        scorer = eval_facial.load(scoring, list(eval_facial.METRICS))
    for number, source in enumerate(sources):
        scorer.add_source(str(number), source)
    return scorer, [common.Key(0, 0, str(number)) for number in range(len(sources))]


# ---------------------------------------------------------------------------------------------------------
# the plain forms, as the authors' release has them, beside the project's


def plain_facelock(
    x: Tensor, vae: Any, recognizer: models.Recognizer, perceptual: Any, boxes: Any, args: argparse.Namespace
) -> Tensor:
    """The plain loop: in every iteration a decode, and LPIPS and recogniser on both images."""
    import torch

    import methods

    z0 = vae.encode(x).latent_dist.mean.detach()
    x_adv = methods.random_start(x, args.attack_budget, [0] * len(x))
    n = args.num_iters
    for i in range(n):
        x_adv = x_adv.detach().requires_grad_(True)
        z = vae.encode(x_adv).latent_dist.mean
        y = vae.decode(z).sample.clamp(-1, 1)
        face = (recognizer.embed(y, boxes) * recognizer.embed(x, boxes)).sum(dim=1)
        perceptual_term = perceptual(y, x).flatten()
        loss = methods.LATENT_WEIGHT * (z - z0).square().flatten(1).mean(dim=1)
        loss = loss + (i > methods.PERCEPTUAL_FROM * n) * perceptual_term
        loss = loss - (i >= methods.FACE_FROM * n) * face
        (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
        step = methods.step_size_at(i, n, args.step_size)
        x_adv = methods.project(x_adv.detach() + step * gradient.sign(), x, args.attack_budget)
    return x_adv


def compare_facelock(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """facelock, 20 iterations at 128x128, in turn."""
    args.resolution = 128
    yield from in_a_process(_facelock_times, args, flags)


def _facelock_times(args: argparse.Namespace, flags: dict[str, str]) -> list[tuple[float, float]]:
    import defend

    of_method = defense_arguments(args, flags, "facelock")
    tools = defend.Tools(of_method)
    tools.preload(of_method)
    x = utils.to_tensor(portraits(1, (128, 128))).to(tools.device)
    boxes = [[(32, 32, 96, 96)]]

    def ours() -> Tensor:
        return defend.protect(x, of_method, tools, boxes=boxes, seeds=[0])

    def plain() -> Tensor:
        return plain_facelock(x, tools.vae, tools.recognizer, tools.perceptual, boxes, of_method)

    of_method.num_iters = 2
    ours(), plain()
    of_method.num_iters = args.iterations
    return [(seconds(plain, tools.device), seconds(ours, tools.device)) for _ in range(args.repeats)]


def compare_memory(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """Memory (GB) of the encoder attack at 128x128, above the imports' own: whole pipeline, VAE alone."""
    for plain, ours in _start_ups(args, flags):
        yield plain["memory"], ours["memory"]


def compare_start(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """Seconds from the end of the imports to the first iteration: whole pipeline, VAE alone."""
    for plain, ours in _start_ups(args, flags):
        yield plain["seconds"], ours["seconds"]


STARTED: list[list[dict[str, float]]] = []  # one measurement serves both


def _start_ups(args: argparse.Namespace, flags: dict[str, str]) -> list[list[dict[str, float]]]:
    while len(STARTED) < args.repeats:
        STARTED.append([in_a_process(_start_up, args, flags, whole) for whole in (True, False)])
    return STARTED


def _start_up(args: argparse.Namespace, flags: dict[str, str], whole: bool) -> dict[str, float]:
    """defend.py's encoder attack, one iteration; whole: with the whole pipeline, as in the release."""
    from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline  # noqa: F401

    import defend
    import methods

    args.resolution = 128
    args.iterations = 1
    of_method = defense_arguments(args, flags, "encoder")
    tools = defend.Tools(of_method)
    memory = Memory(tools.device)
    start = time.perf_counter()
    if whole:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            flags["model_id"], dtype=tools.dtype, safety_checker=None, requires_safety_checker=False
        ).to(tools.device)
        tools.vae = pipeline.vae.requires_grad_(False)
    tools.preload(of_method)
    x = utils.to_tensor(portraits(1, (128, 128))).to(tools.device)
    took = time.perf_counter() - start
    methods.encoder_attack(x, tools.vae, budget=0.03, step_size=0.01, num_iters=1)
    return {"seconds": took, "memory": memory.peak()}


def compare_clip(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """CLIP-I and CLIP-S, 10 portraits x 25 prompts x 2 methods: each pair and metric by itself, eval_all."""
    for _ in range(args.repeats):
        yield in_a_process(_clip_times, args, flags)


def compare_faces(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """FR by recogniser and judge of the same, likewise."""
    for _ in range(args.repeats):
        yield in_a_process(_face_times, args, flags)


def _pairs(n_portraits: int) -> tuple[Any, Any, Any]:
    """Sources, edits and keys of 25 prompts and two methods, which are noise on the sources here."""
    sys.path.insert(0, str(ROOT / "evaluation"))
    import common
    import numpy as np

    sources = portraits(n_portraits, (128, 128))
    keys = [
        common.Key(0, prompt, str(number))
        for _ in range(2)
        for prompt in utils.edit_prompts
        for number in range(n_portraits)
    ]
    draw = np.random.default_rng(0)
    edits = [
        np.clip(sources[int(key.name)] + draw.normal(0, 8, sources.shape[1:]), 0, 255).astype(np.uint8)
        for key in keys
    ]
    return sources, np.stack(edits), keys


N_PORTRAITS = 10


def _clip_times(args: argparse.Namespace, flags: dict[str, str]) -> tuple[float, float]:
    from torch.nn.functional import cosine_similarity

    sources, edits, keys = _pairs(N_PORTRAITS)
    scorer, _ = scorer_of("clip", args, flags, sources[:1])
    clip, device = scorer.clip, models.set_up(args)[0]

    def plain() -> None:
        for key, edit in zip(keys, edits, strict=True):
            source = sources[int(key.name)][None]
            direction = clip.embed_images(edit[None]) - clip.embed_images(source)
            cosine_similarity(direction, scorer.texts[key.prompt][None])
            cosine_similarity(clip.embed_images(edit[None]), clip.embed_images(source))

    return seconds(plain, device), seconds(lambda: _score(scorer, sources, edits, keys), device)


def _face_times(args: argparse.Namespace, flags: dict[str, str]) -> tuple[float, float]:
    from torch.nn.functional import cosine_similarity

    sources, edits, keys = _pairs(N_PORTRAITS)
    scorer, _ = scorer_of("faces", args, flags, sources[:1])
    device = models.set_up(args)[0]

    def embed(recognizer: models.Recognizer, pixels: Any) -> Tensor:
        boxes = scorer.detector(pixels)[:1] or [(0, 0, 128, 128)]
        return recognizer.embed(utils.to_tensor(pixels).to(device), [boxes])

    def plain() -> None:
        import torch

        with torch.no_grad():
            for recognizer in scorer.recognizers.values():
                for key, edit in zip(keys, edits, strict=True):
                    cosine_similarity(embed(recognizer, edit), embed(recognizer, sources[int(key.name)]))

    return seconds(plain, device), seconds(lambda: _score(scorer, sources, edits, keys), device)


def _score(scorer: Any, sources: Any, edits: Any, keys: Any, batch_size: int = 16) -> None:
    """As common.score does, without the files."""
    for number, source in enumerate(sources):
        scorer.add_source(str(number), source)
    for first in range(0, len(keys), batch_size):
        scorer(edits[first : first + batch_size], keys[first : first + batch_size])


def compare_edit(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """main_edit.py on the mini set, 8 portraits x 25 prompts, against a call of the pipeline a prompt."""
    for _ in range(args.repeats):
        yield tuple(in_a_process(_edit_time, plain) for plain in (True, False))


def _edit_time(plain: bool) -> float:
    """From the end of the imports to the last file."""
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    import main_edit

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        for number, pixels in enumerate(portraits(8, (128, 128))):
            Image.fromarray(pixels).save(folder / f"{number}.png")
        line = f"--models mini --src_dir {folder} --edit_dir {name}/out --seed 0 --batch_size 8".split()
        chosen = models.MODEL_SETS["mini"]
        start = time.perf_counter()
        if not plain:
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = main_edit.main(line)
            if status:
                raise RuntimeError(f"main_edit.py failed: {told.getvalue()}")
            return time.perf_counter() - start
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(chosen.editors["instruct-pix2pix"])
        pipeline.set_progress_bar_config(disable=True)
        for path in sorted(folder.iterdir()):
            for number, prompt in utils.edit_prompts.items():
                (edited,) = pipeline(
                    prompt,
                    Image.open(path),
                    num_inference_steps=chosen.num_inference_steps,
                    guidance_scale=chosen.guidance_scale,
                    image_guidance_scale=chosen.image_guidance_scale,
                    generator=torch.Generator().manual_seed(0),
                ).images
                edited.save(Path(name) / f"{number}_{path.name}")
        return time.perf_counter() - start


def compare_help(args: argparse.Namespace, flags: dict[str, str]) -> Iterator[tuple[float, float]]:
    """Seconds of --help, of the slowest script: the limit of 1.0, what it takes."""
    for _ in range(args.repeats):
        yield 1.0, max(_help_time(script) for script in SCRIPTS)


def _help_time(script: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


# name: (the comparison, what random weights it needs, the ratio aimed at)
COMPARISONS: dict[str, tuple[Callable[..., Iterator[tuple[float, float]]], str, float]] = {
    "facelock": (compare_facelock, "vae", 1.25),
    "memory": (compare_memory, "editor", 4.0),
    "start": (compare_start, "editor", 3.0),
    "clip": (compare_clip, "vae", 3.5),
    "faces": (compare_faces, "vae", 1.8),
    "edit": (compare_edit, "", 1.5),
    "help": (compare_help, "", 1.0),
}


# ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    if args.json:
        utils.check_directory(args.json.absolute().parent)
    device = utils.pick_device(args.device)
    if args.resolution is None:
        args.resolution = models.MODEL_SETS[args.models].resolution
    if args.against_release:
        args.size = "sd15"
        needs = {COMPARISONS[name][1] for name in args.comparisons}
    else:
        needs = {"editor" if "edit" in args.what else "vae"}
    print(one_line_about(args, device))
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        flags: dict[str, str] = {}
        if args.size and needs != {""}:
            flags = in_a_process(make_weights, "editor" if "editor" in needs else "vae", Path(name))
        found = compare_all(args, flags) if args.against_release else measure_all(args, flags)
    if args.json:
        record = {"about": one_line_about(args, device), "rows": found}
        utils.write_file(args.json, (json.dumps(record, indent=2) + "\n").encode())
    return 0


def one_line_about(args: argparse.Namespace, device: torch.device) -> str:
    """What was measured, on what."""
    import torch

    of = f"random weights of size {args.size}" if args.size else f"the {args.models} models"
    where = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}"
    if utils.on_cuda(device):
        where = torch.cuda.get_device_name(device)
    side = input_shape(args)
    form = "" if args.against_release else f", input {side[1]}x{side[0]}, worked on at {args.resolution}"
    form += "" if args.against_release else f", batches of {args.batch_size}"
    return f"{of}{form}, --dtype {args.dtype}; {where}; torch {torch.__version__}; medians of {args.repeats}"


def measure_all(args: argparse.Namespace, flags: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Prints the table, a line as soon as it is known."""
    print("job        s/iteration     s/image  images/hour  memory GB  TFLOP")
    found = {}
    for job in args.what:
        row = found[job] = in_a_process(run_job, job, args, flags)
        row["per_hour"] = 3600 / row["image"]
        cells = [f"{row['iteration']:.4f}" if row["iteration"] is not None else "-"]
        cells += [f"{row['image']:.4f}", f"{row['per_hour']:.0f}", f"{row['memory']:.2f}"]
        cells += [f"{row['operations']:.4f}" if row["operations"] is not None else "-"]
        widths = (11, 11, 12, 10, 9)
        print(job.ljust(10), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    print(
        f"s/image: a defense at {FULL_ITERATIONS} iterations, an edit at the set's own steps, a metric of one"
        " edit; TFLOP: of one iteration and image, or of one edit"
    )
    return found


def compare_all(args: argparse.Namespace, flags: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Prints plain form, project and ratio of each comparison: medians."""
    print("comparison     plain    project  ratio  target")
    found = {}
    for name in args.comparisons:
        compare, _, target = COMPARISONS[name]
        pairs = list(compare(args, flags))
        plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        found[name] = {"pairs": pairs, "plain": plain, "project": ours, "ratio": ratio, "target": target}
        mark = "" if ratio >= target else "  missed"
        print(f"{name:<10} {plain:9.3f} {ours:10.3f} {ratio:6.2f} {target:7.2f}{mark}  {compare.__doc__}")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.against_release and args.compile:
        raise SystemExit("bench.py: --compile is no part of --against-release")
    return utils.run_command(run, args)


if __name__ == "__main__":
    sys.exit(main())
