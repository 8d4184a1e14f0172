"""FR: how much of the person is left in an edit, the cosine similarity of its face to the source's. Low is protected.

    python evaluation/eval_facial.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0
    python evaluation/eval_facial.py --by judge --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock edits/vae --seed 0

Writes facial_metric.csv, or facial_judge_metric.csv, into the working directory. facelock optimises the recogniser
itself, so FR by the recogniser overstates what it protects: report the judge's, which no attack sees, beside it.
Values compare only within one recogniser.
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
    """Images -> embedding of their largest face. Where an edit shows none, its source's box is used and counted."""

    def __init__(self, chosen: models.ModelSet, by: str, args: argparse.Namespace) -> None:
        device, dtype = models.place(args)
        self.device = device
        self.recognizer = models.load_recognizer(getattr(chosen, by), device, dtype)
        self.detector = models.FaceDetector(chosen.detect_faces, device)

    def box(self, pixels: np.ndarray) -> models.Box | None:
        """The largest face of an image (H, W, 3) uint8."""
        return next(iter(self.detector(pixels)), None)

    def embed(self, pixels: Sequence[np.ndarray], boxes: Sequence[models.Box]) -> Tensor:
        """Images (H, W, 3) uint8 of any sizes and a box each -> (B, D), unit length."""
        import torch

        with torch.no_grad():
            return torch.cat(
                [
                    self.recognizer.embed(utils.to_tensor(image).to(self.device), [[box]])
                    for image, box in zip(pixels, boxes, strict=True)
                ]
            )


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
        (clean,) = common.find_rows([args.clean_edit_dir], args.seed)[:1]
        rows = [common.Row("clean", clean.directory), *rows]
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
    references = sorted({pair.reference for found in pairs.values() for pair in found})
    sources = {path: utils.load_image(path).pixels for path in references}
    boxes = {path: embedder.box(pixels) for path, pixels in sources.items()}
    if faceless := [str(path) for path, box in boxes.items() if box is None]:
        raise UserError(f"no face found in the source: {', '.join(faceless)}")
    reference = {path: embedder.embed([sources[path]], [boxes[path]]) for path in references}  # (1, D) each
    results, undetected = {}, {}
    for row, found in pairs.items():
        results[row], undetected[row] = {}, 0
        for pair in found:
            edit, _ = common.load_pair(pair)
            box = embedder.box(edit)
            undetected[row] += box is None
            embedding = embedder.embed([edit], [box or boxes[pair.reference]])
            value = facial_similarity(embedding, reference[pair.reference]).item()
            results[row][pair.seed, pair.prompt, pair.name] = value
    return results, undetected


if __name__ == "__main__":
    sys.exit(main())
