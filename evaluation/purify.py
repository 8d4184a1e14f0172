"""What an attacker or a platform does to a picture before it is edited: compression, blur, resizing, noise...

    python evaluation/purify.py --input_dir protected/facelock/budget_0.03 \\
        --output_dir purified/jpeg75/facelock --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir purified/jpeg75/clean --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir out --method jpeg:75+resize:0.5
    python evaluation/purify.py --input_dir edits/clean --output_dir cheats/mirror --method mirror

    jpeg:Q       JPEG of quality Q, 1 to 95, colours at half the resolution (4:2:0)
    blur:K:S     Gaussian, K x K pixels (odd, up to 999), sigma S px, 0.1 to 100
    rotate:A     by an angle within A degrees, 0.01 to 180; the corners become black
    resize:F     down to the share F of each side, 0.001 to 0.999, and back up
    crop:F       the middle F of each side, 0.001 to 0.999, brought back up
    noise:S      Gaussian noise, S levels of 255, 0.01 to 255
    mirror       left and right exchanged
    shift:D      moved right and down by D px, 1 to 999; the border is repeated
    gamma:G      255 (v / 255)^(1 / G), 0.1 to 10; above 1 it brightens
    saturate:F   F times the colour, 0 to 10; 0 is grey
    palette:N    N colours, 2 to 256, chosen for the picture, dithered
    vae          a round trip through the editor's VAE
    denoise:S    noises the latent to the share S of the editor's schedule, 0.01 to 1, and lets the
                 editor's own denoiser, without an instruction, remove the noise (after DiffPure); a
                 denoiser that takes the picture as input gets it, as in an edit
    restore      the editor itself, asked to "restore this photo"
    a+b+...      one after the other

Writes OUTPUT_DIR/NAME.png, of the input's size, without alpha, and run.json and manifest.jsonl, which record
how. A directory of edits, which holds seed{S}/prompt{i}/, keeps its layout. Angle and noise come from --seed
and the file's stem, so a source and its protected form get the same. Compare the edits of a purified
protection with edits of the equally purified source: purification changes an edit, too.
The paper's: jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
"""

from __future__ import annotations

import argparse
import functools
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file
    import _path  # noqa: F401

import numpy as np
from PIL import Image, ImageEnhance

import models.config
import runs
import transforms
import utils
from evaluation.pairing import folders
from images import Portrait, images_by_stem, load_image, save_png, to_tensor, to_uint8
from models.loading import recorded
from utils import UserError

if TYPE_CHECKING:
    import torch

RESTORE = "restore this photo"  # as attackers like EditorClean ask
DENOISING_STEPS = 20
BICUBIC = Image.Resampling.BICUBIC


def jpeg(pixels: np.ndarray, generator: torch.Generator, quality: int) -> np.ndarray:
    """Compresses as JPEG at a quality, else with Pillow's defaults."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return np.array(Image.open(buffer, formats=["JPEG"]))


def blur(pixels: np.ndarray, generator: torch.Generator, side: int, sigma: float) -> np.ndarray:
    """Blurs as `transforms.blur` does."""
    if side // 2 >= min(pixels.shape[:2]):
        raise UserError(f"blur:{side}: the image's side is only {min(pixels.shape[:2])} px")
    return to_uint8(transforms.blur(to_tensor(pixels), side, sigma))[0]


def rotate(pixels: np.ndarray, generator: torch.Generator, most: float) -> np.ndarray:
    """Rotates by an angle drawn from [-most, most] degrees, bicubic, by Pillow."""
    import torch

    angle = most * (2 * torch.rand((), generator=generator).item() - 1)
    return np.array(Image.fromarray(pixels).rotate(angle, BICUBIC))


def resize(pixels: np.ndarray, generator: torch.Generator, share: float) -> np.ndarray:
    """Brings each side down to a share and back up, bicubic, by Pillow."""
    image = Image.fromarray(pixels)
    small = [max(1, round(side * share)) for side in image.size]
    return np.array(image.resize(small, BICUBIC).resize(image.size, BICUBIC))


def crop(pixels: np.ndarray, generator: torch.Generator, share: float) -> np.ndarray:
    """Brings the middle share of each side back up to the whole size, bicubic, by Pillow."""
    height, width = pixels.shape[:2]
    x, y = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    middle = Image.fromarray(pixels).crop((x, y, max(x + 1, width - x), max(y + 1, height - y)))
    return np.array(middle.resize((width, height), BICUBIC))


def noise(pixels: np.ndarray, generator: torch.Generator, levels: float) -> np.ndarray:
    """Adds Gaussian noise of a standard deviation in 8-bit levels, the same for source and protected."""
    import torch

    images = to_tensor(pixels)
    return to_uint8(images + torch.randn(images.shape, generator=generator) * levels * utils.LEVEL)[0]


def mirror(pixels: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Mirrors left and right."""
    return np.ascontiguousarray(pixels[:, ::-1])


