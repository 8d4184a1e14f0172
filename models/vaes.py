"""The editors' autoencoders alone, which is all that most defenses need."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from models.editors import Editor
from models.loading import compiled, from_hub, load_networks, loading
from utils import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class WorkingVAE:
    """The VAE as the defenses get it: images of any size go in, and are first brought to the working size.

    `encode` applies the editor's `to_working`, so what is optimised is what the editor will see. Casts images
    and latents to the network's dtype.
    """

    def __init__(self, vae: Any, resolution: int, editor: type[Editor] = Editor) -> None:
        self.vae = vae
        self.resolution = resolution
        self.editor = editor

    def encode(self, images: Tensor) -> Any:
        """Encodes (B, 3, H, W) in [-1, 1] at the working size -> diffusers' encoder output."""
        working = self.editor.to_working(images, self.resolution)
        return self._encode(working.to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Any:
        """Decodes latents -> diffusers' decoder output at the working size, with its padding."""
        return self._decode(latents.to(self.vae.dtype))

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


VAES = {"AutoencoderKLFlux2": Flux2VAE, "AutoencoderKLQwenImage": QwenImageVAE}  # others need no adapter


def _posterior(mean: Tensor, logvar: Tensor) -> Any:
    """An encoder output as diffusers gives it."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))


@functools.cache
def load_vae(
    editor: type[Editor],
    model_id: str,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool = False,
    compile: bool = False,
) -> WorkingVAE:
    """Loads an editor's autoencoder alone, from its `vae` folder; once a process. Raises UserError.

    Its class is what its config names. checkpointing: a gradient computes activations again instead of
    keeping them. compile: with torch.compile.
    """
    import diffusers
    import torch

    if editor.fp32_vae and dtype == torch.float16:
        dtype = torch.float32
    with loading("the VAE of", model_id):
        name, where = from_hub(model_id)
        config = diffusers.AutoencoderKL.load_config(name, subfolder="vae", **where)
        kind = config.get("_class_name", "AutoencoderKL")
        networks = load_networks({"vae": kind}, name, where, device, dtype)
        if not networks:
            raise ValueError(f"no class {kind} in this version of diffusers")
        vae = networks["vae"]
    if checkpointing:
        _checkpoint(vae)
    if compile:
        compiled(vae.encoder)
        compiled(vae.decoder)
    return VAES.get(kind, WorkingVAE)(vae, resolution, editor)


def _checkpoint(vae: Any) -> None:
    """Gradient checkpointing in two levels: diffusers' own, by blocks, and within them by residual blocks.

    The outermost block at 1024x1024 alone would take some 20 GB while its activations are computed again.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from torch.utils.checkpoint import checkpoint

    if not vae._supports_gradient_checkpointing:
        raise UserError(f"--checkpointing: {type(vae).__name__} can't compute its activations again")
    vae.enable_gradient_checkpointing()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
