"""Autoencoders: the editors' own, which is all that most defenses need, and tiny ones distilled from them.

An autoencoder is named by the id or directory of an editor, whose `vae` folder it is, or by its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from images import to_working
from models.loading import compiled, find_file, from_hub, frozen, hub_way, load_network, loading
from utils import MOST_TEXT, UserError, parse_json, read_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class WorkingVAE:
    """The VAE as the defenses get it: images of any size go in, and are first brought to the working size.

    `encode` applies the editor's `to_working`, so what is optimised is what the editor will see. Casts images
    and latents to the network's dtype.
    """

    def __init__(
        self, vae: Any, resolution: int, to_working: Callable[[Tensor, int], Tensor] = to_working
    ) -> None:
        self.vae = vae
        self.resolution = resolution
        self.to_working = to_working

    def encode(self, images: Tensor) -> Any:
        """Encodes (B, 3, H, W) in [-1, 1] at the working size -> diffusers' encoder output."""
        working = self.to_working(images, self.resolution)
        return self._encode(working.to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Any:
        """Decodes latents -> diffusers' decoder output at the working size, with its padding."""
        return self._decode(latents.to(self.vae.dtype))

    def round_trip(self, images: Tensor) -> Tensor:
        """Gives clip(D(E(x)), -1, 1) at the working size, with its padding, in float32, without gradient."""
        import torch

        with torch.no_grad():
            return self.decode(self.encode(images).latent_dist.mean).sample.float().clamp(-1, 1)

    def _encode(self, images: Tensor) -> Any:
        return self.vae.encode(images)

    def _decode(self, latents: Tensor) -> Any:
        return self.vae.decode(latents)


class Flux2VAE(WorkingVAE):
    """FLUX.2's: the latents are those its transformer gets, (B, 128, h/16, w/16).

    They are 2x2 patches of the network's 32 channels, normalised by its batch norm's running statistics.
    """

    def _encode(self, images: Tensor) -> Any:
        from torch.nn.functional import pixel_unshuffle

        latents = self.vae.encode(images).latent_dist  # (B, 32, h/8, w/8)
        logvar = pixel_unshuffle(latents.logvar, 2) - 2 * self._std.log()
        return _posterior(self.vae.bn(pixel_unshuffle(latents.mean, 2)), logvar)

    def _decode(self, latents: Tensor) -> Any:
        from torch.nn.functional import pixel_shuffle

        mean = self.vae.bn.running_mean[:, None, None]
        return self.vae.decode(pixel_shuffle(latents * self._std + mean, 2))

    @property
    def _std(self) -> Tensor:
        return (self.vae.bn.running_var + self.vae.bn.eps).sqrt()[:, None, None]  # (128, 1, 1)


class QwenImageVAE(WorkingVAE):
    """Qwen-Image's, of videos, for one frame: the latents are normalised as its transformer gets them."""

    def _encode(self, images: Tensor) -> Any:
        latents = self.vae.encode(images[:, :, None]).latent_dist  # (B, 16, 1, h/8, w/8)
        mean, std = self._statistics
        return _posterior((latents.mean[:, :, 0] - mean) / std, latents.logvar[:, :, 0] - 2 * std.log())

    def _decode(self, latents: Tensor) -> Any:
        mean, std = self._statistics
        made = self.vae.decode((latents * std + mean)[:, :, None])
        return type(made)(sample=made.sample[:, :, 0])

    @property
    def _statistics(self) -> Tensor:
        config = self.vae.config
        values = [config.latents_mean, config.latents_std]
        return self.vae.post_quant_conv.weight.new_tensor(values)[:, :, None, None]  # (2, 16, 1, 1)


class TinyVAE(WorkingVAE):
    """AutoencoderTiny and TAEF2, which give a latent and no variance."""

    def _encode(self, images: Tensor) -> Any:
        latents = self.vae.encode(images).latents
        return _posterior(latents, latents.new_zeros(latents.shape))


VAES = {  # a network's class -> its adapter; others need none
    "AutoencoderKLFlux2": Flux2VAE,
    "AutoencoderKLQwenImage": QwenImageVAE,
    "AutoencoderTiny": TinyVAE,
    "TAEF2": TinyVAE,
}


def _posterior(mean: Tensor, logvar: Tensor) -> Any:
    """An encoder output as diffusers gives it."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))


@functools.cache
def load_vae(
    editor: type,
    member: str,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool = False,
    compile: bool = False,
) -> WorkingVAE:
    """Loads an autoencoder that sees images as an editor does; cached. Raises UserError.

    editor: its class. member: an editor, whose VAE it is, or an autoencoder; a hub id or directory of either.
    checkpointing: a gradient computes activations again instead of keeping them. compile: with torch.compile.
    """
    import torch

    if editor.fp32_vae and dtype == torch.float16:
        dtype = torch.float32
    with loading("the VAE of", member, hub_way(member, is_vae=True)):
        vae = _network(member, device, dtype)
    if checkpointing:
        _checkpoint(vae)
    if compile:
        compiled(vae.encoder)
        compiled(vae.decoder)
    return VAES.get(type(vae).__name__, WorkingVAE)(vae, resolution, editor.to_working)


def _network(member: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The network: TAEF2 by its files, others by the class that their config names."""
    from models.tiny_vae import read_taef2

    name, where = from_hub(member)
    for folder, file in (("vae", "vae/config.json"), ("", "config.json")):
        if config := find_file(name, where, file):
            kind = parse_json(read_plain(config, MOST_TEXT)).get("_class_name", "AutoencoderKL")
            vae = load_network(kind, name, where, folder, device, dtype)
            if not hasattr(vae, "decode"):
                raise ValueError(f"no class {kind} in this version of diffusers is an autoencoder")
            return vae
    return frozen(read_taef2(name, where), device, dtype)


def _checkpoint(vae: Any) -> None:
    """Gradient checkpointing in two levels: diffusers' own, by blocks, and within them by residual blocks.

    At 1024x1024, recomputing the outermost block alone would take some 20 GB. Tiny autoencoders have only the
    second level.
    """
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
    from diffusers.models.resnet import ResnetBlock2D
    from torch.utils.checkpoint import checkpoint

    from models.tiny_vae import Block

    if VAES.get(type(vae).__name__) is not TinyVAE:
        if not vae._supports_gradient_checkpointing:
            raise UserError(f"--checkpointing: {type(vae).__name__} can't compute its activations again")
        vae.enable_gradient_checkpointing()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | AutoencoderTinyBlock | Block):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
