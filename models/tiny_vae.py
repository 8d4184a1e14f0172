"""TAEF2: the tiny autoencoder of FLUX.2's latent space (Ollin Boer Bohan, github.com/madebyollin/taesd, MIT).

diffusers' AutoencoderTiny holds its siblings TAESD, TAESDXL, TAESD3 and TAEF1, but not this one: a group norm
in its middle blocks lets them see the whole picture. The latents are those of FLUX.2's VAE after its batch
norm, before 2x2 of them are packed into one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from models.loading import find_file, read_state

WIDTH, LATENT = 64, 32  # channels
WHOLE = "taef2.safetensors"  # keys encoder.layers.i and decoder.layers.i
HALVES = ("taef2_encoder.pth", "taef2_decoder.pth")  # keys i; the decoder's first layer is the tanh

conv = partial(nn.Conv2d, kernel_size=3, padding=1)
down = partial(conv, WIDTH, WIDTH, stride=2, bias=False)


class Block(nn.Module):
    """A residual block of three convolutions; one in the middle first adds what its group norm sees."""

    def __init__(self, is_middle: bool = False) -> None:
        super().__init__()
        layers = (conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))
        self.conv = nn.Sequential(*layers)
        if is_middle:
            wide = 4 * WIDTH
            first, last = nn.Conv2d(WIDTH, wide, 1, bias=False), nn.Conv2d(wide, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(first, nn.GroupNorm(4, wide), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def blocks(is_middle: bool = False) -> list[nn.Module]:
    return [Block(is_middle) for _ in range(3)]


def up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], in [0, 1] for the layers -> latents (B, 32, H/8, W/8)."""

    def __init__(self) -> None:
        super().__init__()
        first = [conv(3, WIDTH), Block(), down(), *blocks(), down(), *blocks(), down()]
        self.layers = nn.Sequential(*first, *blocks(is_middle=True), conv(WIDTH, LATENT))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images + 1) / 2)


class Decoder(nn.Module):
    """Latents (B, 32, h, w) -> images (B, 3, 8 h, 8 w) in about [-1, 1], in [0, 1] from the layers."""

    def __init__(self) -> None:
        super().__init__()
        first = [conv(LATENT, WIDTH), nn.ReLU(), *blocks(is_middle=True), *up(), *blocks(), *up(), *blocks()]
        self.layers = nn.Sequential(*first, *up(), Block(), conv(WIDTH, 3))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(3 * torch.tanh(latents / 3)) * 2 - 1


class TAEF2(nn.Module):
    """The autoencoder, called as diffusers' AutoencoderTiny is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.layers[0].weight.dtype

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=self.encoder(images))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latents))


def read_taef2(place: str, where: dict[str, Any]) -> TAEF2:
    """Reads the network of what `from_hub` gives: taef2.safetensors, or the two .pth files of its authors.

    Raises OSError or ValueError for files that aren't there or not whole, UnpicklingError for a hostile one.
    """
    whole, *halves = (find_file(place, where, name) for name in (WHOLE, *HALVES))
    if whole:
        state = read_state(whole)
    elif all(halves):
        encoder, decoder = map(read_state, halves)
        state = {f"encoder.layers.{key}": values for key, values in encoder.items()}
        for key, values in decoder.items():
            number, _, rest = key.partition(".")
            state[f"decoder.layers.{int(number) - 1}.{rest}"] = values
    else:
        raise FileNotFoundError("no vae/config.json, no config.json, and none of TAEF2's files in it")
    network = TAEF2()
    network.load_state_dict(state)
    return network
