"""The networks of `instant`, which guess at once what a loop would climb to, from picture and budget.

A network is a folder with `config.json` and `model.safetensors`, made by train_protector.py. Each
takes images (B, 3, H, W) in [-1, 1] and every pixel's budget (B, 1, H, W), and gives a share of that budget,
(B, 3, H, W) in [-1, 1]: what comes of it is within the budget whatever the weights are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.faces import Box, PointCrop
from models.loading import frozen, loading, read_state, recorded, shown
from models.recognizers import arcface
from utils import MOST_TEXT, UserError, parse_json, read_plain

USUAL = 0.06  # a budget that the networks are shown as 1
PATCH = 4  # px; a network works on patches of this side
MOST_FRAME = 1024  # px
FACE_SHARE = 0.6  # of a frame's side that ArcFace's crop has
GRID = 8  # faces are compared by their mean colours in GRID x GRID fields


class Network(NamedTuple):
    """A network with the frame in which it wants to see a face; None: it sees the whole picture."""

    shares: nn.Module
    frame: PointCrop | None

    def __call__(self, images: Tensor, budget: Tensor, boxes: Sequence[Sequence[Box]] = ()) -> Tensor:
        """Gives shares of the budget, float32 (B, 3, H, W) in [-1, 1]; 0 outside of the frames.

        images, budget: as `Shares` has them; boxes: the faces of each image, in its pixels.
        """
        if self.frame is None:
            return self._ask(images, budget)
        found = torch.zeros_like(images)
        for row, faces in enumerate(boxes):
            for face in faces:
                one, where = (self.frame(part[row : row + 1], face) for part in (images, budget))
                shares = self._ask(one, where.clamp(min=0))  # outside of the picture it is -1
                self.frame.back(shares, face, found[row : row + 1])
        return found.clamp_(-1, 1)

    def _ask(self, images: Tensor, budget: Tensor) -> Tensor:
        """Asks the network in its own dtype."""
        dtype = next(self.shares.parameters()).dtype
        return self.shares(images.to(dtype), budget.to(dtype)).float()


class Block(nn.Module):
    """Two convolutions that are added to their input; at first they add nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.first(F.silu(self.norm(x)))))


class Shares(nn.Module):
    """What all kinds are: tanh keeps what they find, their `logits`, to a share of the budget."""

    def forward(self, images: Tensor, budget: Tensor) -> Tensor:
        return self.logits(images, budget).tanh()

    def logits(self, images: Tensor, budget: Tensor) -> Tensor:
        """Looks at images (B, 3, H, W) and each pixel's budget (B, 1, H, W) -> (B, 3, H, W)."""
        raise NotImplementedError


