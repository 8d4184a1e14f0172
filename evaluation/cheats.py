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

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

import edit
import models
import runs
import utils
from utils import UserError

if TYPE_CHECKING:
    from PIL import Image

GAMMA = 1.5
COLOUR = 2.0  # 1 leaves it
SIGMA = 2.0  # px


def mirrored(image: Image.Image, _: int) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def shifted(image: Image.Image, pixels: int) -> Image.Image:
    """To the right and down; the border is repeated."""
    import numpy as np
    from PIL import Image

    padded = np.pad(np.asarray(image), ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")
    return Image.fromarray(padded[: image.height, : image.width])


def gamma(image: Image.Image, _: int) -> Image.Image:
    return image.point(lambda value: round(255 * (value / 255) ** (1 / GAMMA)))


def saturated(image: Image.Image, _: int) -> Image.Image:
    from PIL import ImageEnhance

    return ImageEnhance.Color(image).enhance(COLOUR)


def blurred(image: Image.Image, _: int) -> Image.Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(SIGMA))


# Of the clean edit; `shift` is for those that want it
OF_EDITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "mirrored": mirrored,
    "shifted": shifted,
    "gamma": gamma,
    "saturated": saturated,
    "blurred": blurred,
}
NAMES = ("reseeded", *OF_EDITS, "source")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="the source images")
    parser.add_argument("--clean_edit_dir", type=Path, required=True, help="edits of the sources")
    parser.add_argument("--output_dir", type=Path, required=True, help="where CHEAT/seed{S}/ are made")
    parser.add_argument(
        "--cheats", nargs="+", choices=NAMES, default=list(NAMES), metavar="CHEAT", help=", ".join(NAMES)
    )
    common.add_prompt_arguments(parser)
    parser.add_argument("--shift", type=utils.positive_int, default=4, help="px")
    parser.add_argument(
        "--seed", type=utils.known_seed, required=True, help="the S of the clean edits' seed{S}"
    )
    parser.add_argument(
        "--other_seed", type=utils.known_seed, help="the noise of 'reseeded' (default: --seed + 1)"
    )
    edit.add_edit_arguments(parser)
    runs.add_run_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    clean = common.clean_row(args.clean_edit_dir, [args.seed])
    prompts = common.prompts_of([clean], [args.seed], args.prompts)
    texts = common.texts_of([clean], [args.seed], prompts, args.prompt_file)
    texts = {prompt: texts.get(prompt, "") for prompt in prompts}
    cheats = [name for name in NAMES if name in args.cheats]  # the one that needs an editor first
    if clean.directory.resolve() in [(args.output_dir / name).resolve() for name in cheats]:
        raise UserError(f"{clean.directory}: the clean edits would be overwritten")
    utils.check_directory(args.output_dir)
    folders = {prompt: clean.directory / f"seed{args.seed}" / f"prompt{prompt}" for prompt in prompts}
    edits = {prompt: utils.images_by_stem(folder) for prompt, folder in folders.items()}
    sources = utils.images_by_stem(args.src_dir)
    there = {folder: set(edits[prompt]) for prompt, folder in folders.items()}
    names = common.shared_names(there | {args.src_dir: set(sources)}, common=False)

    status = 0
    for cheat in cheats:
        directory = args.output_dir / cheat / f"seed{args.seed}"
        items = [
            runs.Item(
                sources[name] if cheat in ("source", "reseeded") else edits[prompt][name],
                directory / f"prompt{prompt}" / f"{name}.png",
                utils.image_size(sources[name]),
                label=f"{cheat}/prompt{prompt}/{name}",
                prompt=texts[prompt],
            )
            for name in names
            for prompt in prompts
        ]
        if cheat == "reseeded":
            status = max(status, reseed(args, clean, directory, items, texts))
        else:
            status = max(status, alter(args, cheat, directory, items, texts))
    return status


