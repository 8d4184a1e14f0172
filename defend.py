"""Protects one portrait against instruction-based diffusion editing.

    python defend.py portrait.png
    python defend.py --input_path=portrait.png --defend_method=facelock --attack_budget=0.02 --step_size=0.003
    python defend.py --input_path=assets/portraits/mini/portrait_1000000.png --models=mini \\
        --output_path=out.png

Writes protected_NAME.png beside the input (protected_NAME_2.png and so on if that exists; with the stand-ins
of --models=mini protected_mini_NAME.png), or --output_path. If faces are looked at, each judge reports at the
end what is left of them after a round trip through the autoencoder.
Most methods load only the editor's VAE (docs/methods.md); facelock also loads the face recogniser and LPIPS.
Budgets and steps are L-infinity sizes in the range [-1, 1] of a pixel: 0.03 is 3.8/255.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import utils
from images import choose_output
from loops import CHECK_EVERY
from masks import BUDGET_MASKS
from methods import METHODS, RECOMMENDED
from models.config import ATTACK, add_model_arguments
from protection import NUMBERS, Protector, Settings, output_prefix, readers
from transforms import chains
from utils import UserError, defaults_help, warn
from verdict import ADVICE, all_attacked

if TYPE_CHECKING:
    from torch import Tensor

    from models.faces import Box


def transform_names(text: str) -> str:
    """argparse type: a text that `transforms.chains` can read."""
    try:
        chains(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


KNOBS = {  # flag -> type and help; of the loops (NUMBERS) and of the objectives, except --targeted
    "step_size": (utils.positive_float, "first step in [-1, 1]; steps shrink linearly to 1 %% of it"),
    "num_iters": (utils.natural_number, "number of iterations; 0 keeps the start"),
    "lr": (utils.positive_float, "learning rate of Adam"),
    "rms": (utils.positive_float, "largest root mean square of the change, where it is allowed, in [-1, 1]"),
    "momentum": (utils.number(float, 0, 1, "a number from 0 to 1"), "share of the earlier gradients kept"),
    "c": (utils.positive_float, "weight of the latent term"),
    "unrolled": (utils.positive_int, "denoising steps that the gradient passes through"),
    "transforms": (
        transform_names,
        "random transforms of the picture; resize+light,jpeg alternates between a chain of two and a JPEG",
    ),
    "samples": (utils.positive_int, "random transforms per iteration"),
    "wash": (transform_names, "what happens to the picture before it is edited, written as in --transforms"),
    "refine": (utils.natural_number, "further iterations of the method that the network was trained on"),
}
TARGETED = {  # value -> flag and help
    True: ("--targeted", "push the latent towards zero; sds: towards what is easily denoised"),
    False: ("--untargeted", "push the latent away from the clean one; sds: from what is easily denoised"),
}
BUDGET_HELP = "L-infinity size of the perturbation in [-1, 1], from 2/255 to 2"


def add_defense_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag that decides how a portrait is protected; `settings_of` reads them."""
    which = {"dest": "method", "choices": METHODS, "default": Settings.method}
    group = parser.add_argument_group("which defense to use", which_method())
    group.add_argument("--defend_method", **which, help="the defense; facelock is the paper's")
    size = {"dest": "budget", "metavar": "ATTACK_BUDGET", "type": utils.budget_size}
    text = defaults_help(BUDGET_HELP, {name: f"{method.run.budget:.3g}" for name, method in METHODS.items()})
    parser.add_argument("--attack_budget", **size, help=text)
    text = "seeds the random start, together with the file's stem; -1 draws a seed and prints it"
    parser.add_argument("--seed", type=utils.seed_number, default=Settings.seed, help=text)
    add_method_arguments(parser)
    add_model_arguments(parser, *ATTACK)