def shift(pixels: np.ndarray, generator: torch.Generator, distance: int) -> np.ndarray:
    """Moves right and down by a distance in px; the border is repeated."""
    padded = np.pad(pixels, ((distance, 0), (distance, 0), (0, 0)), mode="edge")
    return padded[: pixels.shape[0], : pixels.shape[1]]


def gamma(pixels: np.ndarray, generator: torch.Generator, value: float) -> np.ndarray:
    """Brightens: 255 (v / 255)^(1 / gamma)."""
    return (255 * (np.arange(256) / 255) ** (1 / value)).round().astype(np.uint8)[pixels]


def saturate(pixels: np.ndarray, generator: torch.Generator, factor: float) -> np.ndarray:
    """Multiplies the colour, by Pillow; 1 changes nothing."""
    return np.array(ImageEnhance.Color(Image.fromarray(pixels)).enhance(factor))


def palette(pixels: np.ndarray, generator: torch.Generator, colours: int) -> np.ndarray:
    """Keeps some colours, by Pillow's median cut, dithered as Floyd and Steinberg do."""
    image = Image.fromarray(pixels)
    return np.array(image.quantize(colours, Image.Quantize.MEDIANCUT).convert("RGB"))


def through_vae(config: models.config.ModelConfig) -> Callable[..., np.ndarray]:
    """Makes the purifier that goes through the editor's VAE, at its working size. Raises UserError."""
    vae = config.load_vae()

    def vae_trip(pixels: np.ndarray, generator: torch.Generator) -> np.ndarray:
        images = vae.round_trip(to_tensor(pixels).to(config.device))
        return to_uint8(config.editor.from_working(images, pixels.shape[:2], vae.resolution))[0]

    return vae_trip


def denoised(config: models.config.ModelConfig) -> Callable[..., np.ndarray]:
    """Makes the purifier that adds noise and removes it, at the editor's working size. Raises UserError."""
    own = replace(config, vae_id=None)  # the editor's autoencoder, whatever --vae says
    own.check_denoiser("denoise")
    view, vae = own.load_denoiser(), own.load_vae()

    def there_and_back(pixels: np.ndarray, generator: torch.Generator, share: float) -> np.ndarray:
        import torch

        with torch.no_grad():
            latent = vae.encode(to_tensor(pixels).to(config.device)).latent_dist.mean.float()
            latent = view.again(latent, transforms.normal([generator], latent), share, DENOISING_STEPS)
            images = vae.decode(latent).sample.float()
        return to_uint8(config.editor.from_working(images, pixels.shape[:2], vae.resolution))[0]

    return there_and_back


def restored(config: models.config.ModelConfig) -> Callable[..., np.ndarray]:
    """Makes the purifier that asks the editor to restore, by its own steps and guidance. Raises UserError."""
    editor = config.load_editor()

    def restore(pixels: np.ndarray, generator: torch.Generator) -> np.ndarray:
        images = to_tensor(pixels).to(config.device)
        return to_uint8(editor(images, [RESTORE], generator.initial_seed()))[0]

    return restore


def odd(text: str) -> int:
    """argparse type: the side of a kernel, an odd number."""
    if not text.isdecimal() or int(text) % 2 == 0 or int(text) > 999:
        raise argparse.ArgumentTypeError(f"{text!r} is not an odd number from 1 to 999")
    return int(text)


def between(low: float, high: float) -> Callable[[str], Any]:
    """argparse type: a number within bounds."""
    return utils.number(float, low, high, f"a number from {low:g} to {high:g}")


def whole(low: int, high: int) -> Callable[[str], Any]:
    """argparse type: a whole number within bounds."""
    return utils.number(int, low, high, f"a whole number from {low} to {high}")


# How a step is written: its function, of (H, W, 3) uint8 and a seeded generator, and the types of its numbers
KINDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "jpeg:Q": (jpeg, whole(1, 95)),
    "blur:K:S": (blur, odd, between(0.1, 100)),
    "rotate:A": (rotate, between(0.01, 180)),
    "resize:F": (resize, between(0.001, 0.999)),
    "crop:F": (crop, between(0.001, 0.999)),
    "noise:S": (noise, between(0.01, 255)),
    "mirror": (mirror,),
    "shift:D": (shift, whole(1, 999)),
    "gamma:G": (gamma, between(0.1, 10)),
    "saturate:F": (saturate, between(0, 10)),
    "palette:N": (palette, whole(2, 256)),
    "vae": (through_vae,),
    "denoise:S": (denoised, between(0.01, 1)),
    "restore": (restored,),
}
OF_THE_EDITOR = ("vae", "denoise", "restore")  # these make their functions of a ModelConfig, once
FORMS = {form.partition(":")[0]: form for form in KINDS}

Step = tuple[str, tuple[float, ...]]  # name, numbers


