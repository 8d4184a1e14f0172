"""Protects one portrait against instruction-based diffusion editing.

    python defend.py --input_path=portrait.png --defend_method=facelock
    python defend.py --input_path=portrait.png --defend_method=facelock --attack_budget=0.02 --step_size=0.003
    python defend.py --input_path=assets/portraits/mini/portrait_1000000.png --models=mini \\
        --output_path=out.png

Writes protected_NAME.png beside the input, or, if that is there, protected_NAME_2.png and so on; or
--output_path. Of the editor, most methods load the VAE alone (docs/methods.md); facelock loads the face
recogniser and LPIPS. Budgets and steps are L-infinity sizes in the range [-1, 1] of a pixel: 0.03 is 3.8/255.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import utils
from images import choose_output
from loops import CHECK_EVERY, Run
from masks import BUDGET_MASKS
from methods import METHODS
from models.config import (
    NAME_HELP,
    add_editor_arguments,
    add_face_arguments,
    add_model_arguments,
    add_perceptual_argument,
)
from protection import Protector, Settings, readers
from transforms import chains
from utils import UserError, warn

if TYPE_CHECKING:
    from torch import Tensor

    from models.faces import Box


def transform_names(text: str) -> str:
    """argparse type: what `transforms.chains` reads."""
    try:
        chains(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


share_or_none = utils.number(float, 0, 1, "a number from 0 to 1")
KNOBS = {  # of the objectives -> the flag's type and what it is; --targeted stands apart
    "c": (utils.positive_float, "weight of the latent term"),
    "unrolled": (utils.positive_int, "denoising steps of the edit that it goes through"),
    "transforms": (transform_names, "what the picture is seen through; resize+light,jpeg: two by turns"),
    "samples": (utils.positive_int, "random transforms an iteration"),
}
BUDGET_HELP = "L-infinity size of the perturbation in [-1, 1], from 2/255 to 2"


def add_defense_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag that decides how a portrait is protected; `settings_of` reads them."""
    which = {"dest": "method", "choices": METHODS, "default": Settings.method}
    parser.add_argument("--defend_method", **which, help="the defense")
    size = {"dest": "budget", "metavar": "ATTACK_BUDGET", "type": utils.budget_size}
    parser.add_argument("--attack_budget", **size, default=Settings.budget, help=BUDGET_HELP)
    seed_help = "of the random start, with the file's stem; -1 draws and prints one"
    parser.add_argument("--seed", type=utils.seed_number, default=Settings.seed, help=seed_help)
    add_method_arguments(parser)
    add_editor_arguments(parser)
    add_face_arguments(parser)
    add_perceptual_argument(parser)
    add_model_arguments(parser)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the methods themselves, which some of them read."""
    text = f"first step in [-1, 1], falling linearly to 1 %% of it (all but {others('step_size')}; default: "
    parser.add_argument("--step_size", type=utils.positive_float, help=f"{text}{run_default('step_size')})")
    text = f"iterations (all but noise); 0 leaves the random start (default: {run_default('num_iters')})"
    parser.add_argument("--num_iters", type=utils.natural_number, help=text)
    text = "where the budget is whole: on the face, on texture, on both; elsewhere it falls to 0"
    own = ", ".join(name for name, method in METHODS.items() if method.mask == "face")
    text = f"{text} (default: face for {own}, else none)"
    parser.add_argument("--budget_mask", choices=BUDGET_MASKS, help=text)
    targeted = parser.add_mutually_exclusive_group()
    for flag, value, what in (
        ("--targeted", True, "towards a zero latent; sds: towards what is easily denoised"),
        ("--untargeted", False, "away from the clean latent; sds: from what is easily denoised"),
    ):
        owners = [name for name, method in METHODS.items() if method.parameters.get("targeted") is value]
        text = f"{what} ({readers('targeted')}; the default of {', '.join(owners)})"
        targeted.add_argument(flag, dest="targeted", action="store_const", const=value, help=text)
    for name, (kind, text) in KNOBS.items():
        owner = readers(name)
        default = METHODS[owner.split(", ")[0]].parameters[name]
        parser.add_argument(f"--{name}", type=kind, help=f"{text}, {owner} only (default: {default})")
    parser.add_argument("--lr", type=utils.positive_float, help=f"Adam's rate, cw only (default: {Run.lr})")
    text = f"how far steps are smoothed, a share of the long side, {readers('smoothing')} only (default: "
    parser.add_argument("--smoothing", type=share_or_none, help=f"{text}{run_default('smoothing')})")
    text = f"attack the VAEs of several editors at once, by the mean of the objective: {NAME_HELP}"
    parser.add_argument("--vae", nargs="+", metavar="NAME", help=text)
    text = "which faces facelock and a mask protect; with all, their mean similarity counts"
    parser.add_argument("--faces", choices=("largest", "all"), default=Settings.faces, help=text)
    again = "the activations of VAE and denoiser are computed again for each gradient"
    for flag, text in (
        ("--check", "measure face similarity after a VAE round trip for other methods than facelock, too"),
        ("--checkpointing", f"less memory, more time: {again}"),
        ("--compile", "for GPUs: torch.compile the networks; minutes to begin with"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    for bound in ("--clamp_min", "--clamp_max"):
        parser.add_argument(bound, type=float, help="of the authors' scripts; changes nothing here")


def settings_of(args: argparse.Namespace) -> Settings:
    """Turns the flags of a defense into settings."""
    if args.clamp_min is not None or args.clamp_max is not None:
        warn("--clamp_min and --clamp_max change nothing: every method is given [-1, 1] and keeps to it")
    given = {name: getattr(args, name) for name in (*KNOBS, "targeted")}
    return Settings.of(args, knobs={name: value for name, value in given.items() if value is not None})


def others(name: str) -> str:
    """Lists the methods that don't read a flag."""
    return ", ".join(key for key in METHODS if key not in readers(name).split(", "))


