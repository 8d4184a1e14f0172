"""LPIPS distance of the edits of protected images from the edits of the clean ones: high means that
protection changed them.

    python evaluation/eval_lpips.py --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes lpips_metric.csv into the working directory. 0 for identical images. facelock optimises this very
distance (to the source), and a distance of two edits says that they differ, not that the person is gone: see
eval_facial.py for that. --models mini: the bundled stand-in, whose values compare with no others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import common

import models
import utils

if TYPE_CHECKING:
    from torch import Tensor


SMALLEST = 32  # px; from here on each trunk's last layer has pixels left


def lpips_distance(network: Any, images: Tensor, references: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018) of images in [-1, 1], (B, 3, H, W) -> (B,), by an lpips.LPIPS `network`."""
    import torch

    like = next(network.net.parameters())
    with torch.no_grad():
        return network(images.to(like), references.to(like)).flatten().float().cpu()


def load(args: argparse.Namespace) -> common.AgainstClean:
    """The metric with the network that the flags name. Raises UserError."""
    device, dtype = models.set_up(args)
    return partial(lpips_distance, models.load_perceptual(models.choose(args).perceptual, device, dtype))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "lpips", sources=False, clean=True)
    models.add_perceptual_argument(parser)
    common.add_model_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    return common.run_against_clean(args, "lpips", lambda: load(args), smallest=SMALLEST)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
