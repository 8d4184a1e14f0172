"""Trains the mini world's face recogniser, or with --judge the one that no attack ever sees.

    python mini/train_recognizer.py                # -> assets/mini/recognizer, a transformers ResNetModel
    python mini/train_recognizer.py --judge        # -> assets/mini/judge, a transformers ConvNextModel
    python mini/train_recognizer.py --export_only  # the last checkpoint, exported and evaluated again

The embedding of a 64x64 picture in [-1, 1] is the model's `pooler_output`, flattened and L2-normalised.
Trained with CosFace (Wang et al. 2018, arXiv 1801.09414): identity is what stays through other clothes,
expressions, light and the 25 edits. Judge and recogniser share no identity, seed or architecture.
A stopped run goes on where it was; checkpoints and the log are in mini/checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import portraits
import torch
import torch.nn.functional as F
import world
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
)

from images import to_tensor
from models.faces import Recognizer, load_recognizer
from utils import edit_prompts, pick_device, positive_int

SIZE = 64  # px, the side of what the recognisers see
MARGIN, SCALE = 0.3, 24.0  # CosFace: cosine margin, and the factor that makes logits of cosines
AUGMENT = {"shift": 0.03, "light": 0.1, "noise": 0.03, "tint": 0.4}
# The share of training pictures that get another portrait's hair, clothes and background, and the part of the
# training after which it is reached: with all of it from the start the judge learned nothing.
SURROUNDINGS, RAMP = 0.4, 0.35
STEPS, JUDGE_STEPS = 6_000, 16_000  # with 6,000 the judge hardly saw what an attack on the other one does
JUDGE_SEED = 1_000  # is added to --seed for the judge

VALIDATION_COUNT = 200  # identities
PLAIN, EDITED = 4, 5  # pictures of each in the evaluation
FALSE_ACCEPTS = 0.001  # share of pairs of strangers above the verification threshold


class CosFace(nn.Module):
    """Gives a backbone one learned direction per training identity; the backbone alone is kept afterwards."""

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
    return ResNetModel(
        ResNetConfig(
            layer_type="basic", embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1],
            hidden_act="prelu",  # after ReLU all embeddings share one orthant, and no cosine is negative
        )
    )  # fmt: skip


def training_requests(identities: range, images: int, seed: int) -> list[world.Request]:
    """Lists `images` variations of each identity, two of three with an edit drawn at random."""
    draw = random.Random(seed)
    prompts = list(edit_prompts)
    return [(i, v, draw.choice(prompts) if v % 3 else None) for i in identities for v in range(images)]


@torch.no_grad()
def embed(recognizer: Recognizer, requests: list[world.Request]) -> torch.Tensor:
    """Embeds portraits as the project's scripts do -> (N, D) float32, L2-normalised."""
    pictures = world.render(requests)
    parts = []
    for row in range(0, len(pictures), 250):
        images = to_tensor(pictures[row : row + 250])  # (B, 3, 128, 128)
        parts.append(recognizer.embed(images, [[(0, 0, *images.shape[-2:])]] * len(images)))
    return torch.cat(parts)


def equal_error_rate(same: torch.Tensor, different: torch.Tensor) -> tuple[float, float]:
    """Finds where both errors are equal. Cosines of same and different identities -> (EER, threshold)."""
    thresholds = torch.cat([same, different]).sort().values
    rejected = torch.searchsorted(same.sort().values, thresholds) / len(same)  # genuine pairs below it
    accepted = 1 - torch.searchsorted(different.sort().values, thresholds) / len(different)  # impostors
    best = int((rejected - accepted).abs().argmin())
    return float(rejected[best] + accepted[best]) / 2, float(thresholds[best])