class UNet(Shares):
    """A U-Net on patches of 4 px; its last layer begins at zero.

    channels: of each level, multiples of 8; a level has half the side of the one before. depths: blocks of
    each level, on the way down and again on the way up.
    """

    def __init__(self, channels: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        patch = PATCH * PATCH
        self.multiple = PATCH * 2 ** (len(channels) - 1)
        self.first = nn.Conv2d(4 * patch, channels[0], 3, padding=1)
        pairs = list(itertools.pairwise(channels))
        self.down = nn.ModuleList(nn.Conv2d(high, low, 2, stride=2) for high, low in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, stride=2) for high, low in pairs)
        self.join = nn.ModuleList(nn.Conv2d(2 * high, high, 1) for high in channels[:-1])
        levels = list(zip(channels, depths, strict=True))
        self.before = nn.ModuleList(_blocks(*level) for level in levels)
        self.after = nn.ModuleList(_blocks(*level) for level in levels[:-1])
        self.last = nn.Conv2d(channels[0], 3 * patch, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def logits(self, images: Tensor, budget: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        seen = torch.cat([images, budget / USUAL], dim=1)
        seen = F.pad(seen, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        x = self.first(F.pixel_unshuffle(seen, PATCH))  # (B, C, H/4, W/4)
        kept = []
        for blocks, down in zip(self.before, self.down):
            x = blocks(x)
            kept.append(x)
            x = down(x)
        x = self.before[-1](x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([kept[level], self.up[level](x)], dim=1))
            x = self.after[level](x)
        return F.pixel_shuffle(self.last(F.silu(x)), PATCH)[..., :height, :width]


def _blocks(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels) for _ in range(depth)))


class Universal(Shares):
    """Stored patterns that are laid on the picture like tiles: one for all, or that of the nearest face.

    One is a universal perturbation (Moosavi-Dezfooli et al. 2017); several are a mixture in the manner of
    FastProtect (Ahn et al. 2025), which goes by latents, not by colours. size: of a pattern's side in px.
    Patterns keep their place in the picture, not in the face: autoencoders work on a grid.
    """

    def __init__(self, num_patterns: int, size: int) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.zeros(num_patterns, 3, size, size))
        self.register_buffer("centres", torch.zeros(num_patterns, 3 * GRID * GRID))

    def logits(self, images: Tensor, budget: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        down, right = (-(-side // self.patterns.shape[-1]) for side in (height, width))
        laid = self.patterns[self.nearest(fields(images, budget))]  # (B, 3, S, S)
        return laid.repeat(1, 1, down, right)[..., :height, :width]

    def nearest(self, faces: Tensor) -> Tensor:
        """Finds the centre that is nearest to each of the faces' fields (B, D) -> (B,)."""
        return torch.cdist(faces.float(), self.centres.float()).argmin(dim=1)


def fields(images: Tensor, budget: Tensor) -> Tensor:
    """Averages images (B, 3, H, W) in GRID x GRID fields of the box that has a budget -> (B, D)."""
    found = []
    for image, where in zip(images, budget[:, 0] > 0, strict=True):
        rows, columns = (where if where.any() else ~where).nonzero().unbind(1)  # all, where there is none
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        found.append(F.adaptive_avg_pool2d(box, GRID).flatten())
    return torch.stack(found)


def limited(change: Tensor, mask: Tensor, rms: float | None) -> Tensor:
    """Scales changes (B, 3, H, W) down to a root mean square, if any, where a mask (B, 1, H, W) isn't 0."""
    if rms is None:
        return change
    where = (mask > 0).to(change)
    squares = sum((where[:, 0] * plane).square().sum(dim=(1, 2)) for plane in change.unbind(1))
    own = squares / (3 * where.sum(dim=(1, 2, 3))).clamp(min=1)
    return change * (rms / own.clamp(min=1e-12).sqrt()).clamp(max=1).view(-1, 1, 1, 1)


KINDS = {"unet": UNet, "universal": Universal}


def read_config(member: str) -> dict[str, Any]:
    """Reads a folder's config: `network`, what it is built of, and `trained`, how. Raises UserError."""
    with loading("the protector", member):
        if not Path(member).is_dir():
            raise UserError(f"the protector {shown(member)} isn't there; train_protector.py makes one")
        said = parse_json(read_plain(Path(member) / "config.json", MOST_TEXT))
        if said["network"]["kind"] not in KINDS:
            raise ValueError(f"its network is of no kind among {', '.join(KINDS)}")
        _ = [said["trained"][key] for key in ("method", "vae", "rms")]  # KeyError: it isn't ours
        return said


def is_for(trained: Mapping[str, Any], vae: str) -> bool:
    """Tells whether a network was trained for an autoencoder, or for one of its directory's name."""
    return not {recorded(vae), Path(vae).name}.isdisjoint(trained["vae"])


@functools.cache
def load_protector(member: str, device: torch.device, dtype: torch.dtype) -> Network:
    """Loads a network of `instant` from its folder; cached. Raises UserError."""
    config = read_config(member)
    how, frame = dict(config["network"]), config.get("frame")
    with loading("the protector", member):
        state = read_state(Path(member) / "model.safetensors")
        with torch.device("meta"):  # a config can't ask for more than its weights are
            network = KINDS[how.pop("kind")](**how)
        network.load_state_dict(state, assign=True)
        return Network(frozen(network, device, dtype), None if frame is None else frame_of(frame))


def frame_of(size: int) -> PointCrop:
    """Makes the square of a side in px in whose middle is ArcFace's crop. Raises ValueError."""
    if not isinstance(size, int) or not 32 <= size <= MOST_FRAME:
        raise ValueError(f"its frame is no whole number from 32 to {MOST_FRAME}")
    return arcface(size, FACE_SHARE)
