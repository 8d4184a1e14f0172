"""LPIPS distance of the edits of protected images from the edits of the clean ones: high means that
protection changed them.

    python evaluation/eval_lpips.py --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes lpips_metric.csv into the working directory. Identical images have 0. facelock itself optimises LPIPS
(to the source). A large distance between two edits says that they differ, not that the person is gone: see
eval_facial.py. Values of the bundled stand-in (--models mini) can't be compared with others.
"""

import sys
from typing import Any

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.scoring import Metric, Tensor, script


def lpips_distance(network: Any, images: Tensor, references: Tensor) -> Tensor:
    """Measures LPIPS (Zhang et al. 2018) of images in [-1, 1], (B, 3, H, W) -> (B,), by an lpips.LPIPS."""
    import torch

    like = next(network.net.parameters())
    with torch.no_grad():
        return network(images.to(like), references.to(like)).flatten().float().cpu()


# From 32 px on, each trunk's last layer has pixels left
METRIC = Metric("lpips", "LPIPS ↑", lpips_distance, needs=("perceptual", "edits", "clean"), smallest=32)
parse_args, main = script(METRIC, __doc__)

if __name__ == "__main__":
    sys.exit(main())
