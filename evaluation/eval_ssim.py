"""SSIM of the edits of protected images against the edits of the clean ones: low means that protection
changed their structure.

    python evaluation/eval_ssim.py --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes ssim_metric.csv into the working directory. Identical images have 1. A low similarity of two edits says
that they differ, not that the person is gone: see eval_facial.py for that.
"""

import sys

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.scoring import Metric, Tensor, script


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Measures structural similarity (Wang et al. 2004) of images in [-1, 1], (B, 3, H, W) -> (B,).

    By scikit-image on values in [0, 1], with the paper's window and population covariance; the mean leaves
    out the 5 px of border that the window doesn't fit into, as does torchmetrics 1.4.0 of the authors.
    """
    import torch
    from skimage.metrics import structural_similarity

    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    unit = [((batch.double() + 1) / 2).cpu().numpy() for batch in (references, images)]
    pairs = zip(*unit, strict=True)
    values = [structural_similarity(*pair, data_range=1, channel_axis=0, **wang) for pair in pairs]
    return torch.tensor(values, dtype=torch.float64)


METRIC = Metric("ssim", "SSIM ↓", ssim, needs=("edits", "clean"), smallest=11)  # px, the window's side
parse_args, main = script(METRIC, __doc__)

if __name__ == "__main__":
    sys.exit(main())
