"""Finds the budget at which each method's protection is as visible as facelock's, and prints METHOD@BUDGET.

    python benchmarks/equal_visibility.py --models=mini --image_dir=portraits --budget=0.06
    python experiment.py --models=mini --image_dir=portraits --output_dir=equal --methods vae@0.0586 cw@0.31

Visible is what LPIPS says of the protected picture against its source, the mean over the portraits. It goes
about as the budget's square, from which the first guess comes; each further one is interpolated. Ends where
LPIPS is within 3 % or after 4 guesses; the words of the last are on stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from defend import add_defense_arguments
from images import to_tensor, to_uint8_within
from methods import METHODS
from models.perceptual import load_perceptual
from protection import Protector, Subject
from runs import find_images

LIKE = "facelock"
GUESSES, CLOSE = 4, 0.03


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="directory of portraits")
    parser.add_argument("--budget", type=utils.budget_size, default=0.06, help=f"of {LIKE}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all")
    add_defense_arguments(parser)
    return utils.run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Prints the words, one a method -> exit status. Raises UserError."""
    aim = visibility(args, LIKE, args.budget)
    for method in args.methods:
        budget, found = args.budget, aim
        points: list[tuple[float, float]] = []  # log budget, log LPIPS over the aim
        for _ in range(GUESSES if method != LIKE else 0):
            found = visibility(args, method, budget)
            if abs(found / aim - 1) < CLOSE:
                break
            points.append((math.log(budget), math.log(found / aim)))
            (x1, y1), (x0, y0) = points[-1], points[-2] if len(points) > 1 else (0.0, 0.0)
            slope = (y1 - y0) / (x1 - x0) if len(points) > 1 else 2
            budget = min(2.0, math.exp(x1 - y1 / (slope if slope > 0.5 else 2)))
        print(f"{method}: LPIPS {found:.4f} of {aim:.4f} at {budget:.4f}", file=sys.stderr, flush=True)
        print(f"{method}@{budget:.4f}", flush=True)
    return 0


def visibility(args: argparse.Namespace, method: str, budget: float) -> float:
    """Protects all portraits as defend.py does -> the mean LPIPS of what it would save."""
    import torch

    flags = vars(args) | {"defend_method": method, "attack_budget": budget}
    protector = Protector(argparse.Namespace(**flags))
    chosen = protector.chosen
    lpips, found = load_perceptual(chosen.perceptual, chosen.device, torch.float32), []
    for path in find_images(args.image_dir):
        subject: Subject = protector.load(path)
        source = subject.portrait.pixels[None]
        images, boxes = to_tensor(source).to(chosen.device), [subject.boxes]
        protected = protector.protect(images, boxes, [utils.start_seed(args.seed, path.stem)])
        mask = protector.budget_mask(images, boxes)
        pixels = to_uint8_within(protected, source, budget, mask)
        with torch.no_grad():
            found.append(float(lpips(to_tensor(pixels).to(images), images)))
    return sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