def which_method() -> str:
    """Writes one line per recommended method, with its budget, and names the others."""
    lines = [f"{name} at {METHODS[name].run.budget:g}: {text}" for name, text in RECOMMENDED.items()]
    lines.append(f"for comparison: {', '.join(name for name in METHODS if name not in RECOMMENDED)}")
    return "\n".join(textwrap.fill(line, 106, subsequent_indent="  ") for line in lines)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags whose defaults depend on the method, and those that all methods share."""
    for name, (kind, text) in KNOBS.items():
        text = defaults_help(text, readers(name), METHODS)
        parser.add_argument(f"--{name}", type=kind, help=text)
    targeted = parser.add_mutually_exclusive_group()
    for value, (flag, text) in TARGETED.items():
        own = ", ".join(name for name, default in readers("targeted").items() if default is value)
        text = f"{text} (default of {own})"
        targeted.add_argument(flag, dest="targeted", action="store_const", const=value, help=text)
    text = "where the whole budget may be spent, falling to 0 elsewhere: on the face, on texture, on both"
    text = defaults_help(text, {name: method.mask for name, method in METHODS.items()})
    parser.add_argument("--budget_mask", choices=BUDGET_MASKS, help=text)
    text = "which faces facelock and masks protect; all: by the mean of their similarities"
    parser.add_argument("--faces", choices=("largest", "all"), default=Settings.faces, help=text)
    for flag, text in (
        ("--check", "measure face similarity after a VAE round trip for every method, not only facelock"),
        ("--checkpointing", "save memory: compute activations of VAE, denoiser and transformer twice"),
        ("--compile", "torch.compile the networks, for GPUs; takes minutes at the start"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    for bound in ("--clamp_min", "--clamp_max"):
        text = "accepted so that the authors' command lines work; changes nothing"
        parser.add_argument(bound, type=float, help=text)


def settings_of(args: argparse.Namespace) -> Settings:
    """Turns the flags of a defense into settings."""
    if args.clamp_min is not None or args.clamp_max is not None:
        warn("--clamp_min and --clamp_max change nothing: every method keeps to [-1, 1]")
    knobs = {name: getattr(args, name) for name in ("targeted", *KNOBS) if name not in NUMBERS}
    return Settings.of(args, knobs={name: value for name, value in knobs.items() if value is not None})


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    utils.add_input_argument(parser, "the portrait, an image file")
    parser.add_argument(
        "--output_path", type=utils.path, help="a .png (default: protected_NAME.png beside the input)"
    )
    text = "where the face is, in pixels of the upright input, instead of detecting it"
    parser.add_argument("--face_box", nargs=1, type=face_box, metavar="X0,Y0,X1,Y1", help=text)
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


@contextlib.contextmanager
def progress_bar(num_iters: int, label: str, shown: bool = True) -> Iterator[Callable[[int, Tensor], None]]:
    """Makes a loop's callback, a tqdm bar; shows the objective when the loop waits for the device anyway."""
    from tqdm import tqdm

    with tqdm(total=num_iters, desc=label, unit="it", leave=False, disable=not (shown and num_iters)) as bar:

        def step(i: int, values: Tensor) -> None:
            if shown and ((i + 1) % CHECK_EVERY == 0 or i + 1 == num_iters):
                bar.set_postfix(objective=f"{values.mean().item():.4g}", refresh=False)
            bar.update()

        yield step


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Protects the portrait that the flags name -> exit status."""
    why_png = "JPEG and other lossy formats would destroy the perturbation"
    output = choose_output(args.output_path, args.input_path, output_prefix(args.models), why_png)
    args.seed = utils.draw_seed(args.seed)
    protector = Protector(settings_of(args))
    if args.face_box and not protector.looks_at_faces:
        raise UserError(f"--face_box: {protector.name} ignores faces; facelock, masks and --check use them")
    boxes = args.face_box or ()
    subject = protector.load(args.input_path, boxes)  # a bad file is reported before models are loaded
    config, size = protector.config, subject.portrait.size
    if protector.needs:
        config.warn_of_cpu(args.device)
    with config.offering_mini([size]):
        protector.preload()
    config.warn_of([size])
    with progress_bar(protector.num_iters, protector.name) as step:
        (report,) = protector.save([subject], [output], step)
    print(report)
    told = report.verdict("" if args.models == "mini" else ADVICE)
    if report.faces and (nobody := all_attacked(config, "round trip")):
        told.append(str(nobody))
    if report.n_found > len(subject.boxes):
        what = "protected" if protector.needs_face else "measured"
        told.append(f"{report.n_found} faces found, {len(subject.boxes)} {what}; for all: --faces all")
    for line in [*told, config.last_word()]:
        if line:
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
