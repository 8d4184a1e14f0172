"""The denoiser of an editor as the defenses get it: frozen, differentiable, without the pipeline around it.

A latent z is what the VAE's encoder gives (its mean), z_k what the diffusion works on at timestep k.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from utils import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from models.editors import Editor

# Of the image, at the noisiest timestep that counts. Stable Diffusion ends at .0047; where a schedule ends
# at 0, the noise that is found there is z_k itself, whatever the network says.
LEAST_SHARE = 0.004
CONVERSIONS = {  # prediction type -> the noise in z_k, from the network's output, with a = alphas_cumprod[k]
    "epsilon": lambda output, z_k, a: output,
    "v_prediction": lambda output, z_k, a: a.sqrt() * output + (1 - a).sqrt() * z_k,
}


class Denoiser:
    """Predicts the noise in z_k as an editor does that is shown an image; gradients go through z_k and z.

    Hides epsilon from v prediction, and where the image goes in: as channels beside z_k (InstructPix2Pix) or
    as what an edit begins with (img2img). Computes in the network's dtype, returns that of z_k.

    alphas_cumprod: (timesteps,); scaling: of z for the diffusion; first: the timestep where an edit begins.
    Raises UserError for an editor that works in another way.
    """

    need: ClassVar[str] = "editor"  # what defenses call it

    def __init__(self, editor: Editor, checkpointing: bool = False) -> None:
        pipeline = self.pipeline = editor.pipeline
        unet, channels = pipeline.unet, pipeline.vae.config.latent_channels
        self.convert = CONVERSIONS.get(pipeline.scheduler.config.get("prediction_type"))
        if (
            self.convert is None
            or unet.config.in_channels not in (channels, 2 * channels)
            or unet.config.addition_embed_type is not None
            or unet.config.encoder_hid_dim_type is not None
        ):
            kind = type(pipeline).__name__
            text = "this method works on InstructPix2Pix's and Stable Diffusion 1's and 2's denoisers alone"
            raise UserError(f"{kind}: {text}; another --model, or a method without a denoiser")
        if checkpointing:
            unet.enable_gradient_checkpointing()
        self.unet, self.shown = unet, unet.config.in_channels == 2 * channels
        shares = pipeline.scheduler.alphas_cumprod  # they fall
        self.alphas_cumprod: Tensor = shares[shares >= LEAST_SHARE].to(unet.device)
        self.scaling: float = pipeline.vae.config.scaling_factor
        share = 1 if self.shown else type(editor).knobs.get("strength", 1)  # a default, not a setting
        self.first = round(len(self.alphas_cumprod) * share) - 1

    def predict_noise(self, z_k: Tensor, k: int | Tensor, z: Tensor) -> Tensor:
        """Predicts the noise in z_k (B, C, h, w) at k, an int or (B,), shown z and no words -> like z_k."""
        import torch

        given = torch.cat([z_k, z], dim=1) if self.shown else z_k
        words = self._words.expand(len(z_k), -1, -1)
        steps = torch.as_tensor(k, device=z_k.device).expand(len(z_k))
        output = self.unet(given.to(self.unet.dtype), steps, encoder_hidden_states=words).sample
        return self.convert(output.to(z_k.dtype), z_k, self._share(k, z_k))

    def noised(self, z: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
        """Noises z as the diffusion does: z_k = sqrt(a_k) s z + sqrt(1 - a_k) noise"""
        a = self._share(k, z)
        return a.sqrt() * self.scaling * z + (1 - a).sqrt() * noise

    def begin(self, z: Tensor, noise: Tensor) -> Tensor:
        """Gives what an edit begins with at `first`: noise, or, if the image isn't shown, z with noise."""
        return noise if self.shown else self.noised(z, self.first, noise)

    def edit(self, z: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Edits without words by DDIM (Song et al. 2021, eta = 0), from `first` to 0 -> a latent like z."""
        return self._back(self.begin(z, noise), self.first, z, steps)

    def again(self, z: Tensor, noise: Tensor, share: float, steps: int) -> Tensor:
        """Noises z to a share of the timesteps and denoises it without words, as `edit` -> like z."""
        k = round(len(self.alphas_cumprod) * share) - 1
        return self._back(self.noised(z, k, noise), k, z, steps)

    def _back(self, z_k: Tensor, first: int, z: Tensor, steps: int) -> Tensor:
        """Denoises z_k from timestep `first` to 0 -> a latent like z."""
        ks = [first * left // steps for left in range(steps, 0, -1)]
        shares = [*(self._share(k, z) for k in ks), z.new_ones(1)]
        for k, a, after in zip(ks, shares, shares[1:], strict=False):
            found = self.predict_noise(z_k, k, z)
            clean = (z_k - (1 - a).sqrt() * found) / a.sqrt()
            z_k = after.sqrt() * clean + (1 - after).sqrt() * found
        return z_k / self.scaling

    def _share(self, k: int | Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at k, to be multiplied with latents."""
        return self.alphas_cumprod[k].to(like).reshape(-1, 1, 1, 1)

    @functools.cached_property
    def _words(self) -> Tensor:
        """The empty prompt as the pipelines encode it, (1, tokens, D)."""
        import torch

        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        most = tokenizer.model_max_length
        found = tokenizer("", padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return encoder(found.input_ids.to(encoder.device))[0]