def reseed(
    args: argparse.Namespace,
    clean: common.Row,
    directory: Path,
    items: list[runs.Item],
    texts: dict[int, str],
) -> int:
    """Edits the sources anew, as the clean edits were made but with another seed -> exit status.

    Raises UserError, also for other settings than the clean edits' run.json has.
    """
    unknown = [f"prompt{number}" for number, text in texts.items() if not text]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: the instruction is not known; give --prompt_file")
    seed = args.seed + 1 if args.other_seed is None else args.other_seed
    if seed == args.seed:
        raise UserError(f"--other_seed {seed}: that is the clean edits' own noise")
    chosen = edit.choose(args)
    device, dtype = models.set_up(args)
    unread = {"strength" if args.model == "instruct-pix2pix" else "image_guidance_scale": None}
    ours = dict.fromkeys(("cheats", "clean_edit_dir", "other_seed", "shift"))  # nothing that edits reads them
    record = runs.record_of(args, chosen, dtype, unread | ours)
    record |= {"seed": seed, "prompts": {str(number): text for number, text in texts.items()}}
    of_clean = (runs.read_record(clean.directory / f"seed{args.seed}") or {}).get("arguments", {})
    differing = [
        f"--{flag} {value}, not {record['arguments'].get(flag)}"
        for flag, value in of_clean.items()
        if flag not in common.SEPARATE and value != record["arguments"].get(flag)
    ]
    if differing:
        raise UserError(f"{clean.directory}: the clean edits were made with {'; '.join(differing)}")
    runs.check_record(directory, record)
    editor = models.load_editor(chosen, args.model, device, dtype, progress=False)

    def work(batch: list[runs.Item], portraits: list[utils.Portrait], wanted: list[bool]) -> None:
        edited = edit.edit_portraits(portraits, [item.prompt for item in batch], editor, seed)
        for item, portrait, pixels, is_wanted in zip(batch, portraits, edited, wanted, strict=True):
            if is_wanted:
                utils.save_png(item.output, pixels, portrait.alpha)

    def load(item: runs.Item) -> utils.Portrait:
        return utils.load_portrait(item.source, chosen.resolution)

    return _make(args, items, load, work, directory, record, args.batch_size)


def alter(
    args: argparse.Namespace, cheat: str, directory: Path, items: list[runs.Item], texts: dict[int, str]
) -> int:
    """Changes the clean edits' pixels, or takes the source's -> exit status."""
    from PIL import Image

    made_from = "src_dir" if cheat == "source" else "clean_edit_dir"
    arguments = {"cheat": cheat, made_from: str(getattr(args, made_from).resolve())}
    arguments |= {"shift": args.shift} if cheat == "shifted" else {}
    record = {"seed": args.seed, "arguments": arguments, "versions": runs.versions()}
    record["prompts"] = {str(number): text for number, text in texts.items() if text}

    def work(batch: list[runs.Item], loaded: list[utils.Portrait], _: list[bool]) -> None:
        import numpy as np

        for item, portrait in zip(batch, loaded, strict=True):
            pixels = portrait.pixels
            if cheat in OF_EDITS:
                pixels = np.asarray(OF_EDITS[cheat](Image.fromarray(pixels), args.shift))
            utils.save_png(item.output, pixels)

    return _make(args, items, lambda item: utils.load_image(item.source), work, directory, record, 1)


def _make(
    args: argparse.Namespace,
    items: list[runs.Item],
    load: Callable[[runs.Item], utils.Portrait],
    work: Callable[[list[runs.Item], list[utils.Portrait], list[bool]], None],
    directory: Path,
    record: dict[str, Any],
    batch_size: int,
) -> int:
    team = runs.Team()
    with runs.writing(directory, record, team):
        summary = runs.run_batches(
            runs.batches(items, batch_size),
            load,
            work,
            overwrite=args.overwrite,
            debug=args.debug,
            unit="picture",
        )
    return runs.finish(summary, team, directory)


if __name__ == "__main__":
    sys.exit(main())
