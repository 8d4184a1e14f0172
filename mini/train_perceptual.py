"""Trains the mini world's perceptual distance: LPIPS on a SqueezeNet 1.1 trunk.

    python mini/train_perceptual.py                # -> assets/mini/perceptual
    python mini/train_perceptual.py --export_only  # exports and evaluates the last checkpoint again

The trunk learns to name what a portrait shows (the words of portraits.describe) and which of the 25 edits was
made, if any. LPIPS's own heads fit only the ImageNet trunk, and there are no human judgements of this world,
so each head is one constant: all channels of a layer have the same weight. The constants make the mean
distance between two people's portraits USUAL, with equal shares for the layers, so that values have the size
that LPIPS users know. A stopped run resumes; checkpoints and the log are in mini/checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import lpips
import numpy as np
import portraits
import torch
import torch.nn.functional as F
import world
from safetensors.torch import load_file, save_file
from torch import nn

from images import to_tensor
from utils import edit_prompts, pick_device, positive_int

# The mean distance between different people's portraits, chosen on validation identities. With 0.5, LPIPS's
# gradient in facelock was as large as the face term's, and the defense moved both recognisers less.
USUAL = 0.3
AUGMENT = {"shift": 0.03, "light": 0.1, "noise": 0.15}
CALIBRATION_PAIRS = 100
VALIDATION_COUNT = 64
CONFIG = {
    "net": "squeeze",
    "pretrained": False,
    "pnet_rand": True,
    "lpips": True,
}  # the arguments of lpips.LPIPS


class Namer(nn.Module):
    """LPIPS's trunk with a linear head on its last layer; only the trunk is kept after training."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.metric = lpips.LPIPS(**CONFIG, pnet_tune=True, verbose=False)
        for head in self.metric.lins:
            head.requires_grad_(False)
        self.names = nn.Linear(self.metric.chns[-1], words + 1 + len(edit_prompts))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores words and edits -> logits, (B, words + 26)."""
        features = self.metric.net(self.metric.scaling_layer(images)).relu7
        return self.names(features.mean((2, 3))).float()


@torch.no_grad()
def layer_distances(metric: lpips.LPIPS, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Computes each layer's mean distance, summed over channels, as LPIPS does without heads -> (L,)."""
    first, second = (metric.net(metric.scaling_layer(images)) for images in (a, b))
    distances = [
        ((lpips.normalize_tensor(x) - lpips.normalize_tensor(y)) ** 2).sum(1).mean()
        for x, y in zip(first, second)
    ]
    return torch.stack(distances)


def calibrate(metric: lpips.LPIPS, images: np.ndarray) -> None:
    """Sets the constant heads from pictures of different people, (N, 128, 128, 3) uint8."""
    device = next(metric.parameters()).device
    batches = [to_tensor(images[row : row + 25]).to(device) for row in range(0, len(images), 25)]
    raw = torch.stack([layer_distances(metric, batch, batch.roll(1, 0)) for batch in batches]).mean(0)  # (L,)
    for head, distance in zip(metric.lins, raw):
        head.model[-1].weight.data.fill_(float(USUAL / (len(raw) * distance)))


