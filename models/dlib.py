"""dlib's face recogniser (King 2017) in torch, so that it can be attacked; trained on three million photos.

The file with its weights comes in the PyPI package face_recognition_models, in the public domain.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# channels of the residual blocks, and whether each halves its input
BLOCKS = (
    *[(32, False)] * 3,
    *[(64, True), (64, False), (64, False), (64, False)],
    *[(128, True), (128, False), (128, False)],
    *[(256, True), (256, False), (256, False)],
    (256, True),
)


class Block(nn.Module):
    """A residual block; one that goes down halves its input by a mean, and pads to the larger."""

    def __init__(self, before: int, after: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.first = nn.Conv2d(before, after, 3, stride=2 if down else 1, padding=0 if down else 1)
        self.second = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(F.relu(self.first(x)))
        if self.down:
            x = F.avg_pool2d(x, 2)
            wide, side = found.shape[1] - x.shape[1], x.shape[2] - found.shape[2]
            x, found = F.pad(x, (0, 0, 0, 0, 0, wide)), F.pad(found, (0, side, 0, side))
        return F.relu(x + found)


def dlib_network(data: bytes) -> nn.Module:
    """Makes dlib's ResNet, (N, 3, 150, 150) -> (N, 128), of the content of its file.

    Each tensor in it is the bytes 1 and 2, four dimensions (a length byte and so many bytes, little-endian),
    and float32 values. Its layers' scale and shift are multiplied into the convolutions. Raises ValueError
    unless the tensors are those of the network.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    before = 32
    for after, down in BLOCKS:
        layers.append(Block(before, after, down))
        before = after
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 128, bias=False))
    place = 0

    def read(*dimensions: int) -> Tensor:
        """Reads the next tensor of these dimensions, and others that are 1."""
        nonlocal place
        head = b"\1\2"
        for size in (*dimensions, 1, 1, 1)[:4]:
            n = (size.bit_length() + 7) // 8
            head += bytes([n]) + size.to_bytes(n, "little")
        begin, count = data.find(head, place) + len(head), math.prod(dimensions)
        place = begin + 4 * count
        if begin < len(head) or place > len(data):
            raise ValueError("not dlib's recogniser")
        return torch.from_numpy(np.frombuffer(data, "<f4", count, begin).copy())

    for layer in network.modules():  # in the order of the file
        if isinstance(layer, nn.Conv2d):
            n_weights, channels = layer.weight.numel(), layer.out_channels
            weight, bias = read(n_weights + channels).split([n_weights, channels])
            scale, shift = read(2 * channels).split(channels)
            layer.weight.data = weight.view_as(layer.weight) * scale[:, None, None, None]
            layer.bias.data = bias * scale + shift
        elif isinstance(layer, nn.Linear):
            layer.weight.data = read(256, 128).view(256, 128).T.contiguous()
    return network
