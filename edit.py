"""Edits one image by an instruction, as somebody who found it would.

    python edit.py --input_path=portrait.png --prompt="Let the person wear a police suit"
    python edit.py --input_path=portrait.png --prompt="Turn the person's hair pink" --seed=1234
    python edit.py --input_path=assets/portraits/mini/portrait_1000000.png --prompt="Let it be snowy" --models=mini

Writes edit_NAME.png beside the input (or --output_path). The seed is printed: with it, the run can be repeated.
The editors' safety checkers are off: a checker that blanks an edit would be counted as protection.
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
    """Every flag that decides how an image is edited; shared with main_edit.py."""
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
    parser.add_argument("--seed", type=utils.seed, default=-1, help="of the editor's noise; -1 draws and prints one")
    parser.add_argument(
        "--strength",
        type=strength,
        default=0.5,
        help="share of the denoising that img2img does (stable-diffusion)",
    )
    models.add_editor_arguments(parser)
    models.add_model_arguments(parser)


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
    add_edit_arguments(parser)
    return parser.parse_args(argv)


def load_editor(args: argparse.Namespace, progress: bool) -> models.Editor:
    """The editor that the arguments name. Raises UserError."""
    chosen = models.choose(args)
    device, dtype = models.place(args)
    return models.load_editor(chosen, args.model, device, dtype, args.strength, progress)


def load_portrait(path: Path, resolution: int) -> Portrait:
    """Reads an image that is large enough to be edited. Raises UserError naming the file."""
    portrait = utils.load_image(path)
    try:
        utils.working_size(portrait.size, resolution)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return portrait


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
    portrait = load_portrait(source, models.choose(args).resolution)
    args.seed = utils.draw_seed(args.seed)
    editor = load_editor(args, progress=True)
    if warning := models.warn_if_not_made_for(editor.models, portrait.size):
        print(warning, file=sys.stderr)
    (pixels,) = edit_portraits([portrait], [args.prompt], editor, args.seed)
    utils.save_png(output, pixels, portrait.alpha)
    print(f"{output}: {args.prompt!r}, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