def distorted(images: torch.Tensor, kind: str, strength: float) -> torch.Tensor:
    """Distorts images by a strength of 1, 2, 4 or 8; a good distance grows with the strength."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        return (images + 0.02 * strength * noise).clamp(-1, 1)
    if kind == "blur":
        side = int(images.shape[-1] / (1 + 0.5 * strength))
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=False)
    if kind == "shift":
        return F.pad(images, (int(strength), 0, 0, 0), mode="replicate")[..., : images.shape[-1]]
    tint = torch.tensor([1.0, 0.0, -1.0], device=images.device).view(1, 3, 1, 1)
    return (images + 0.04 * strength * tint).clamp(-1, 1)  # colour


@torch.no_grad()
def evaluate(out: Path, device: torch.device, count: int = VALIDATION_COUNT) -> dict[str, float]:
    """Loads the exported network as the scripts do, and checks that the distance behaves."""
    metric = lpips.LPIPS(**json.loads((out / "config.json").read_text()), verbose=False)
    metric.load_state_dict(
        {key: value.float() for key, value in load_file(out / "model.safetensors").items()}
    )
    metric.to(device).eval()
    identities = portraits.VALIDATION[:count]
    images = to_tensor(world.render([(i, 0, None) for i in identities])).to(device)
    others = to_tensor(world.render([(i, 1, None) for i in identities])).to(device)
    prompts = list(edit_prompts)
    requests = [(i, 0, prompts[n % len(prompts)]) for n, i in enumerate(identities)]
    edits = to_tensor(world.render(requests)).to(device)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return metric(a, b).flatten()  # (B,)

    result = {
        "same": float(distance(images, images).max()),
        "other_person": float(distance(images, images.roll(1, 0)).mean()),
        "other_variation": float(distance(images, others).mean()),
        "edit": float(distance(images, edits).mean()),
    }
    parts = []
    for kind in ("noise", "blur", "shift", "colour"):
        by_strength = torch.stack(
            [distance(images, distorted(images, kind, s)) for s in (1, 2, 4, 8)]
        )  # (4, B)
        result[f"{kind}_ordered"] = float((by_strength.diff(dim=0) > 0).float().mean())
        values = " ".join(f"{v:.3f}" for v in by_strength.mean(1).tolist())
        parts.append(f"{kind} {values} ({result[f'{kind}_ordered']:.0%} of steps in order)")
    world.log(
        "perceptual",
        f"{count} validation identities: itself {result['same']:.3g}, its edit {result['edit']:.3f}, "
        f"another variation {result['other_variation']:.3f}, "
        f"another person {result['other_person']:.3f}; " + "; ".join(parts),
    )
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(__doc__, steps=250, identities=300, batch=32, lr=5e-4, seed=1, out="perceptual")
    parser.add_argument("--images", type=positive_int, default=4, help="of each, every second edited")
    return world.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, calibrates, exports and evaluates."""
    args = parse(argv)
    device = pick_device(args.device)

    draw = random.Random(args.seed)
    prompts = list(edit_prompts)
    identities = portraits.TRAIN[: args.identities]
    requests = [
        (i, v, draw.choice(prompts) if v % 2 else None) for i in identities for v in range(args.images)
    ]
    described = [set(" ".join(portraits.describe(i, v).values()).split()) for i, v, _ in requests]
    vocabulary = sorted(set().union(*described))
    shown = torch.tensor(
        [[word in words for word in vocabulary] for words in described]
    ).float()  # (N, words)
    edit = torch.tensor([0 if prompt is None else 1 + prompts.index(prompt) for _, _, prompt in requests])

    torch.manual_seed(args.seed)
    model = Namer(len(vocabulary)).to(device)
    world.log("perceptual", f"{len(vocabulary)} words, {args}")
    pictures = None if args.export_only else world.render(requests)

    def loss_fn(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(requests), (args.batch,), generator=generator)
        images = world.jitter(to_tensor(pictures[rows.numpy()]).to(device), generator, **AUGMENT)
        output = model(images)
        words, edits = output[:, : len(vocabulary)], output[:, len(vocabulary) :]
        label = edit[rows].to(device)
        wrong = F.binary_cross_entropy_with_logits(words, shown[rows].to(device), reduction="none").sum(1)
        plain = (label == 0).float()  # an edit may hide what the source's words name
        naming = (wrong * plain).sum() / plain.sum().clamp(min=1)
        editing = F.cross_entropy(edits, label)
        return {
            "loss": naming + editing,
            "words": naming,
            "edit": editing,
            "accuracy": (edits.argmax(1) == label).float().mean(),
        }

    steps = 0 if args.export_only else args.steps  # 0 steps return the checkpoint's averaged weights
    trained = world.train("perceptual", model, loss_fn, steps=steps, lr=args.lr, seed=args.seed, flags=args)
    metric = trained.metric
    calibrate(metric, world.render([(i, 0, None) for i in portraits.TRAIN[:CALIBRATION_PAIRS]]))
    args.out.mkdir(parents=True, exist_ok=True)
    # clone: LPIPS registers each head twice (lin0, lins.0), and safetensors refuses shared memory
    state = {key: value.half().cpu().clone().contiguous() for key, value in metric.state_dict().items()}
    save_file(state, args.out / "model.safetensors")
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    evaluate(args.out, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