def evaluate(
    recognizer: Recognizer, identities: range, say: Callable[[str], None]
) -> dict[str, float]:
    """Measures errors and cosines on people never trained on: PLAIN pictures and EDITED edits of each."""
    count = len(identities)
    plain = [(i, v, None) for i in identities for v in range(PLAIN)]
    prompts = list(edit_prompts)
    edited = [  # of variation 0, the prompts taken in turn
        (i, 0, prompts[(n * EDITED + k) % len(prompts)])
        for n, i in enumerate(identities)
        for k in range(EDITED)
    ]
    a = embed(recognizer, plain)  # (count * PLAIN, D)
    b = embed(recognizer, edited)  # (count * EDITED, D)
    who_a = torch.arange(count).repeat_interleave(PLAIN)
    who_b = torch.arange(count).repeat_interleave(EDITED)
    variation = torch.arange(PLAIN).repeat(count)

    pairs = a @ a.T
    upper = torch.ones_like(pairs, dtype=torch.bool).triu(1)
    same = who_a[:, None] == who_a
    plain_eer, threshold = equal_error_rate(pairs[same & upper], pairs[~same & upper])
    across = b @ a.T
    same_person = who_b[:, None] == who_a
    other_picture = same_person & (variation != 0)  # an edit against other pictures of its person
    edited_eer, _ = equal_error_rate(across[other_picture], across[~same_person])
    result = {
        "eer_plain": plain_eer,
        "eer_edited": edited_eer,
        "threshold": threshold,
        "verification": float(pairs[~same & upper].quantile(1 - FALSE_ACCEPTS)),
        "cosine_different": float(pairs[~same & upper].mean()),
        "cosine_same": float(pairs[same & upper].mean()),
        "fr_edit": float(across[same_person & (variation == 0)].mean()),  # FR(source, its edit)
    }
    say(
        f"{count} identities from {identities[0]}: EER {plain_eer:.2%} plain (target 1.5 %), "
        f"{edited_eer:.2%} one edited (4 %); "
        f"mean cosine of different people {result['cosine_different']:.3f} (0.25), of one person's pictures "
        f"{result['cosine_same']:.3f}; FR of an edit to its source {result['fr_edit']:.3f} (0.75)"
    )
    return result


def export(model: PreTrainedModel, out: Path) -> None:
    """Writes float16 safetensors, and a preprocessor_config.json that gives size, mean and std."""
    model.half().save_pretrained(out)
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rescale_factor=1 / 255,
    ).save_pretrained(out)


def write_threshold(out: Path, cosine: float) -> None:
    """Notes the cosine above which two pictures are taken for one person, where the scripts look for it."""
    path = out / "preprocessor_config.json"
    config = json.loads(path.read_text()) | {"verification_threshold": round(cosine, 3)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(
        __doc__, steps=STEPS, identities=3_000, batch=64, lr=1e-3, seed=0, out="recognizer"
    )
    parser.add_argument("--judge", action="store_true", help="train the judge instead of the recogniser")
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
    images = None if args.export_only else world.pictures(requests, SIZE)
    labels = torch.arange(args.identities).repeat_interleave(args.images)

    def loss_fn(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(labels), (args.batch,), generator=generator)
        share = SURROUNDINGS * min(1.0, step / (RAMP * args.steps))
        batch = world.change_surroundings(to_tensor(images[rows.numpy()]).to(device), generator, share)
        loss, accuracy = model(world.jitter(batch, generator, **AUGMENT), labels[rows].to(device))
        return {"loss": loss, "accuracy": accuracy}

    steps = 0 if args.export_only else args.steps  # no steps: the checkpoint's averaged weights come back
    trained = world.train(
        name, model, loss_fn, steps=steps, lr=args.lr, weight_decay=0.05, seed=seed, flags=args
    )
    export(trained.backbone, out)
    recognizer = load_recognizer(str(out), torch.device("cpu"), torch.float32)  # as users load it
    found = evaluate(recognizer, portraits.VALIDATION[:VALIDATION_COUNT], partial(world.log, name))
    write_threshold(out, found["verification"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
