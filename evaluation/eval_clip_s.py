"""CLIP-S, how well the edit follows the instruction: the cosine between the edit's direction in CLIP space
and the instruction.

    python evaluation/eval_clip_s.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes clip_s_metric.csv into the working directory. Low means that the instruction was not carried out, which
says nothing about the face: see eval_facial.py. The instructions are those that the edits' run.json records,
or the lines of --prompt_file. Values of the bundled stand-in (--models mini) can't be compared with others.
"""

import sys

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.scoring import Metric, Tensor, script

NO_DIRECTION = 1e-5  # of the source embedding's length: what rounding leaves of two equal images


def clip_s(edits: Tensor, sources: Tensor, texts: Tensor) -> Tensor:
    """Measures cos(CLIP(edit) - CLIP(source), CLIP(instruction)) of embeddings (B, D) -> (B,).

    As Wang et al. 2025 define it: the embeddings are not normalised before the difference. 0 for an edit that
    is the source itself, whose direction would be the rounding's.
    """
    from torch.nn.functional import cosine_similarity

    directions = edits - sources
    none = directions.norm(dim=1) <= NO_DIRECTION * sources.norm(dim=1)
    return cosine_similarity(directions, texts, dim=1).masked_fill(none, 0.0)


METRIC = Metric("clip_s", "CLIP-S ↓", clip_s, needs=("clip_edits", "clip_sources", "clip_texts"))
parse_args, main = script(METRIC, __doc__)

if __name__ == "__main__":
    sys.exit(main())
