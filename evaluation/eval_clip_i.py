"""CLIP-I, how much the edit shows what the source shows: the cosine of their CLIP embeddings.

    python evaluation/eval_clip_i.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes clip_i_metric.csv into the working directory. Low means that the edit shows something else, which need
not be another person: see eval_facial.py. Values of the bundled stand-in (--models mini) can't be compared
with others.
"""

import sys

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.scoring import Metric, Tensor, script


def clip_i(edits: Tensor, sources: Tensor) -> Tensor:
    """Measures cos(CLIP(edit), CLIP(source)) of embeddings (B, D) -> (B,)."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(edits, sources, dim=1)


METRIC = Metric("clip_i", "CLIP-I ↓", clip_i, needs=("clip_edits", "clip_sources"))
parse_args, main = script(METRIC, __doc__)

if __name__ == "__main__":
    sys.exit(main())