def chain(text: str) -> list[Step]:
    """argparse type: `jpeg:75+resize:0.5` -> its steps."""
    steps = []
    for part in text.split("+"):
        name, *given = part.split(":")
        if name not in FORMS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FORMS)}")
        _, *types = KINDS[FORMS[name]]
        if len(given) != len(types):
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form {FORMS[name]}")
        try:
            steps.append((name, tuple(read(number) for read, number in zip(types, given, strict=True))))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{FORMS[name]}: {error}") from None
    return steps


def purify(
    pixels: np.ndarray,
    steps: Sequence[Step],
    seed: int,
    stem: str,
    made: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType({}),
) -> np.ndarray:
    """Applies all steps to (H, W, 3) uint8 -> the same size. Random ones depend on seed, stem and place.

    made: the functions of steps that need the editor.
    """
    import torch

    for place, (name, numbers) in enumerate(steps):
        generator = torch.Generator().manual_seed(utils.start_seed(seed, f"{place}:{stem}"))
        purifier = made.get(name) or KINDS[FORMS[name]][0]
        pixels = purifier(pixels, generator, *numbers)
    return pixels


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_dir", type=utils.path, required=True, help="images, or a row of edits")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where results go")
    parser.add_argument("--method", required=True, type=chain, help="one or several of the above")
    parser.add_argument("--seed", type=utils.known_seed, default=0, help="seeds angles and noise")
    runs.add_run_arguments(parser, batches=False)
    models.config.add_model_arguments(parser, "editor")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Purifies the directory that the flags name -> exit status."""
    with_editor = any(name in OF_THE_EDITOR for name, _ in args.method)
    if not with_editor and (args.model_id or args.vae or args.resolution):
        which = "', '".join(OF_THE_EDITOR)
        text = f"--model_id, --vae and --resolution are for '{which}', which are not among the steps"
        raise UserError(text)
    if args.vae and len(args.vae) > 1:
        raise UserError(f"--vae {' '.join(args.vae)}: a round trip goes through one autoencoder")
    config = models.config.resolve_vaes(models.config.ModelSettings.of(args))[0] if with_editor else None
    options = runs.Options.of(args)
    return purify_directory(args.input_dir, args.output_dir, args.method, args.seed, config, options)


def purify_directory(
    input_dir: Path,
    output_dir: Path,
    steps: Sequence[Step],
    seed: int = 0,
    config: models.config.ModelConfig | None = None,
    options: runs.Options = runs.USUAL,
) -> int:
    """Purifies the images or edits of one directory into another -> exit status.

    config: the editor's, for the steps that need it. Raises UserError.
    """
    if output_dir.resolve() == input_dir.resolve():
        raise UserError(f"{output_dir}: would overwrite the inputs")
    utils.check_directory(output_dir)
    inside = [] if images_by_stem(input_dir) else [path.name for path in folders(input_dir)]
    if seeds := [name for name in inside if re.fullmatch(r"seed\d+", name)]:
        status = 0
        for name in seeds:
            place = input_dir / name, output_dir / name
            status = max(status, purify_directory(*place, steps, seed, config, options))
            if status > 128:  # stopped by a signal
                break
        return status
    prompts = [name for name in inside if re.fullmatch(r"prompt\d+", name)]
    items = [
        runs.Item(path, output_dir / folder / f"{path.stem}.png", None, f"{folder}/{path.name}".strip("/"))
        for folder in prompts or [""]
        for path in runs.find_images(input_dir / folder)
    ]
    texts = (runs.read_record(input_dir) or {}).get("prompts", {}) if prompts else {}
    texts = {int(number): text for number, text in texts.items() if f"prompt{number}" in prompts}
    names = {name for name, _ in steps}
    method = "+".join(":".join([name, *(f"{number:g}" for number in numbers)]) for name, numbers in steps)
    settings = {"seed": seed, "method": method}
    makers = {name: KINDS[FORMS[name]][0] for name in OF_THE_EDITOR if name in names}
    if makers:
        settings |= {"dtype": config.dtype_name, "model_id": recorded(config.model_id)}
        if config.vae_id:
            settings["vae"] = recorded(config.vae_id)
        settings |= {"resolution": config.resolution}
    if "restore" in makers:
        settings |= config.edit_settings()

    @functools.cache
    def prepare() -> dict[str, Callable[..., np.ndarray]]:
        return {name: make(config) for name, make in makers.items()}

    def load(item: runs.Item) -> Portrait:
        return load_image(item.source)

    def work(batch: list[runs.Item], portraits: list[Portrait], _: list[bool]) -> runs.Facts:
        made = prepare()
        for item, portrait in zip(batch, portraits, strict=True):
            save_png(item.output, purify(portrait.pixels, steps, seed, item.source.stem, made))
        return [{}] * len(batch)

    return runs.Job(items, load, work, output_dir, settings, options, texts, prepare).run()


if __name__ == "__main__":
    sys.exit(main())
