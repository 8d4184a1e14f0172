"""Trains the mini world's face recogniser or, with --judge, the judge, which no attack sees.

    python mini/train_recognizer.py                # -> assets/mini/recognizer, a transformers ResNetModel
    python mini/train_recognizer.py --judge        # -> assets/mini/judge, a transformers ConvNextModel
    python mini/train_recognizer.py --export_only  # exports and evaluates the last checkpoint again

The commands that made the bundled files are in assets/mini/README.md.

The embedding of a 64x64 crop in [-1, 1] is the model's `pooler_output`, flattened and L2-normalised.
The loss is CosFace (Wang et al. 2018, arXiv 1801.09414), on MTCNN's crops (crops.py): identity is what stays
the same under other clothes, expressions, light and the 25 edits. Judge and recogniser share no identity,
seed or architecture. The verification threshold, the cosine that 0.1 % of pairs of strangers exceed, is
written beside the weights. A stopped run resumes; checkpoints and the log are in mini/checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crops
import numpy as np
import portraits
import torch
import torch.nn.functional as F
import world
from PIL import Image
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
)

from evaluation.purify import chain, purify
from images import to_tensor
from models.recognizers import Recognizer, load_recognizer
from utils import edit_prompts, pick_device, positive_int

SIZE = 64  # px, the side of what the recognisers see
MARGIN, SCALE = 0.3, 24.0  # CosFace: cosine margin, and the factor from cosines to logits
STEPS, JUDGE_STEPS = 6_000, 16_000  # from scratch; a quarter or less with --start_from
JUDGE_SEED = 1_000  # added to --seed for the judge

VALIDATION_COUNT = 200  # identities
PLAIN, EDITED = 4, 5  # pictures per identity in the evaluation
ALTERED_COUNT = 60  # identities whose edits are also altered
FALSE_ACCEPTS = 0.001  # share of pairs of strangers above the verification threshold
SCALE_UP = 1.05
ALTERED = {  # by purify.py
    "shifted": "shift:4", "mirrored": "mirror", "gamma": "gamma:1.5", "saturated": "saturate:2",
    "blurred": "blur:13:2",
}  # fmt: skip


class CosFace(nn.Module):
    """Adds one learned direction per training identity; only the backbone is kept after training."""

    def __init__(self, backbone: PreTrainedModel, identities: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.centres = nn.Parameter(torch.randn(identities, backbone.config.hidden_sizes[-1]))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss and the share of pictures whose own identity is nearest."""
        features = self.backbone(pixel_values=images).pooler_output.flatten(1)  # (B, D)
        with torch.autocast(images.device.type, enabled=False):  # cosines in float32: the margin is small
            cosines = F.normalize(features.float()) @ F.normalize(self.centres).T  # (B, identities)
        margin = MARGIN * F.one_hot(labels, len(self.centres))
        accuracy = (cosines.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(SCALE * (cosines - margin), labels), accuracy


def build(judge: bool) -> PreTrainedModel:
    """Makes the untrained backbone."""
    if judge:
        return ConvNextModel(
            ConvNextConfig(
                image_size=SIZE, patch_size=4, hidden_sizes=[48, 96, 160, 256], depths=[2, 2, 2, 1],
                layer_scale_init_value=0.1,  # the default, 1e-6, is for much deeper networks
            )
        )  # fmt: skip
    network = ResNetModel(
        ResNetConfig(
            layer_type="basic", embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1],
            hidden_act="prelu",  # after ReLU all embeddings share one orthant, and no cosine is negative
        )
    )  # fmt: skip
    return network.to(memory_format=torch.channels_last)  # a quarter faster on CPUs


@torch.no_grad()
def take_over(model: CosFace, directory: Path, pictures: np.ndarray, found: np.ndarray) -> None:
    """Starts from a finished model; each identity's direction is the mean of the model's embeddings.

    pictures: equally many per identity, grouped by identity; found: their faces' boxes.
    """
    finished = load_recognizer(str(directory), torch.device("cpu"), torch.float32)
    model.backbone.load_state_dict(finished.network.state_dict())
    embeddings = embed(finished, pictures, found)
    model.centres.copy_(embeddings.view(len(model.centres), -1, embeddings.shape[1]).mean(1))


def training_requests(identities: range, images: int, seed: int) -> list[world.Request]:
    """Lists `images` variations of each identity; two out of three get a random edit."""
    draw = random.Random(seed)
    prompts = list(edit_prompts)
    return [(i, v, draw.choice(prompts) if v % 3 else None) for i in identities for v in range(images)]


