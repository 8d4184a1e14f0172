"""What an attacker or a platform does to a picture before it is edited: compression, blur, resizing, noise...

    python evaluation/purify.py --input_dir protected/facelock/budget_0.03 \\
        --output_dir purified/jpeg75/facelock --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir purified/jpeg75/clean --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir out --method jpeg:75+resize:0.5

    jpeg:Q       JPEG of quality Q, 1 to 95
    blur:K:S     Gaussian, K x K pixels (odd, up to 999), sigma S px, 0.1 to 100
    rotate:A     by an angle within A degrees, 0.01 to 180; the corners become black
    resize:F     down to the share F of each side, 0.001 to 0.999, and back up
    crop:F       the middle F of each side, 0.001 to 0.999, brought back up
    noise:S      Gaussian noise, S levels of 255, 0.01 to 255
    vae          a round trip through the editor's VAE
    a+b+...      one after the other

Writes OUTPUT_DIR/NAME.png, the input's size, without alpha, and run.json and manifest.jsonl that record how.
Angle and noise come from --seed and the file's stem, so a source and its protected form get the same.
Compare the edits of a purified protection with edits of the equally purified source: purification changes an
edit, too. The paper's: jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import directories  # noqa: F401 (finds the project's modules)
import numpy as np
from PIL import Image

import models.config
import runs
import transforms
import utils
from images import Portrait, load_image, save_png, to_tensor, to_uint8
from models.loading import recorded
from models.vaes import load_vae
from utils import UserError

if TYPE_CHECKING:
    import torch

BICUBIC = Image.Resampling.BICUBIC


def jpeg(pixels: np.ndarray, generator: torch.Generator, quality: int) -> np.ndarray:
    """Compresses with a quality and Pillow's other settings."""
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


def through_vae(config: models.config.ModelConfig) -> Callable[..., np.ndarray]:
    """Makes the round trip through the editor's VAE, at its working size. Raises UserError."""
    vae = load_vae(config.editor, config.model_id, config.resolution, config.device, config.dtype)

    def vae_trip(pixels: np.ndarray, generator: torch.Generator) -> np.ndarray:
        import torch

        with torch.no_grad():
            latent = vae.encode(to_tensor(pixels).to(config.device)).latent_dist.mean
            images = vae.decode(latent).sample.float()
        return to_uint8(config.editor.from_working(images, pixels.shape[:2], vae.resolution))[0]

    return vae_trip


class Kind(NamedTuple):
    """A kind of step: what it does to (H, W, 3) uint8 with a seeded generator and its numbers."""

    purifier: Callable[..., np.ndarray] | None  # None: it takes a model
    form: str
    numbers: tuple[Callable[[str], Any], ...] = ()  # argparse types


def odd(text: str) -> int:
    """argparse type: the side of a kernel, which has a middle."""
    if not text.isdecimal() or int(text) % 2 == 0 or int(text) > 999:
        raise argparse.ArgumentTypeError(f"{text!r} is not an odd number from 1 to 999")
    return int(text)


def between(low: float, high: float) -> Callable[[str], Any]:
    """argparse type: a number within bounds."""
    return utils.number(float, low, high, f"a number from {low:g} to {high:g}")


KINDS = {
    "jpeg": Kind(jpeg, "jpeg:Q", (utils.number(int, 1, 95, "a whole number from 1 to 95"),)),
    "blur": Kind(blur, "blur:K:S", (odd, between(0.1, 100))),
    "rotate": Kind(rotate, "rotate:A", (between(0.01, 180),)),
    "resize": Kind(resize, "resize:F", (between(0.001, 0.999),)),
    "crop": Kind(crop, "crop:F", (between(0.001, 0.999),)),
    "noise": Kind(noise, "noise:S", (between(0.01, 255),)),
    "vae": Kind(None, "vae"),
}

Step = tuple[str, tuple[float, ...]]  # kind, numbers


def chain(text: str) -> list[Step]:
    """argparse type: `jpeg:75+resize:0.5` -> its steps."""
    steps = []
    for part in text.split("+"):
        name, *rest = part.split(":")
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(KINDS)}")
        kind = KINDS[name]
        if len(rest) != len(kind.numbers):
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form {kind.form}")
        try:
            steps.append((name, tuple(read(given) for read, given in zip(kind.numbers, rest, strict=True))))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{kind.form}: {error}") from None
    return steps


def purify(
    pixels: np.ndarray,
    steps: Sequence[Step],
    seed: int,
    stem: str,
    vae_trip: Callable[..., np.ndarray] | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same size, after all steps. Random ones depend on seed, stem and their place."""
    import torch

    for place, (name, numbers) in enumerate(steps):
        generator = torch.Generator().manual_seed(utils.start_seed(seed, f"{place}:{stem}"))
        pixels = (KINDS[name].purifier or vae_trip)(pixels, generator, *numbers)
    return pixels


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_dir", type=utils.path, required=True, help="directory of images")
    parser.add_argument("--output_dir", type=utils.path, required=True, help="where NAME.png goes")
    parser.add_argument("--method", required=True, type=chain, help="see above")
    parser.add_argument("--seed", type=utils.known_seed, default=0, help="of angles and noise")
    runs.add_run_arguments(parser, batches=False)
    models.config.add_editor_arguments(parser)
    models.config.add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Purifies the directory that the flags name -> exit status."""
    with_vae = ("vae", ()) in args.method
    if not with_vae and (args.model_id or args.resolution):
        raise UserError("--model_id and --resolution are for 'vae', which is not among the steps")
    config = models.config.resolve(models.config.ModelSettings.of(args)) if with_vae else None
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
    """Purifies the images of a directory into another -> exit status. config: for the VAE, if a step is it.

    Raises UserError.
    """
    images = runs.find_images(input_dir)
    if output_dir.resolve() == input_dir.resolve():
        raise UserError(f"{output_dir}: would overwrite the inputs")
    utils.check_directory(output_dir)
    with_vae = ("vae", ()) in steps
    method = "+".join(":".join([name, *(f"{number:g}" for number in numbers)]) for name, numbers in steps)
    settings = {"seed": seed, "method": method}
    if with_vae:
        settings |= {"dtype": config.dtype_name, "model_id": recorded(config.model_id)}
        settings |= {"resolution": config.resolution}

    def prepare() -> Callable[..., np.ndarray] | None:
        return through_vae(config) if with_vae else None

    def work(batch: list[runs.Item], portraits: list[Portrait], _: list[bool]) -> runs.Facts:
        vae_trip = prepare()
        for item, portrait in zip(batch, portraits, strict=True):
            save_png(item.output, purify(portrait.pixels, steps, seed, item.source.stem, vae_trip))
        return [{}] * len(batch)

    items = [runs.Item(path, output_dir / f"{path.stem}.png", None, path.name) for path in images]

    def load(item: runs.Item) -> Portrait:
        return load_image(item.source)

    return runs.Job(items, load, work, output_dir, settings, options, prepare=prepare).run()


if __name__ == "__main__":
    sys.exit(main())
