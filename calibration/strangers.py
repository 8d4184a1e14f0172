"""Measures a recogniser on strangers: their mean cosine, and the cosine that 0.1 % of the pairs exceed.

    python mini/portraits.py --write people --first 150000 --count 300
    python calibration/strangers.py --models=mini --recognizer dlib assets/mini/judge --image_dir people
    python calibration/strangers.py --recognizer adaface.onnx --image_dir people

IMAGE_DIR holds one photo of each person, NAME.*, or several, NAME/*. Copy the printed numbers into the JSON
of an ONNX file or the preprocessor_config.json of a directory; dlib's are in models/recognizers.py. For fewer
than 10,000 pairs the threshold is that of a normal distribution with their mean and deviation, and the
printed line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from images import images_by_stem, load_image, to_tensor
from models.config import ModelSettings, add_model_arguments, resolve
from models.faces import FaceDetector
from models.recognizers import Recognizer
from utils import UserError, warn

FALSE_ACCEPTS = 0.001
SIGMAS = 3.0902  # of a normal distribution, beyond which that share lies
ENOUGH = 10_000  # pairs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    parser.add_argument("--image_dir", type=utils.path, required=True, help="NAME.* or NAME/*")
    add_model_arguments(parser, "recognizer", "judge", dtype="fp32")
    return utils.run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Prints a line of JSON for each recogniser -> exit status. Raises UserError."""
    config = resolve(ModelSettings.of(args))
    detector, people = FaceDetector(config.device), []
    photos = list(images_by_stem(args.image_dir).items())
    for folder in sorted(path for path in args.image_dir.iterdir() if path.is_dir()):
        photos += [(folder.name, path) for path in images_by_stem(folder).values()]
    for name, path in photos:
        pixels = load_image(path).pixels
        if faces := detector(pixels):
            people.append((name, to_tensor(pixels), faces[0]))
        else:
            warn(f"{path}: no face found")
    for recognizer in map(config.load_recognizer, config.recognizers):
        print(f"{recognizer.name}: {json.dumps(strangers(recognizer, people))}", flush=True)
    return 0


def strangers(recognizer: Recognizer, people: Sequence[tuple]) -> dict[str, float | int | bool]:
    """Compares all pictures of different people; (name, image (1, 3, H, W), face) each. Raises UserError."""
    import numpy as np
    import torch

    with torch.no_grad():
        embeddings = torch.cat([recognizer.embed(image, [[face]]) for _, image, face in people or [None]])
    names = np.array([name for name, *_ in people])
    cosines = (embeddings @ embeddings.T).cpu().numpy()
    pairs = cosines[np.triu(names[:, None] != names[None], 1)]
    if len(pairs) < 2:
        raise UserError("two people with a face are needed at least")
    is_normal = len(pairs) < ENOUGH
    threshold = pairs.mean() + SIGMAS * pairs.std() if is_normal else np.quantile(pairs, 1 - FALSE_ACCEPTS)
    found = {"strangers_mean": pairs.mean(), "verification_threshold": threshold, "deviation": pairs.std()}
    found = {name: round(float(value), 3) for name, value in found.items()}
    return {**found, "pairs": len(pairs), "as if normal": is_normal}


if __name__ == "__main__":
    sys.exit(main())
