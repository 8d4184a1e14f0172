"""What an attacker or a platform does to a picture before it is edited: compression, blur, resizing, noise...

    python evaluation/purify.py --input_dir protected/facelock/budget_0.03 \\
        --output_dir purified/jpeg75/facelock --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir purified/jpeg75/clean --method jpeg:75
    python evaluation/purify.py --input_dir portraits --output_dir out --method jpeg:75+resize:0.5

    jpeg:Q       JPEG of quality Q, 1 to 95
    blur:K:S     Gaussian, K x K pixels (odd), sigma S px
    rotate:A     by an angle within A degrees; the corners become black
    resize:F     down to the share F of each side and back up
    crop:F       the middle F of each side, brought back up
    noise:S      Gaussian noise, S levels of 255
    vae          a round trip through the editor's VAE
    a+b+...      one after the other

Writes OUTPUT_DIR/NAME.png, the input's size, without alpha. Angle and noise come from --seed and the file's
stem, so a source and its protected form get the same. Compare the edits of a purified protection with edits
of the equally purified source: purification changes an edit, too.
The paper's: jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import common  # noqa: F401 (finds the project's modules)

import models
import runs
import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

# (H, W, 3) uint8, the step's numbers, a seeded CPU generator -> (H, W, 3) uint8
Purifier = Callable[["np.ndarray", Sequence[float], "torch.Generator"], "np.ndarray"]


def jpeg(pixels: np.ndarray, numbers: Sequence[float], _: torch.Generator) -> np.ndarray:
    """JPEG of a quality, Pillow's other settings."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=int(numbers[0]))
    return np.array(Image.open(buffer))


def blur(pixels: np.ndarray, numbers: Sequence[float], _: torch.Generator) -> np.ndarray:
    """Gaussian blur of a kernel size and a sigma in px, reflecting at the borders, by torchvision."""
    from torchvision.transforms.functional import gaussian_blur

    side, sigma = int(numbers[0]), numbers[1]
    if side // 2 >= min(pixels.shape[:2]):
        raise UserError(f"blur:{side}: the image's side is only {min(pixels.shape[:2])} px")
    return utils.to_uint8(gaussian_blur(utils.to_tensor(pixels), [side, side], [sigma, sigma]))[0]


def rotate(pixels: np.ndarray, numbers: Sequence[float], generator: torch.Generator) -> np.ndarray:
    """Rotation by an angle drawn from [-A, A] degrees, bicubic, by Pillow."""
    import numpy as np
    import torch
    from PIL import Image

    angle = numbers[0] * (2 * torch.rand((), generator=generator).item() - 1)
    return np.array(Image.fromarray(pixels).rotate(angle, Image.Resampling.BICUBIC))


def resize(pixels: np.ndarray, numbers: Sequence[float], _: torch.Generator) -> np.ndarray:
    """Down to a share of each side and back up, bicubic, by Pillow."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    small = max(1, round(width * numbers[0])), max(1, round(height * numbers[0]))
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BICUBIC)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def crop(pixels: np.ndarray, numbers: Sequence[float], _: torch.Generator) -> np.ndarray:
    """The middle share of each side, brought back up to the whole size, bicubic, by Pillow."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    x, y = round(width * (1 - numbers[0]) / 2), round(height * (1 - numbers[0]) / 2)
    image = Image.fromarray(pixels).crop((x, y, max(x + 1, width - x), max(y + 1, height - y)))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def noise(pixels: np.ndarray, numbers: Sequence[float], generator: torch.Generator) -> np.ndarray:
    """Gaussian noise of a standard deviation in 8-bit levels, the same for source and protected."""
    import torch

    images = utils.to_tensor(pixels)
    drawn = torch.randn(images.shape, generator=generator)
    return utils.to_uint8(images + drawn * numbers[0] * utils.LEVEL)[0]


def through_vae(vae: models.WorkingVAE, device: torch.device) -> Purifier:
    """A round trip through the editor's VAE, at its working size."""

    def vae_purifier(pixels: np.ndarray, _: Sequence[float], __: torch.Generator) -> np.ndarray:
        import torch

        with torch.no_grad():
            latent = vae.encode(utils.to_tensor(pixels).to(device)).latent_dist.mean
            images = vae.decode(latent).sample.float()
        return utils.to_uint8(utils.from_working(images, pixels.shape[:2], vae.resolution))[0]

    return vae_purifier


