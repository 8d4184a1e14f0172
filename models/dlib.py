"""dlib's face recogniser (King 2017) in torch, so that it can be attacked; trained on three million photos.

The file with its weights comes in the PyPI package face_recognition_models, in the public domain.
"""

from __future__ import annotations

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


def dlib_network(data: bytes) -> torch.nn.Module:
    """Makes dlib's ResNet, (N, 3, 150, 150) -> (N, 128), of the content of its file.

    Its layers' scale and shift are multiplied into the convolutions. Raises ValueError for another file.
    """
    tensors = iter(_dlib_tensors(data))

    def convolution(before: int, after: int, side: int, stride: int) -> nn.Conv2d:
        """A convolution with bias, and what follows it: a scale and a shift for each channel."""
        layer = nn.Conv2d(before, after, side, stride, padding=side // 2 if stride == 1 else 0)
        weight, bias = next(tensors).split([before * after * side * side, after])
        scale, shift = next(tensors).split(after)
        layer.weight.data = weight.view_as(layer.weight) * scale[:, None, None, None]
        layer.bias.data = bias * scale + shift
        return layer

    class Block(nn.Module):
        """A residual block; one that goes down halves its input by a mean, and pads to the larger."""

        def __init__(self, before: int, after: int, down: bool) -> None:
            super().__init__()
            self.down = down
            self.first = convolution(before, after, 3, 2 if down else 1)
            self.second = convolution(after, after, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            found = self.second(F.relu(self.first(x)))
            if self.down:
                x = F.avg_pool2d(x, 2)
                wide, side = found.shape[1] - x.shape[1], x.shape[2] - found.shape[2]
                x, found = F.pad(x, (0, 0, 0, 0, 0, wide)), F.pad(found, (0, side, 0, side))
            return F.relu(x + found)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    layers: list[nn.Module] = [convolution(3, 32, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    before = 32
    for after, down in BLOCKS:
        layers.append(Block(before, after, down))
        before = after
    last = nn.Linear(256, 128, bias=False)
    last.weight.data = next(tensors).view(256, 128).T.contiguous()
    network = nn.Sequential(*layers, Mean(), last)
    if next(tensors, None) is not None or not all(
        torch.isfinite(part).all() for part in network.parameters()
    ):
        raise ValueError("not dlib's recogniser")
    return network


def _dlib_tensors(data: bytes) -> list[Tensor]:
    """Finds the tensors in a file of dlib's recogniser, in the order of its layers.

    Each is the bytes 1 and 2, four dimensions (a length byte and so many bytes, little-endian), and float32
    values. Raises ValueError unless the sizes are those of the network.
    """
    sizes = [3 * 32 * 49 + 32, 64]
    before = 32
    for after, _ in BLOCKS:
        sizes += [9 * before * after + after, 2 * after, 9 * after * after + after, 2 * after]
        before = after
    tensors, place = [], 0
    for dimensions in [(size, 1, 1, 1) for size in sizes] + [(256, 128, 1, 1)]:
        number = [(size.bit_length() + 7) // 8 for size in dimensions]
        coded = b"".join(
            bytes([n]) + size.to_bytes(n, "little") for n, size in zip(number, dimensions, strict=True)
        )
        place = data.find(b"\1\2" + coded, place)
        count = dimensions[0] * dimensions[1]
        begin = place + 2 + len(coded)
        if place < 0 or begin + 4 * count > len(data):
            raise ValueError("not dlib's recogniser")
        tensors.append(torch.from_numpy(np.frombuffer(data, "<f4", count, begin).copy()))
        place = begin + 4 * count
    return tensors
