"""FR, how much of the person is left: cosine similarity of the face in an edit to the face in its source.

    python evaluation/eval_facial.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0
    python evaluation/eval_facial.py --by judge --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0

Writes facial_metric.csv, or facial_judge_metric.csv, into the working directory. facelock optimises the
recogniser itself, so FR by the recogniser overstates what it protects: report the judge's, which no attack
sees, beside it. Values compare only within one recogniser.
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
    import numpy as np
    import torch
    from torch import Tensor

METRICS = {"recognizer": "facial", "judge": "facial_judge"}  # by whom -> its name


def facial_similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Cosine similarity of face embeddings, (B, D) and (B, D) -> (B,)"""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(embeddings, references, dim=1)


class FaceScorer:
    """FR of an edit's largest face by one recogniser or both; the faces are looked for once.

    Where an edit shows none, its source's box is used, and `no_face` is 1 instead of 0. A source without a
    face is noted in `faceless`, and its edits are not measured.
    """

    def __init__(
        self, recognizers: dict[str, models.Recognizer], detector: models.FaceDetector, device: torch.device
    ) -> None:
        self.recognizers = recognizers  # by the metric's name
        self.detector = detector
        self.device = device
        self.boxes: dict[tuple[str, tuple[int, int]], models.Box | None] = {}
        self.sources: dict[tuple[str, str, tuple[int, int]], Tensor] = {}
        self.faceless: set[str] = set()

    @property
    def problems(self) -> list[str]:
        """Which sources show no face."""
        names = ", ".join(sorted(self.faceless))
        return [f"no face found in the source, FR not measured: {names}"] if names else []

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        size = pixels.shape[:2]
        box = self.boxes[name, size] = next(iter(self.detector(pixels)), None)
        if box is None:
            self.faceless.add(name)
            return
        for metric, embedding in self._embed(pixels[None], [box]).items():
            self.sources[metric, name, size] = embedding[0]

    def __call__(self, images: np.ndarray, keys: Sequence[common.Key]) -> dict[str, Tensor]:
        import torch

        size = images.shape[1:3]
        of_sources = [self.boxes[key.name, size] for key in keys]
        found = [next(iter(self.detector(image)), None) for image in images]
        whole = (0, 0, size[1], size[0])  # stands in where there is no value to be had
        boxes = [box or source or whole for box, source in zip(found, of_sources, strict=True)]
        measured = torch.tensor([source is not None for source in of_sources])
        values = {"no_face": torch.tensor([float(box is None) for box in found])}
        for metric, embeddings in self._embed(images, boxes).items():
            references = [
                self.sources.get((metric, key.name, size), torch.zeros_like(embeddings[0])) for key in keys
            ]
            values[metric] = facial_similarity(embeddings, torch.stack(references))
        return {name: torch.where(measured, column, torch.nan) for name, column in values.items()}

    def _embed(self, images: np.ndarray, boxes: Sequence[models.Box]) -> dict[str, Tensor]:
        """One face of each image, (B, H, W, 3) uint8 -> (B, D), of unit length, by each recogniser."""
        import torch

        tensor = utils.to_tensor(images).to(self.device)
        with torch.no_grad():
            return {
                metric: recognizer.embed(tensor, [[box] for box in boxes]).cpu()
                for metric, recognizer in self.recognizers.items()
            }

    def report(self, results: common.Results) -> int:
        """Tells how many edits show no face, and which sources don't -> the exit status: 1 for the latter."""
        for row, values in results.values["no_face"].items():
            if count := int(sum(values.values())):
                print(f"{row.method}: no face was found in {count} of {len(values)} edits")
        for problem in self.problems:
            print(utils.one_line(problem), file=sys.stderr)
        return 1 if self.faceless else 0


def load(args: argparse.Namespace, by: Sequence[str]) -> FaceScorer:
    """The recognisers (of METRICS) that the flags name, with the detector. Raises UserError."""
    chosen = models.choose(args)
    device, dtype = models.set_up(args)
    recognizers = {METRICS[name]: models.load_recognizer(getattr(chosen, name), device, dtype) for name in by}
    return FaceScorer(recognizers, models.FaceDetector(chosen.detect_faces, device), device)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "facial", sources=True, clean=False)
    parser.add_argument(
        "--by", choices=tuple(METRICS), default="recognizer", help="whose embeddings are compared"
    )
    models.add_face_arguments(parser)
    common.add_model_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    common.check_outputs(args.output, args.per_image)
    edits = common.find_edits(args, clean_is_row=True)
    faces = load(args, [args.by])
    results = common.score(edits, {}, [faces], args.batch_size)
    common.report(results, METRICS[args.by], args, edits.baseline)
    return max(faces.report(results), results.exit_status())


if __name__ == "__main__":
    sys.exit(main())
