"""CLIP-S, how well the edit follows the instruction: the cosine between the edit's direction in CLIP space
and the instruction.

    python evaluation/eval_clip_s.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes clip_s_metric.csv into the working directory. Low means that the instruction was not carried out, which
says nothing about the face: see eval_facial.py. The instructions are those that the edits' run.json records,
or the lines of --prompt_file. --models mini: the bundled stand-in, whose values compare with no others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import common

import models
import utils

if TYPE_CHECKING:
    from torch import Tensor


NO_DIRECTION = 1e-5  # of the source embedding's length: what rounding leaves of two equal images


def clip_s(edits: Tensor, sources: Tensor, texts: Tensor) -> Tensor:
    """cos(CLIP(edit) - CLIP(source), CLIP(instruction)) of embeddings (B, D) -> (B,).

    As Wang et al. 2025 define it: the embeddings are not normalised before the difference. 0 for an edit that
    is the source itself, whose direction would be the rounding's.
    """
    from torch.nn.functional import cosine_similarity

    directions = edits - sources
    none = directions.norm(dim=1) <= NO_DIRECTION * sources.norm(dim=1)
    return cosine_similarity(directions, texts, dim=1).masked_fill(none, 0.0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "clip_s", sources=True, clean=False)
    models.add_clip_argument(parser)
    common.add_model_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    return common.run_clip(args, "clip_s", clip_s, needs_texts=True)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