def run_default(name: str) -> str:
    """Writes the default of a field of Run, and the methods that have another one."""
    own = {key: getattr(method.run, name) for key, method in METHODS.items()}
    differing = [f"{key}: {value}" for key, value in own.items() if value != getattr(Run, name)]
    return "; ".join([str(getattr(Run, name)), *differing])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_path", type=utils.path, required=True, help="the portrait, an image file")
    parser.add_argument(
        "--output_path", type=utils.path, help="a .png (default: protected_NAME.png beside the input)"
    )
    box_help = "where the face is, in pixels of the upright input, instead of looking for it"
    parser.add_argument("--face_box", nargs=1, type=face_box, metavar="X0,Y0,X1,Y1", help=box_help)
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
    """Makes a loop's callback, a tqdm bar; shows the objective where a loop waits for the device anyway."""
    from tqdm import tqdm

    with tqdm(total=num_iters, desc=label, unit="it", leave=False, disable=not shown) as bar:

        def step(i: int, values: Tensor) -> None:
            if shown and ((i + 1) % CHECK_EVERY == 0 or i + 1 == num_iters):
                bar.set_postfix(objective=f"{values.mean().item():.4g}", refresh=False)
            bar.update()

        yield step


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Protects the portrait that the flags name -> exit status."""
    why_png = "JPEG and its like would destroy the perturbation"
    output = choose_output(args.output_path, args.input_path, "protected", why_png)
    args.seed = utils.draw_seed(args.seed)
    protector = Protector(settings_of(args))
    if args.face_box and not protector.looks_at_faces:
        raise UserError(f"--face_box: {protector.name} looks at no face; facelock, masks and --check do")
    boxes = args.face_box or ()
    subject = protector.load(args.input_path, boxes)  # a bad file is said before models are loaded
    protector.preload()
    protector.config.warn_of([subject.portrait.size])
    with progress_bar(protector.run.num_iters, protector.name) as step:
        (report,) = protector.save([subject], [output], step)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
