"""CLIP-I, how much the edit shows what the source shows: the cosine of their CLIP embeddings.

    python evaluation/eval_clip_i.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes clip_i_metric.csv into the working directory. Low means that the edit shows something else, which need
not be another person: see eval_facial.py. --models mini: the bundled stand-in, whose values compare with no
others.
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


def clip_i(edits: Tensor, sources: Tensor) -> Tensor:
    """cos(CLIP(edit), CLIP(source)) of embeddings (B, D) -> (B,)"""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(edits, sources, dim=1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "clip_i", sources=True, clean=False)
    models.add_clip_argument(parser)
    common.add_model_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    return common.run_clip(args, "clip_i", lambda edit, source, _: clip_i(edit, source), needs_texts=False)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
