"""PSNR of the edits of protected images against the edits of the clean ones: low means that protection
changed them.

    python evaluation/eval_psnr.py --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes psnr_metric.csv into the working directory, in dB, over 8-bit pixels. A low PSNR between two edits
says that they differ, not that the person is gone: see eval_facial.py for that.
"""

import sys

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.scoring import Metric, Tensor, script


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Measures 10 log10(2^2 / MSE) of images in [-1, 1], (B, 3, H, W) -> (B,) in dB, by scikit-image.

    Infinite for identical images.
    """
    import numpy as np
    import torch
    from skimage.metrics import peak_signal_noise_ratio

    pairs = zip(references.double().cpu().numpy(), images.double().cpu().numpy(), strict=True)
    with np.errstate(divide="ignore"):
        values = [peak_signal_noise_ratio(reference, image, data_range=2) for reference, image in pairs]
    return torch.tensor(values, dtype=torch.float64)


METRIC = Metric("psnr", "PSNR ↓", psnr, needs=("edits", "clean"), digits=2, infinite=True)
parse_args, main = script(METRIC, __doc__)

if __name__ == "__main__":
    sys.exit(main())