@torch.no_grad()
def embed(recognizer: Recognizer, pictures: np.ndarray, found: np.ndarray) -> torch.Tensor:
    """Embeds the faces of portraits as the project's scripts do -> (N, D) float32, L2-normalised.

    found: boxes (N, 4), zeros where there is no face; then the whole picture is used.
    """
    boxes, parts = crops.boxes_of(found), []
    for row in range(0, len(pictures), 250):
        images = to_tensor(pictures[row : row + 250])  # (B, 3, 128, 128)
        parts.append(recognizer.embed(images, boxes[row : row + 250]))
    return torch.cat(parts)


def scaled(image: Image.Image, _: int = 0) -> Image.Image:
    """Enlarges by SCALE_UP about the centre and crops to the original size."""
    side = image.width
    edge = (side - side / SCALE_UP) / 2
    return image.resize((side, side), Image.Resampling.BICUBIC, (edge, edge, side - edge, side - edge))


def equal_error_rate(same: torch.Tensor, different: torch.Tensor) -> tuple[float, float]:
    """Computes the equal error rate from cosines of same and different identities -> (EER, threshold)."""
    thresholds = torch.cat([same, different]).sort().values
    rejected = torch.searchsorted(same.sort().values, thresholds) / len(same)  # genuine pairs below it
    accepted = 1 - torch.searchsorted(different.sort().values, thresholds) / len(different)  # impostors
    best = int((rejected - accepted).abs().argmin())
    return float(rejected[best] + accepted[best]) / 2, float(thresholds[best])


def evaluate(recognizer: Recognizer, identities: range, say: Callable[[str], None]) -> dict[str, float]:
    """Measures errors and cosines on new people: PLAIN pictures and EDITED edits of each.

    `identified`: the share of edits whose most similar source, among all people's, is their own. As for FR,
    plain pictures in which MTCNN finds no face are left out, and edits without a face get their source's box.
    """
    count = len(identities)
    plain = [(i, v, None) for i in identities for v in range(PLAIN)]
    edited = edits_of(identities)
    found_a, found_b = crops.find(plain), found_or_source(edited)
    shown_a = found_a.any(axis=1)
    shown_b = np.repeat(shown_a[::PLAIN], EDITED)  # an edit of a source that shows a face
    a = embed(recognizer, world.render(plain)[shown_a], found_a[shown_a])  # (about count * PLAIN, D)
    b = embed(recognizer, world.render(edited)[shown_b], found_b[shown_b])  # (about count * EDITED, D)
    who_a = torch.arange(count).repeat_interleave(PLAIN)[shown_a]
    who_b = torch.arange(count).repeat_interleave(EDITED)[shown_b]
    variation = torch.arange(PLAIN).repeat(count)[shown_a]

    pairs = a @ a.T
    upper = torch.ones_like(pairs, dtype=torch.bool).triu(1)
    same = who_a[:, None] == who_a
    different = pairs[~same & upper]
    plain_eer, threshold = equal_error_rate(pairs[same & upper], different)
    across = b @ a.T
    same_person = who_b[:, None] == who_a
    other_picture = same_person & (variation != 0)  # an edit against other pictures of its person
    edited_eer, _ = equal_error_rate(across[other_picture], across[~same_person])
    to_sources = across[:, variation == 0]  # (edits, sources)
    own = to_sources[who_b[:, None] == who_a[variation == 0]]  # FR(source, its edit)
    verification = float(np.quantile(different.numpy(), 1 - FALSE_ACCEPTS))
    result = {
        "eer_plain": plain_eer,
        "eer_edited": edited_eer,
        "threshold": threshold,
        "verification": verification,
        "recognised": float((own > verification).float().mean()),
        "identified": float((who_a[variation == 0][to_sources.argmax(1)] == who_b).float().mean()),
        "cosine_different": float(different.mean()),
        "cosine_same": float(pairs[same & upper].mean()),
        "fr_edit": float(own.mean()),
    }
    say(
        f"{count} identities from {identities[0]}: EER {plain_eer:.2%} plain (target 1 %), "
        f"{edited_eer:.2%} one edited (4 %), no face in {np.mean(~shown_a):.1%} of plain pictures; edits: "
        f"{result['identified']:.1%} identified (95 %), {result['recognised']:.1%} above the cosine of "
        f"{FALSE_ACCEPTS:.1%} false accepts, {verification:.3f}; mean cosine of different people "
        f"{result['cosine_different']:.3f}, of one person's pictures {result['cosine_same']:.3f}, "
        f"of an edit and its source {result['fr_edit']:.3f} (0.75)"
    )
    return result


def edits_of(identities: range) -> list[world.Request]:
    """Lists EDITED edits of each identity's variation 0, cycling through the prompts."""
    prompts = list(edit_prompts)
    return [
        (i, 0, prompts[(n * EDITED + k) % len(prompts)])
        for n, i in enumerate(identities)
        for k in range(EDITED)
    ]


