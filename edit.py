"""Edits one image by an instruction, as somebody who found it would.

    python edit.py --input_path=portrait.png --prompt="Let the person wear a police suit"
    python edit.py --input_path=portrait.png --prompt="Turn the person's hair pink" --seed=1234
    python edit.py --input_path=assets/portraits/mini/portrait_1000000.png --prompt="Let it be snowy" \\
        --models=mini --output_path=edit.png

Writes edit_NAME.png beside the input (or --output_path). The seed is printed: with it, the run can be
repeated. The editors' safety checkers are off: a checker that blanks an edit would be counted as protection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import models
import utils
from utils import Portrait, UserError

if TYPE_CHECKING:
    import numpy as np


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag but the seed that decides how an image is edited; shared with main_edit.py."""
    parser.add_argument(
        "--num_inference_steps",
        type=utils.positive_int,
        help=models.set_help("denoising steps", "num_inference_steps"),
    )
    parser.add_argument(
        "--image_guidance_scale",
        type=utils.at_least_one,  # diffusers would silently turn all guidance off below 1
        help=models.set_help("how closely the edit keeps to the image, at least 1", "image_guidance_scale"),
    )
    parser.add_argument(
        "--guidance_scale",
        type=utils.non_negative_float,
        help=models.set_help(
            "how strongly the instruction is followed; up to 1, both guidances are off", "guidance_scale"
        ),
    )
    parser.add_argument(
        "--strength",
        type=strength,
        help="share of the denoising that img2img does, stable-diffusion only (default: 0.5)",
    )
    models.add_editor_arguments(parser)
    models.add_model_arguments(parser)


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """--seed"""
    parser.add_argument(
        "--seed", type=utils.seed_number, default=-1, help="of the editor's noise; -1 draws one"
    )


def strength(text: str) -> float:
    """argparse type: a number above 0 and up to 1."""
    value = utils.positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_path", type=Path, required=True, help="the image, any image file")
    parser.add_argument("--prompt", required=True, help="the instruction")
    parser.add_argument("--output_path", type=Path, help="a .png (default: edit_NAME.png beside the input)")
    add_seed_argument(parser)
    add_edit_arguments(parser)
    return parser.parse_args(argv)


def choose(args: argparse.Namespace) -> models.ModelSet:
    """The model set that the arguments name. Raises UserError for a knob that its editor doesn't have."""
    chosen = models.choose(args)
    unread = "strength" if args.model == "instruct-pix2pix" else "image_guidance_scale"
    if getattr(args, unread) is not None:
        raise UserError(f"--{unread}: {args.model} has no such knob")
    if args.model == "stable-diffusion" and chosen.num_inference_steps * chosen.strength < 1:
        raise UserError(
            f"{chosen.num_inference_steps} steps at strength {chosen.strength:g} are less than one"
        )
    return chosen


def edit_portraits(
    portraits: Sequence[Portrait], prompts: Sequence[str], editor: models.Editor, seed: int
) -> np.ndarray:
    """Edits portraits of one size, each by its own instruction -> (B, H, W, 3) uint8, the portraits' size."""
    import numpy as np

    images = utils.to_tensor(np.stack([portrait.pixels for portrait in portraits]))
    return utils.to_uint8(editor(images, prompts, seed))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    source = args.input_path
    output = args.output_path or source.with_name(f"edit_{source.stem}.png")
    utils.check_output(output, source)
    chosen = choose(args)
    portrait = utils.load_portrait(source, chosen.resolution)
    args.seed = utils.draw_seed(args.seed)
    editor = models.load_editor(chosen, args.model, *models.set_up(args), progress=True)
    if warning := models.size_warning(chosen, portrait.size):
        print(warning, file=sys.stderr)
    (pixels,) = edit_portraits([portrait], [args.prompt], editor, args.seed)
    utils.save_png(output, pixels, portrait.alpha)
    print(utils.one_line(f"{output}: {args.prompt!r}, seed {args.seed}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
