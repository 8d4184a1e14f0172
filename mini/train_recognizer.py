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
import random
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

from utils import HelpFormatter, edit_prompts, pick_device, positive_int

SIZE = 64  # px, the side of what the recognisers see
MARGIN, SCALE = 0.3, 24.0  # CosFace: cosine margin, and the factor that makes logits of cosines
AUGMENT = {"shift": 0.03, "light": 0.1, "noise": 0.08}
JUDGE_SEED = 1_000  # is added to --seed for the judge

VALIDATION_COUNT = 200  # identities
PLAIN, EDITED = 4, 5  # pictures of each in the evaluation


class CosFace(nn.Module):
    """A backbone with one learned direction per training identity; only the backbone is kept afterwards."""

    def __init__(self, backbone: PreTrainedModel, identities: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.centres = nn.Parameter(torch.randn(identities, backbone.config.hidden_sizes[-1]))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the loss and the share of pictures whose own identity is nearest."""
        features = self.backbone(pixel_values=images).pooler_output.flatten(1)  # (B, D)
        with torch.autocast(images.device.type, enabled=False):  # cosines in float32: the margin is small
            cosines = F.normalize(features.float()) @ F.normalize(self.centres).T  # (B, identities)
        margin = MARGIN * F.one_hot(labels, len(self.centres))
        accuracy = (cosines.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(SCALE * (cosines - margin), labels), accuracy


def build(judge: bool) -> PreTrainedModel:
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
    """`images` variations of each identity, every second one with an edit drawn at random."""
    draw = random.Random(seed)
    prompts = list(edit_prompts)
    return [(i, v, draw.choice(prompts) if v % 2 else None) for i in identities for v in range(images)]


@torch.no_grad()
def embed(model: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) uint8 -> (N, D) float32 on the CPU, L2-normalised."""
    batches = [world.to_float(batch, model.device) for batch in images.split(250)]
    return torch.cat(
        [F.normalize(model(pixel_values=b).pooler_output.flatten(1).float()).cpu() for b in batches]
    )


def equal_error_rate(same: torch.Tensor, different: torch.Tensor) -> tuple[float, float]:
    """Cosines of same and of different identities -> (EER, threshold), where both errors are equal."""
    thresholds = same.sort().values
    rejected = torch.arange(len(thresholds)) / len(thresholds)  # genuine pairs below the threshold
    below = torch.searchsorted(different.sort().values, thresholds)
    accepted = 1 - below / len(different)  # impostor pairs at or above it
    best = int((rejected - accepted).abs().argmin())
    return float(rejected[best] + accepted[best]) / 2, float(thresholds[best])


def evaluate(model: PreTrainedModel, name: str, count: int = VALIDATION_COUNT) -> dict[str, float]:
    """Error rates and cosines on validation identities: PLAIN pictures and EDITED edits of each."""
    identities = portraits.VALIDATION[:count]
    plain = [(i, v, None) for i in identities for v in range(PLAIN)]
    prompts = list(edit_prompts)
    edited = [  # of variation 0, the prompts taken in turn
        (i, 0, prompts[(n * EDITED + k) % len(prompts)])
        for n, i in enumerate(identities)
        for k in range(EDITED)
    ]
    a = embed(model, world.pictures(plain, SIZE))  # (count * PLAIN, D)
    b = embed(model, world.pictures(edited, SIZE))  # (count * EDITED, D)
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
        "cosine_different": float(pairs[~same & upper].mean()),
        "cosine_same": float(pairs[same & upper].mean()),
        "fr_edit": float(across[same_person & (variation == 0)].mean()),  # FR(source, its edit)
    }
    world.log(
        name,
        f"{count} validation identities: EER {plain_eer:.2%} plain (target 1.5 %), "
        f"{edited_eer:.2%} one edited (4 %); "
        f"mean cosine of different people {result['cosine_different']:.3f} (0.25), of one person's pictures "
        f"{result['cosine_same']:.3f}; FR of an edit to its source {result['fr_edit']:.3f} (0.75)",
    )
    return result


def export(model: PreTrainedModel, out: Path) -> None:
    """float16 safetensors, and a preprocessor_config.json that gives size, mean and std."""
    model.half().save_pretrained(out)
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rescale_factor=1 / 255,
    ).save_pretrained(out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--judge", action="store_true", help="train the judge instead of the recogniser")
    parser.add_argument("--steps", type=positive_int, default=2_500, help="optimiser steps")
    parser.add_argument("--identities", type=positive_int, default=1_500, help="training identities")
    parser.add_argument(
        "--images", type=positive_int, default=10, help="pictures of each, every second one edited"
    )
    parser.add_argument("--batch", type=positive_int, default=64, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of everything drawn; the judge's is {JUDGE_SEED} higher"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    parser.add_argument(
        "--out", type=Path, help="where the model goes [assets/mini/recognizer, with --judge judge]"
    )
    parser.add_argument("--export_only", action="store_true", help="export and evaluate the last checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    name = "judge" if args.judge else "recognizer"
    out = args.out or world.ASSETS / name
    seed = args.seed + JUDGE_SEED * args.judge
    device = pick_device(args.device)
    first = portraits.JUDGE.start if args.judge else portraits.TRAIN.start
    if args.identities > portraits.JUDGE.start - portraits.TRAIN.start:
        raise SystemExit(
            f"error: --identities {args.identities} would share people with the other model"
        )
    if args.export_only:
        world.require_checkpoint(name)

    torch.manual_seed(seed)
    model = CosFace(build(args.judge), args.identities).to(device)
    size = sum(p.numel() for p in model.backbone.parameters())
    world.log(name, f"{type(model.backbone).__name__}, {size / 1e6:.2f} M parameters, {args}")
    requests = training_requests(range(first, first + args.identities), args.images, seed)
    images = None if args.export_only else world.pictures(requests, SIZE)
    labels = torch.arange(args.identities).repeat_interleave(args.images)

    def loss_fn(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(labels), (args.batch,), generator=generator)
        batch = world.jitter(world.to_float(images[rows], device), generator, **AUGMENT)
        loss, accuracy = model(batch, labels[rows].to(device))
        return {"loss": loss, "accuracy": accuracy}

    steps = 0 if args.export_only else args.steps  # no steps: the checkpoint's averaged weights come back
    trained = world.train(
        name, model, loss_fn, steps=steps, lr=args.lr, weight_decay=0.05, ema_decay=0.995, seed=seed
    )
    export(trained.backbone, out)
    kind = ConvNextModel if args.judge else ResNetModel
    evaluate(kind.from_pretrained(out, dtype=torch.float32).to(device).eval(), name)  # as a user will load it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
