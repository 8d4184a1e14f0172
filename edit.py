"""Edits one image by an instruction, as somebody who found it would.

    python edit.py portrait.png --prompt="Let the person wear a police suit"
    python edit.py protected_portrait.png --source=portrait.png --prompt="Let it be snowy" --seed=0
    python edit.py --input_path=portrait.png --prompt="Turn the person's hair pink" --seed=1234
    python edit.py --input_path=assets/portraits/mini/portrait_1000000.png --prompt="Let it be snowy" \\
        --models=mini --output_path=edit.png

Writes edit_NAME.png beside the input (edit_NAME_2.png and so on if that exists), or --output_path. The seed
is printed, so that the run can be repeated. --source names the unprotected picture: it is edited by the same
instruction and seed, and each judge reports whether the protection held. The editors' safety checkers are
off: a checker that blanks an edit would be counted as protection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import utils
from images import Portrait, choose_output, load_image, save_png, side_by_side, to_tensor, to_uint8
from models.config import ModelConfig, ModelSettings, add_model_arguments, resolve
from models.editors import EDITORS, Editor
from models.faces import FaceDetector
from utils import UserError
from verdict import ADVICE, all_attacked, compare

if TYPE_CHECKING:
    import numpy as np


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --seed."""
    text = "seeds the editor's noise; -1 draws a seed and prints it"
    parser.add_argument("--seed", type=utils.seed_number, default=-1, help=text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    utils.add_input_argument(parser, "the image file to edit")
    parser.add_argument("--prompt", type=utils.prompt, help="the instruction")
    parser.add_argument(
        "--output_path", type=utils.path, help="a .png (default: edit_NAME.png beside the input)"
    )
    text = "the picture before its protection, to judge whether the protection held. With "
    text += "--recognizer, name the recognisers that the protection attacked: they are no judges"
    parser.add_argument("--source", type=utils.path, help=text)
    text = "with --source: a .png of both pictures and their edits"
    parser.add_argument("--comparison", type=utils.path, metavar="FILE", help=text)
    add_seed_argument(parser)
    add_model_arguments(parser, "edit", "recognizer", "judge")
    args = parser.parse_args(argv)
    if args.prompt is None and EDITORS[args.model].by_words:
        parser.error("the following arguments are required: --prompt")
    if args.comparison and not args.source:
        parser.error("--comparison: needs --source")
    return args


def ignored(prompt: str | None, kind: str) -> str:
    """Warns that an editor without words ignores an instruction -> the text recorded in its place."""
    if prompt is not None:
        utils.warn(f"--prompt is ignored: {kind} takes no words")
    return utils.NO_WORDS


def edit_portraits(
    portraits: Sequence[Portrait], prompts: Sequence[str], editor: Editor, seed: int
) -> np.ndarray:
    """Edits portraits of one size, each by its own instruction -> (B, H, W, 3) uint8 of that size."""
    import numpy as np

    images = to_tensor(np.stack([portrait.pixels for portrait in portraits]))
    return to_uint8(editor(images, prompts, seed))


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Edits the image that the flags name -> exit status."""
    why_png = "an edit is measured pixel by pixel, and JPEG and other lossy formats change pixels"
    output = choose_output(args.output_path, args.input_path, "edit", why_png)
    config = resolve(ModelSettings.of(args))
    if not config.editor.by_words:
        args.prompt, args.seed = ignored(args.prompt, config.kind), 0
    portrait = load_image(args.input_path, config.resolution)
    source = args.source and load_image(args.source, config.resolution)
    if source and source.size != portrait.size:
        raise UserError(f"{args.source}: can't be the source of {args.input_path}, which differs in size")
    picture = args.comparison and choose_output(args.comparison, args.input_path, "comparison", why_png)
    args.seed = utils.draw_seed(args.seed)
    config.warn_of_cpu(args.device)
    with config.offering_mini([portrait.size]):
        editor = config.load_editor(progress=True)
    config.warn_of([portrait.size], [args.prompt])
    (pixels,) = edit_portraits([portrait], [args.prompt], editor, args.seed)
    save_png(output, pixels, portrait.alpha)
    print(utils.one_line(f"{output}: {args.prompt!r}, seed {args.seed}"))
    if source:
        (clean,) = edit_portraits([source], [args.prompt], editor, args.seed)
        if picture:
            save_png(picture, side_by_side([source.pixels, portrait.pixels, clean, pixels]))
        for line in judged(config, source.pixels, [clean, pixels]):
            print(line)
    if word := config.last_word():
        print(word)
    return 0


def judged(config: ModelConfig, source: np.ndarray, edits: Sequence[np.ndarray]) -> list[str]:
    """Returns the judges' verdict on the largest face, in the edits of a source and of its protection."""
    detector = FaceDetector(config.device)
    if not (boxes := detector(source)):
        return ["No face was found in the source: there is nothing to compare."]
    made = "edit" if config.editor.by_words else "round trip"
    if nobody := all_attacked(config, made):
        return [str(nobody)]
    try:
        (face,) = compare(config, detector, source, edits, boxes[:1], judges_alone=True)
    except UserError as error:  # the edit itself is saved
        return [f"No verdict on this {made}: {error}."]
    told = [str(face.verdict(made, "" if config.models == "mini" else ADVICE))]
    return [*told, f"{len(boxes)} faces found, only the largest compared"] if len(boxes) > 1 else told


if __name__ == "__main__":
    sys.exit(main())
