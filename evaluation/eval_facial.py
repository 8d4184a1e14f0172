"""FR: how much of the person is left in an edit, the cosine similarity of its face to the source's.
Low is protected.

    python evaluation/eval_facial.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0
    python evaluation/eval_facial.py --by judge --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes facial_metric.csv, or facial_judge_metric.csv, into the working directory. facelock optimises the
recogniser itself, so FR by the recogniser overstates what it protects: report the judge's, which no attack
sees, beside it. Values compare only within one recogniser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import common

import models
import utils
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def facial_similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Cosine similarity of face embeddings, (B, D) and (B, D) -> (B,)"""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(embeddings, references, dim=1)


class FaceEmbedder:
    """Images -> embedding of their largest face.

    Where an edit shows none, its source's box is used and counted.
    """

    def __init__(self, chosen: models.ModelSet, by: str, args: argparse.Namespace) -> None:
        device, dtype = models.set_up(args)
        self.device = device
        self.recognizer = models.load_recognizer(getattr(chosen, by), device, dtype)
        self.detector = models.FaceDetector(chosen.detect_faces, device)

    def box(self, pixels: np.ndarray) -> models.Box | None:
        """The largest face of an image (H, W, 3) uint8."""
        return next(iter(self.detector(pixels)), None)

    def embed(self, pixels: np.ndarray, box: models.Box) -> Tensor:
        """The face in the box of an image (H, W, 3) uint8 -> (1, D), unit length."""
        import torch

        with torch.no_grad():
            return self.recognizer.embed(utils.to_tensor(pixels).to(self.device), [[box]])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--src_dir", type=Path, required=True, help="the source images")
    parser.add_argument("--clean_edit_dir", type=Path, help="edits of the clean images: the row 'clean'")
    parser.add_argument(
        "--by", choices=("recognizer", "judge"), default="recognizer", help="whose embeddings are compared"
    )
    common.add_arguments(parser, "facial")
    models.add_face_arguments(parser)
    models.add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    rows = common.find_rows(args.defend_edit_dirs, args.seed)
    if args.clean_edit_dir:
        rows = [common.clean_row(args.clean_edit_dir, args.seed), *rows]
    prompts = common.prompts_of(rows, args.seed, args.prompts)
    pairs = common.find_pairs(rows, args.src_dir, args.seed, prompts, args.common)
    embedder = FaceEmbedder(models.choose(args), args.by, args)
    results, undetected = score(pairs, embedder)
    name = "facial" if args.by == "recognizer" else "facial_judge"
    common.report(results, name, args)
    for row, count in undetected.items():
        if count:
            print(f"{row.method}: no face was found in {count} of {len(pairs[row])} edits")
    return 0


def score(
    pairs: dict[common.Row, list[common.Pair]], embedder: FaceEmbedder
) -> tuple[dict[common.Row, common.Values], dict[common.Row, int]]:
    """FR of every pair, and how many edits of each row show no face. Sources are embedded once.

    Raises UserError naming the sources in which no face is found.
    """
    boxes, sources, faceless = {}, {}, []
    for path in sorted({pair.reference for found in pairs.values() for pair in found}):
        pixels = utils.load_image(path).pixels
        boxes[path] = embedder.box(pixels)
        if boxes[path] is None:
            faceless.append(str(path))
        else:
            sources[path] = embedder.embed(pixels, boxes[path])  # (1, D)
    if faceless:
        raise UserError(f"no face found in the source: {', '.join(faceless)}")
    results, undetected = {}, {}
    for row, found in pairs.items():
        results[row], undetected[row] = {}, 0
        for pair in found:
            pixels = common.load_edit(pair)
            box = embedder.box(pixels)
            undetected[row] += box is None
            embedding = embedder.embed(pixels, box or boxes[pair.reference])
            value = facial_similarity(embedding, sources[pair.reference]).item()
            results[row][pair.seed, pair.prompt, pair.name] = value
    return results, undetected


if __name__ == "__main__":
    sys.exit(main())
