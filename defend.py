"""Protects one portrait against instruction-based diffusion editing.

    python defend.py --input_path=portrait.png --defend_method=facelock
    python defend.py --input_path=portrait.png --defend_method=facelock --attack_budget=0.02 --step_size=0.003
    python defend.py --input_path=assets/portraits/mini/portrait_1000000.png --models=mini \\
        --output_path=out.png

Writes protected_NAME.png beside the input (or --output_path). Only the editor's VAE is loaded, and for
facelock the face recogniser and LPIPS. Budgets and steps are L-infinity sizes in the range [-1, 1] of a
pixel: 0.03 is 3.8/255.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import utils
from utils import METHOD_NAMES, Portrait, UserError

if TYPE_CHECKING:
    import torch

Box = models.Box

KNOBS = ("targeted", "c", "lr", "compile")  # flags of some methods only; None is the method's own default
READ_FOR = {  # what a method must take for a flag to change its pixels
    "step_size": "step_size",
    "num_iters": "num_iters",
    "faces": "face_similarity",
    "recognizer": "face_similarity",
    "lpips": "perceptual_distance",
}
MEMBERS = {"vae": "vae", "face_similarity": "recognizer", "perceptual_distance": "perceptual"}


# ---------------------------------------------------------------------------------------------------------
# flags, shared with main_defend.py


def add_defense_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag that decides how a portrait is protected."""
    parser.add_argument("--defend_method", choices=METHOD_NAMES, default="facelock", help="the defense")
    parser.add_argument(
        "--attack_budget",
        type=utils.budget_size,
        default=0.03,
        help="L-infinity size of the perturbation in [-1, 1], at least 2/255",
    )
    parser.add_argument(
        "--step_size",
        type=utils.positive_float,
        default=0.01,
        help="first step in [-1, 1], falling linearly to 1 %% of it (encoder, vae, facelock)",
    )
    parser.add_argument(
        "--num_iters", type=utils.positive_int, default=100, help="iterations (all but noise)"
    )
    targeted = parser.add_mutually_exclusive_group()
    targeted.add_argument(
        "--targeted",
        dest="targeted",
        action="store_true",
        default=None,
        help="towards a zero latent (encoder, cw; the default of encoder)",
    )
    targeted.add_argument(
        "--untargeted",
        dest="targeted",
        action="store_false",
        default=None,
        help="away from the clean latent (encoder, cw; the default of cw)",
    )
    parser.add_argument(
        "--c", type=utils.positive_float, help="weight of the latent term, cw only (default: 0.03)"
    )
    parser.add_argument("--lr", type=utils.positive_float, help="Adam's rate, cw only (default: 0.03)")
    parser.add_argument(
        "--faces",
        choices=("largest", "all"),
        default="largest",
        help="which faces facelock protects; with all, their mean similarity counts",
    )
    parser.add_argument(
        "--seed",
        type=utils.seed_number,
        default=0,
        help="of the random start, with the file's stem; -1 draws and prints one",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="measure face similarity after a VAE round trip for other methods than facelock, too",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="less memory, more time: the VAE's activations are computed again for each gradient",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="for GPUs: torch.compile each iteration; minutes to begin with (encoder, vae, facelock)",
    )
    models.add_editor_arguments(parser)
    models.add_face_arguments(parser)
    models.add_perceptual_argument(parser)
    models.add_model_arguments(parser)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_path", type=Path, required=True, help="the portrait, any image file")
    parser.add_argument(
        "--output_path", type=Path, help="a .png (default: protected_NAME.png beside the input)"
    )
    parser.add_argument(
        "--face_box",
        type=face_box,
        metavar="X0,Y0,X1,Y1",
        help="where the face is, in pixels of the upright input, instead of looking for it",
    )
    add_defense_arguments(parser)
    return parser.parse_args(argv)


