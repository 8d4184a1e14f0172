"""Finds the budget at which each method's protection is as visible as facelock's, and prints METHOD@BUDGET.

    python calibration/equal_visibility.py --models=mini --image_dir=portraits --budget=0.06
    python experiment.py --models=mini --image_dir=portraits --output_dir=equal --methods vae@0.0586 cw@0.31

Visibility is the LPIPS of a protected picture against its source, the mean over the portraits. It grows about
with the square of the budget, which gives the next guess. Budgets are whole levels of 255; the nearest one is
printed, and its LPIPS may be a tenth off. The guesses go to stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from defend import add_method_arguments, settings_of
from images import to_tensor
from methods import METHODS
from models.config import ATTACK, add_model_arguments
from models.editors import EDITORS
from models.perceptual import load_perceptual
from protection import Protector, Settings, methods_for
from runs import find_images
from utils import LEVEL

LIKE = "facelock"
GUESSES = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="directory of portraits")
    parser.add_argument("--budget", type=utils.budget_size, default=0.06, help=f"of {LIKE}")
    text = "which (default: all that suit --model)"
    parser.add_argument("--methods", nargs="+", choices=METHODS, help=text)
    parser.add_argument("--seed", type=utils.known_seed, default=0, help="of the random starts")
    add_method_arguments(parser)
    add_model_arguments(parser, *ATTACK)
    return utils.run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Prints one METHOD@BUDGET per method -> exit status. Raises UserError."""
    settings, paths = settings_of(args), find_images(args.image_dir)
    aim = visibility(paths, settings, LIKE, args.budget)
    for method in args.methods or methods_for(EDITORS[args.model]):
        tried: dict[int, float] = {}  # levels of 255 -> LPIPS over the aim
        levels = utils.allowed_levels(args.budget)
        while levels not in tried and len(tried) < GUESSES:
            found = visibility(paths, settings, method, levels * LEVEL) or 1e-6  # 0: unchanged
            print(f"{method}: LPIPS {found:.4f} of {aim:.4f} at {levels}/255", file=sys.stderr, flush=True)
            tried[levels] = found / aim
            levels = min(255, max(1, round(levels * tried[levels] ** -0.5)))
        nearest = min(tried, key=lambda levels: abs(math.log(tried[levels])))
        print(f"{method}@{math.ceil(nearest * LEVEL * 1e4) / 1e4}", flush=True)  # not a level less
    return 0


def visibility(paths: Sequence[Path], settings: Settings, method: str, budget: float) -> float:
    """Protects portraits as defend.py does -> the mean LPIPS of what it would save. Raises UserError."""
    import torch

    protector = Protector(settings, method=method, budget=budget)
    config, found = protector.config, []
    lpips = load_perceptual(config.perceptual, config.device, torch.float32)
    for path in paths:
        subject = protector.load(path)
        pair = protector.pixels([subject]), subject.portrait.pixels
        with torch.no_grad():
            found.append(float(lpips(*(to_tensor(pixels).to(config.device) for pixels in pair))))
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
