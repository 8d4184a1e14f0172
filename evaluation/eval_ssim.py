"""SSIM of the edits of protected images against the edits of the clean ones: low means that protection
changed their structure.

    python evaluation/eval_ssim.py --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes ssim_metric.csv into the working directory. 1 for identical images. A low similarity of two edits says
that they differ, not that the person is gone: see eval_facial.py for that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import common

import utils

if TYPE_CHECKING:
    from torch import Tensor

SIGMA = 1.5  # px, of the Gaussian window (Wang et al. 2004)
WINDOW = 11  # px, that window's side: scikit-image cuts it off at 3.5 sigma


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images in [-1, 1], (B, 3, H, W) -> (B,).

    By scikit-image, with the paper's Gaussian window and population covariance, on values in [0, 1] (it is
    not the same on [-1, 1]); the mean over channels and all pixels, the border reflected, as torchmetrics has
    it.
    """
    import numpy as np
    import torch
    from skimage.metrics import structural_similarity

    # scikit-image leaves a border out of the mean
    border = [(0, 0), (0, 0), (WINDOW // 2,) * 2, (WINDOW // 2,) * 2]
    unit = [
        np.pad(((batch.double() + 1) / 2).cpu().numpy(), border, mode="reflect")
        for batch in (references, images)
    ]
    values = [
        structural_similarity(
            reference,
            image,
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
        )
        for reference, image in zip(*unit, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "ssim", sources=False, clean=True)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    return common.run_against_clean(args, "ssim", lambda: ssim, smallest=WINDOW)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