def face_box(text: str) -> Box:
    """argparse type: four whole numbers x0,y0,x1,y1 with x0 < x1 and y0 < y1."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers x0,y0,x1,y1") from None
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a box: 0 <= x0 < x1 and 0 <= y0 < y1")
    return x0, y0, x1, y1


# ---------------------------------------------------------------------------------------------------------
# one way for a portrait, shared with main_defend.py


class Tools:
    """The models that a defense or its report may need, each loaded when it is first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.unavailable: set[str] = set()  # members that only a report asked for, and that can't be had
        self.kind = args.model
        self.checkpointing = args.checkpointing
        self.models = models.choose(args)
        self.device, self.dtype = models.set_up(args)
        if args.defend_method in utils.FP32_METHODS:
            self.dtype = utils.pick_dtype("fp32", self.device)
            if args.dtype not in ("auto", "fp32"):
                print(f"{args.defend_method} runs in fp32, whatever --dtype says", file=sys.stderr)

    def preload(self, args: argparse.Namespace) -> None:
        """Loads what the method can't do without. Raises UserError, before anything is written."""
        for keyword in parameters(args.defend_method):
            if keyword in MEMBERS:
                getattr(self, MEMBERS[keyword])

    def if_there(self, member: str) -> Any:
        """A member for a report, or None if it can't be had, which is said and tried once."""
        if member in self.unavailable:
            return None
        try:
            return getattr(self, member)
        except UserError as error:
            self.unavailable.add(member)
            print(f"{member} not measured: {error}", file=sys.stderr)
            return None

    @cached_property
    def vae(self) -> models.WorkingVAE:
        return models.load_vae(
            self.models, self.kind, self.device, self.dtype, checkpointing=self.checkpointing
        )

    @cached_property
    def recognizer(self) -> models.Recognizer:
        return models.load_recognizer(self.models.recognizer, self.device, self.dtype)

    @cached_property
    def judge(self) -> models.Recognizer:
        return models.load_recognizer(self.models.judge, self.device, self.dtype)

    @cached_property
    def perceptual(self) -> Any:
        return models.load_perceptual(self.models.perceptual, self.device, self.dtype)

    @cached_property
    def detector(self) -> models.FaceDetector:
        return models.FaceDetector(self.models.detect_faces, self.device)


@dataclass
class Subject:
    """A portrait with the faces found in it, in pixels of its working size."""

    portrait: Portrait
    boxes: list[Box]


@dataclass
class Report:
    """What the saved file measures."""

    path: Path
    budget: float
    linf: float
    psnr: float  # dB
    similarity: dict[str, str] = field(default_factory=dict)  # recogniser -> "0.93 -> 0.21" or "not measured"

    def __str__(self) -> str:
        text = f"{utils.one_line(str(self.path))}: L-infinity {self.linf:.4f} (budget {self.budget:g})"
        text += f", PSNR {self.psnr:.1f} dB"
        if self.similarity:
            values = ", ".join(f"{name} {value}" for name, value in self.similarity.items())
            text += f"\n  face similarity after a VAE round trip, source -> protected: {values}"
        return text


def parameters(method: str) -> dict[str, inspect.Parameter]:
    """What a method's signature names: its needs and its knobs."""
    from methods import METHODS

    return dict(inspect.signature(METHODS[method]).parameters)


def needs_faces(args: argparse.Namespace) -> bool:
    """Whether the method can't do without a face."""
    return "face_similarity" in parameters(args.defend_method)


def check_knobs(args: argparse.Namespace) -> None:
    """Refuses a knob that the chosen method doesn't have. Raises UserError."""
    for knob in KNOBS:
        value = getattr(args, knob)
        if value is not None and knob not in parameters(args.defend_method):
            flag = "--untargeted" if value is False else f"--{knob}"
            owners = [name for name in METHOD_NAMES if knob in parameters(name)]
            raise UserError(f"{flag} is for {' and '.join(owners)}; {args.defend_method} has no such knob")
    if args.compile and args.checkpointing:
        raise UserError("--compile and --checkpointing don't go together")