def found_or_source(edited: list[world.Request], found: np.ndarray | None = None) -> np.ndarray:
    """Gives edits' boxes (N, 4), or their source's box if an edit shows no face, as for FR.

    found: the edits' boxes, if they were detected elsewhere (on altered edits).
    """
    found = crops.find(edited) if found is None else found
    of_sources = crops.find([(identity, variation, None) for identity, variation, _ in edited])
    return np.where(found.any(axis=1, keepdims=True), found, of_sources)


def evaluate_altered(
    recognizer: Recognizer, identities: range, say: Callable[[str], None]
) -> dict[str, float]:
    """Measures how much of FR(source, edit) is left after alterations that don't change the person."""
    edited = edits_of(identities)
    pictures = world.render(edited)
    sources = [(identity, variation, None) for identity, variation, _ in edited]
    boxes = crops.find(sources)
    shown = boxes.any(axis=1)
    reference = embed(recognizer, world.render(sources)[shown], boxes[shown])

    def similarity(altered: np.ndarray, found: np.ndarray | None = None) -> float:
        seen = embed(recognizer, altered[shown], found_or_source(edited, found)[shown])
        return float((seen * reference).sum(1).mean())

    whole, result = similarity(pictures), {}
    altered = {
        name: [purify(picture, chain(text), 0, "") for picture in pictures] for name, text in ALTERED.items()
    }
    altered["scaled"] = [np.asarray(scaled(Image.fromarray(picture))) for picture in pictures]
    for name, images in altered.items():
        result[name] = similarity(np.stack(images), crops.largest(images)) / whole
    shares = ", ".join(f"{name} {share:.2f}" for name, share in result.items())
    say(f"FR of altered edits, as a share of {whole:.3f}: {shares}")
    return result


def export(model: PreTrainedModel, out: Path) -> None:
    """Writes float16 safetensors, and a preprocessor_config.json with size, mean and std.

    The threshold is not known yet, and that of earlier weights is not kept.
    """
    model.half().to(memory_format=torch.contiguous_format).save_pretrained(out)
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rescale_factor=1 / 255,
    ).save_pretrained(out)


def write_threshold(out: Path, cosine: float) -> None:
    """Writes the verification threshold, a cosine, where the scripts look for it."""
    path = out / "preprocessor_config.json"
    config = json.loads(path.read_text()) | {"verification_threshold": round(cosine, 3)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(
        __doc__, steps=STEPS, identities=3_000, batch=64, lr=1e-3, seed=0, out="recognizer"
    )
    parser.add_argument("--judge", action="store_true", help="train the judge instead of the recogniser")
    parser.add_argument("--start_from", type=Path, help="a finished model of this kind, trained further")
    parser.add_argument("--images", type=positive_int, default=8, help="of each, two of three edited")
    parser.set_defaults(out=None, steps=None)  # depend on --judge
    args = world.parse(parser, argv)
    args.steps = args.steps or (JUDGE_STEPS if args.judge else STEPS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    name = "judge" if args.judge else "recognizer"
    out = args.out or world.ASSETS / name
    seed = args.seed + JUDGE_SEED * args.judge
    device = pick_device(args.device)
    first = portraits.JUDGE.start if args.judge else portraits.TRAIN.start

    torch.manual_seed(seed)
    model = CosFace(build(args.judge), args.identities).to(device)
    size = sum(p.numel() for p in model.backbone.parameters())
    world.log(name, f"{type(model.backbone).__name__}, {size / 1e6:.2f} M parameters, {args}")
    requests = training_requests(range(first, first + args.identities), args.images, seed)
    if not args.export_only:
        images, found = world.render(requests), crops.find(requests)
        boxes = torch.from_numpy(found).float()
        shown = boxes.any(dim=1).nonzero().flatten()  # rows with a face
        if args.start_from and not (world.WORK / f"{name}.pt").exists():  # otherwise the run resumes
            take_over(model, args.start_from, images, found)

    def loss_fn(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = shown[torch.randint(len(shown), (args.batch,), generator=generator)]
        with torch.autocast("cpu", enabled=False):
            pictures = to_tensor(images[rows.numpy()])  # (B, 3, 128, 128)
            batch = crops.photograph(crops.cut(pictures, boxes[rows], generator, SIZE), generator)
        loss, accuracy = model(batch.to(device), rows.to(device) // args.images)
        return {"loss": loss, "accuracy": accuracy}

    steps = 0 if args.export_only else args.steps  # 0 steps return the checkpoint's averaged weights
    trained = world.train(
        name, model, loss_fn, steps=steps, lr=args.lr, weight_decay=0.05, seed=seed, flags=args
    )
    export(trained.backbone, out)
    recognizer = load_recognizer(str(out), torch.device("cpu"), torch.float32)  # as users load it
    say = partial(world.log, name)
    found = evaluate(recognizer, portraits.VALIDATION[:VALIDATION_COUNT], say)
    write_threshold(out, found["verification"])
    evaluate_altered(recognizer, portraits.VALIDATION[:ALTERED_COUNT], say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
