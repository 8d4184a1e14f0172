"""Pictures that look like edits of protected images to a metric, without any protection.

    python evaluation/cheats.py --src_dir portraits --clean_edit_dir edits/clean --output_dir cheats --seed 0
    python evaluation/eval_all.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs cheats --seed 0

From the clean edits it makes OUTPUT_DIR/CHEAT/seed{S}/prompt{i}/NAME.png:

    reseeded    the source edited anew with another seed of noise
    mirrored    the edit, left and right exchanged
    shifted     the edit, moved by --shift px in both directions
    gamma       the edit, brightened: 255 (v / 255)^(1 / 1.5)
    saturated   the edit with twice the colour
    blurred     the edit, Gaussian blur of sigma 2 px
    source      the source itself: no edit at all

In all of them the person is still there. A metric that rewards one can be gamed that way.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from directories import clean_row
from pairing import Edits, find_edits
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scoring import add_prompt_arguments

import models.config
import runs
import utils
from images import Portrait, load_image, save_png
from main_edit import edit_directory
from utils import UserError

GAMMA = 1.5
COLOUR = 2.0  # 1 leaves it
SIGMA = 2.0  # px
SHIFT = 4  # px


def shifted(image: Image.Image, pixels: int) -> Image.Image:
    """Moves to the right and down; the border is repeated."""
    padded = np.pad(np.asarray(image), ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")
    return Image.fromarray(padded[: image.height, : image.width])


# Of a picture and the px of `shifted`
ALTERED: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "mirrored": lambda image, _: ImageOps.mirror(image),
    "shifted": shifted,
    "gamma": lambda image, _: image.point(lambda value: round(255 * (value / 255) ** (1 / GAMMA))),
    "saturated": lambda image, _: ImageEnhance.Color(image).enhance(COLOUR),
    "blurred": lambda image, _: image.filter(ImageFilter.GaussianBlur(SIGMA)),
    "source": lambda image, _: image,
}
NAMES = ("reseeded", *ALTERED)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=utils.path, required=True, help="the source images")
    parser.add_argument("--clean_edit_dir", type=utils.path, required=True, help="edits of the sources")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where CHEAT/seed{S}/ are made")
    names = {"choices": NAMES, "default": list(NAMES), "help": ", ".join(NAMES)}
    parser.add_argument("--cheats", nargs="+", metavar="CHEAT", **names)
    add_prompt_arguments(parser)
    parser.add_argument("--shift", type=utils.positive_int, default=SHIFT, help="px")
    parser.add_argument("--seed", type=utils.known_seed, required=True, help="the S of the edits' seed{S}")
    parser.add_argument("--other_seed", type=utils.known_seed, help="of 'reseeded' (default: --seed + 1)")
    models.config.add_edit_arguments(parser)
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Makes the cheats that the flags name -> exit status."""
    given = {flag: getattr(args, flag) for flag in ("src_dir", "prompts", "prompt_file")}
    row = clean_row(args.clean_edit_dir, [args.seed])
    edits = find_edits([row.directory], [args.seed], **given)
    if row.directory.resolve() in [(args.output_dir / name).resolve() for name in args.cheats]:
        raise UserError(f"{row.directory}: the clean edits would be overwritten")
    utils.check_directory(args.output_dir)
    texts = {number: edits.texts.get(number, "") for number in edits.prompts}
    status, options = 0, runs.Options.of(args)
    for cheat in [name for name in NAMES if name in args.cheats]:  # the one that needs an editor first
        directory = args.output_dir / cheat / f"seed{args.seed}"
        if cheat == "reseeded":
            edits.check_texts()
            config = models.config.resolve(models.config.ModelSettings.of(args))
            other_seed = args.seed + 1 if args.other_seed is None else args.other_seed
            check_reseeding(row.directory / f"seed{args.seed}", config, args.seed, other_seed)
            made = edit_directory(args.src_dir, directory, texts, other_seed, config, options)
        else:
            made = alter(cheat, edits, directory, texts, args.shift, options)
        status = max(status, made)
    return status


def check_reseeding(clean: Path, config: models.config.ModelConfig, seed: int, other_seed: int) -> None:
    """Refuses to edit anew in another way than the clean edits of a seed{S} were made. Raises UserError."""
    if other_seed == seed:
        raise UserError(f"--other_seed {other_seed}: that is the clean edits' own noise")
    before = (runs.read_record(clean) or {}).get("arguments", {})
    differing = [
        f"--{flag} {before[flag]}, not {value}"
        for flag, value in config.edit_settings().items()
        if before.get(flag, value) != value
    ]
    if differing:
        raise UserError(f"{clean}: the clean edits were made with {'; '.join(differing)}")


def alter(
    cheat: str, edits: Edits, directory: Path, texts: dict[int, str], shift: int, options: runs.Options
) -> int:
    """Changes the clean edits' pixels, or takes the source's -> exit status. Raises UserError."""
    items = []
    for key in edits.keys:
        source = edits.sources[key.name] if cheat == "source" else edits.path(edits.rows[0], key)
        name = f"prompt{key.prompt}/{key.name}"
        output = directory / f"{name}.png"
        items.append(runs.Item(source, output, None, f"{cheat}/{name}", texts[key.prompt]))

    def load(item: runs.Item) -> Portrait:
        return load_image(item.source)

    def work(batch: list[runs.Item], portraits: list[Portrait], _: list[bool]) -> runs.Facts:
        for item, portrait in zip(batch, portraits, strict=True):
            save_png(item.output, np.asarray(ALTERED[cheat](Image.fromarray(portrait.pixels), shift)))
        return [{}] * len(batch)

    settings = {"seed": edits.keys[0].seed, "cheat": cheat} | ({"shift": shift} if cheat == "shifted" else {})
    known = {number: text for number, text in texts.items() if text}
    return runs.Job(items, load, work, directory, settings, options, known, unit="picture").run()


if __name__ == "__main__":
    sys.exit(main())