@dataclass(frozen=True)
class Kind:
    """One kind of step: its numbers, what they may be, and what it does."""

    numbers: int
    allowed: Callable[[Sequence[float]], bool]
    purifier: Purifier | None  # None: needs a model
    form: str


KINDS = {
    "jpeg": Kind(1, lambda n: 1 <= n[0] <= 95 and n[0] % 1 == 0, jpeg, "jpeg:Q, Q from 1 to 95"),
    "blur": Kind(
        2, lambda n: n[0] >= 1 and n[0] % 2 == 1 and n[1] > 0, blur, "blur:K:S, K odd, S > 0"
    ),
    "rotate": Kind(1, lambda n: 0 < n[0] <= 180, rotate, "rotate:A, A up to 180 degrees"),
    "resize": Kind(1, lambda n: 0 < n[0] < 1, resize, "resize:F, F between 0 and 1"),
    "crop": Kind(1, lambda n: 0 < n[0] < 1, crop, "crop:F, F between 0 and 1"),
    "noise": Kind(1, lambda n: 0 < n[0] <= 255, noise, "noise:S, S up to 255 levels"),
    "vae": Kind(0, lambda n: True, None, "vae"),
}

Step = tuple[str, tuple[float, ...]]  # kind, numbers


def chain(text: str) -> list[Step]:
    """argparse type: `jpeg:75+resize:0.5` -> its steps."""
    steps = []
    for part in text.split("+"):
        name, *rest = part.split(":")
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(KINDS)}")
        try:
            numbers = tuple(float(number) for number in rest)
        except ValueError:
            numbers = ()
        kind = KINDS[name]
        if len(numbers) != kind.numbers or len(rest) != kind.numbers or not kind.allowed(numbers):
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form {kind.form}")
        steps.append((name, numbers))
    return steps


def purify(
    pixels: np.ndarray, steps: Sequence[Step], purifiers: dict[str, Purifier], seed: int, stem: str
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same size, after all steps. Random ones depend on seed, stem and their place."""
    import torch

    for place, (name, numbers) in enumerate(steps):
        generator = torch.Generator().manual_seed(utils.start_seed(seed, f"{place}:{stem}"))
        pixels = purifiers[name](pixels, numbers, generator)
    return pixels


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="directory of images")
    parser.add_argument("--output_dir", type=Path, required=True, help="where NAME.png goes")
    parser.add_argument("--method", required=True, type=chain, help="see above")
    parser.add_argument("--seed", type=utils.known_seed, default=0, help="of angles and noise")
    parser.add_argument("--overwrite", action="store_true", help="make finished files again")
    models.add_editor_arguments(parser)
    models.add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    images = runs.find_images(args.input_dir)
    if args.output_dir.resolve() == args.input_dir.resolve():
        raise UserError(f"{args.output_dir}: would overwrite the inputs")
    utils.check_directory(args.output_dir)
    arguments = {
        "input_dir": str(args.input_dir.resolve()),
        "method": "+".join(":".join([name, *(f"{n:g}" for n in numbers)]) for name, numbers in args.method),
    }
    purifiers = {name: kind.purifier for name, kind in KINDS.items() if kind.purifier}
    if any(name == "vae" for name, _ in args.method):
        chosen = models.choose(args)
        device, dtype = models.set_up(args)
        purifiers["vae"] = through_vae(models.load_vae(chosen, args.model, device, dtype), device)
        arguments |= {
            "dtype": str(dtype).removeprefix("torch."),
            "model_id": models.shown(chosen.editors[args.model]),
            "resolution": chosen.resolution,
        }
    elif args.model_id or args.resolution:
        raise UserError("--model_id and --resolution are for 'vae', which is not among the steps")
    record = {"seed": args.seed, "arguments": arguments, "versions": runs.versions()}
    team = runs.Team()

    items = [
        runs.Item(path, args.output_dir / f"{path.stem}.png", None, label=path.name) for path in images
    ]

    def work(batch: list[runs.Item], loaded: list[utils.Portrait], _: list[bool]) -> None:
        for item, portrait in zip(batch, loaded, strict=True):
            pixels = purify(portrait.pixels, args.method, purifiers, args.seed, item.source.stem)
            utils.save_png(item.output, pixels)

    with runs.writing(args.output_dir, record, team):
        summary = runs.run_batches(
            runs.batches(items, 1),
            lambda item: utils.load_image(item.source),
            work,
            overwrite=args.overwrite,
            debug=args.debug,
            unit="image",
        )
    return runs.finish(summary, team, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