def flags_in_effect(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of some methods only, for run.json: the method's own default where a knob was not given, None
    where the method has no use for the flag.
    """
    takes = parameters(args.defend_method)
    unread = [flag for flag, need in READ_FOR.items() if need not in takes]
    found: dict[str, Any] = dict.fromkeys([*KNOBS, *unread])
    for knob in KNOBS:
        if knob in takes:
            given = getattr(args, knob)
            found[knob] = takes[knob].default if given is None else given
    return found


def load_subject(path: Path, args: argparse.Namespace, tools: Tools, box: Box | None = None) -> Subject:
    """Reads a portrait and, if something needs them, finds its faces (once, on the clean image).

    box: a face given by hand, in the portrait's pixels. Raises UserError naming the file: not readable, too
    small, or no face where facelock needs one.
    """
    portrait = utils.load_portrait(path, tools.models.resolution)
    working = utils.working_size(portrait.size, tools.models.resolution)
    needed = needs_faces(args)
    if not needed and not args.check:
        return Subject(portrait, [])
    if box is None:
        found = tools.detector(portrait.pixels)
        if args.faces == "largest":
            found = found[:1]
    else:
        found = [inside] if (inside := models.clip_box(box, portrait.size)) else []
        if not found:
            height, width = portrait.size
            raise UserError(f"{path}: the face box {box} is outside the {width}x{height} image")
    scale = working[0] / portrait.size[0], working[1] / portrait.size[1]  # rows, columns
    across_down = (scale[1], scale[0]) * 2
    scaled = [[round(side * by) for side, by in zip(face, across_down, strict=True)] for face in found]
    boxes = [inside for face in scaled if (inside := models.clip_box(face, working))]
    if needed and not boxes:
        raise UserError(f"{path}: no face found; say where it is with defend.py --face_box x0,y0,x1,y1")
    return Subject(portrait, boxes)


def protect(
    images: torch.Tensor,
    args: argparse.Namespace,
    tools: Tools,
    *,
    boxes: Sequence[Sequence[Box]],
    seeds: Sequence[int],
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Runs the method that the arguments name on images (B, 3, H, W) in [-1, 1]; returns the same.

    The one way from a script to `methods.METHODS`: everything that there is to offer is in one dict, and the
    method gets what its signature names. boxes: the faces of each image at the working size; seeds: of the
    random starts. Raises UserError if a gradient is not finite.
    """
    from methods import METHODS, GradientError, random_start

    working = utils.to_working(images, tools.models.resolution)
    offers: dict[str, Callable[[], Any]] = {
        "vae": lambda: tools.vae,
        "face_similarity": lambda: models.face_similarity_to(tools.recognizer, working, boxes),
        "perceptual_distance": lambda: models.perceptual_distance_to(tools.perceptual, working),
        "start": lambda: random_start(images, args.attack_budget, seeds),
        "budget": lambda: args.attack_budget,
        "step_size": lambda: args.step_size,
        "num_iters": lambda: args.num_iters,
        "callback": lambda: callback,
    }
    for knob in KNOBS:
        if getattr(args, knob) is not None:
            offers[knob] = lambda knob=knob: getattr(args, knob)
    given = {name: offers[name]() for name in parameters(args.defend_method) if name in offers}
    try:
        return METHODS[args.defend_method](images, **given)
    except GradientError as error:
        dtype = str(tools.dtype).removeprefix("torch.")
        hint = "" if dtype == "float32" else "; try --dtype fp32"
        raise UserError(f"{error}, with the networks in {dtype}{hint}") from None


def protect_subjects(
    subjects: Sequence[Subject],
    outputs: Sequence[Path | None],
    args: argparse.Namespace,
    tools: Tools,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> list[Report]:
    """Protects portraits of one size together, saves those that have an output path, and measures the files.

    Raises UserError.
    """
    import numpy as np

    sources = np.stack([subject.portrait.pixels for subject in subjects])  # (B, H, W, 3)
    images = utils.to_tensor(sources).to(tools.device)
    seeds = [utils.start_seed(args.seed, subject.portrait.path.stem) for subject in subjects]
    boxes = [subject.boxes for subject in subjects]
    protected = protect(images, args, tools, boxes=boxes, seeds=seeds, callback=callback)
    pixels = utils.to_uint8_within(protected, sources, args.attack_budget)
    made = [
        (subject, output, result)
        for subject, output, result in zip(subjects, outputs, pixels, strict=True)
        if output is not None
    ]
    for subject, output, result in made:
        utils.save_png(output, result, subject.portrait.alpha)
    return [measure(subject, output, args, tools) for subject, output, _ in made]


def measure(subject: Subject, output: Path, args: argparse.Namespace, tools: Tools) -> Report:
    """Reads the protected file back: what is in it is what counts.

    Raises UserError if it leaves the budget.
    """
    from skimage.metrics import peak_signal_noise_ratio

    source = subject.portrait.pixels
    saved = utils.load_image(output).pixels
    report = Report(
        path=output,
        budget=args.attack_budget,
        linf=utils.linf(saved, source),
        psnr=peak_signal_noise_ratio(source, saved, data_range=255),
    )
    if report.linf > args.attack_budget + 1e-9:
        raise UserError(f"{output}: differs by {report.linf:.4f} from its source, over the budget")
    if needs_faces(args) or args.check:
        for name in ("recognizer", "judge"):
            report.similarity[name] = _round_trip_similarity(name, subject, saved, tools)
    return report


def _round_trip_similarity(name: str, subject: Subject, saved: Any, tools: Tools) -> str:
    """"0.93 -> 0.21": cos(f(D(E(.))), f(source)) of the source and of the protected file."""
    import numpy as np
    import torch

    if not subject.boxes:
        return "not measured (no face found)"
    recognizer, vae = tools.if_there(name), tools.if_there("vae")
    if recognizer is None or vae is None:
        return "not measured"
    pair = utils.to_tensor(np.stack([subject.portrait.pixels, saved])).to(tools.device)
    with torch.no_grad():
        working = utils.to_working(pair, tools.models.resolution)
        reference = recognizer.embed(working[:1], [subject.boxes])
        latents = vae.encode(pair).latent_dist.mean
        trips = vae.decode(latents).sample.clamp(-1, 1).to(pair.dtype)
        before, after = (
            float((recognizer.embed(trip[None], [subject.boxes]) * reference).sum(dim=1).mean())
            for trip in trips
        )
    return f"{before:.2f} -> {after:.2f}"


class LossBar:
    """A tqdm bar over a batch's iterations; shows the mean loss where `pgd` waits for the device anyway."""

    def __init__(self, num_iters: int, label: str, shown: bool = True) -> None:
        from tqdm import tqdm

        from methods import CHECK_EVERY

        self.every = CHECK_EVERY
        self.num_iters = num_iters
        self.bar = tqdm(total=num_iters, desc=label, unit="it", leave=False, disable=not shown)

    def __call__(self, i: int, losses: torch.Tensor) -> None:
        if self.bar.disable:
            return
        if (i + 1) % self.every == 0 or i + 1 == self.num_iters:
            self.bar.set_postfix(loss=f"{losses.mean().item():.4g}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    source = args.input_path
    output = args.output_path or source.with_name(f"protected_{source.stem}.png")
    utils.check_output(output, source)
    check_knobs(args)
    if args.face_box and not needs_faces(args) and not args.check:
        raise UserError(f"--face_box: {args.defend_method} looks at no face; it is for facelock and --check")
    args.seed = utils.draw_seed(args.seed)
    tools = Tools(args)
    subject = load_subject(source, args, tools, args.face_box)  # a bad file is said before models are loaded
    tools.preload(args)
    if warning := models.size_warning(tools.models, subject.portrait.size):
        print(warning, file=sys.stderr)
    bar = LossBar(args.num_iters, args.defend_method)
    try:
        (report,) = protect_subjects([subject], [output], args, tools, bar)
    finally:
        bar.close()
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
