"""The editors, a class each, and their autoencoders alone, which is all that most defenses need.

An editor has no safety checker: a checker that blanks an edit would be counted as protection. To add one,
write its class, enter it in EDITORS, and give its hub id to a set of sets.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from images import from_working, to_working
from models.loading import compiled, fp16_only, from_hub, frozen, loading
from utils import UserError, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Editor:
    """An instruction-following editor: tensors in [-1, 1] and instructions in, edited tensors out.

    A subclass names its diffusers pipeline and what that takes; the rest is common to Stable Diffusion's.
    """

    pipeline_class: ClassVar[str]
    networks: ClassVar[dict[str, str]] = {  # part -> its class, of diffusers or transformers
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
    }
    unused: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    scheduler: ClassVar[str | None] = "EulerAncestralDiscreteScheduler"  # None: the checkpoint's own
    resolution: ClassVar[int] = 512  # px, long side of what it works on
    multiple: ClassVar[int] = 8  # of whose px its sides must be
    knobs: ClassVar[dict[str, float]] = {}  # keywords of the pipeline's call, with their defaults

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        """Refuses settings that the pipeline can't work with. Raises UserError."""

    def __init__(
        self,
        model_id: str,
        settings: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        progress: bool = False,
    ) -> None:
        """Loads the pipeline. progress: whether diffusers shows its bar over the denoising steps.

        settings: the class's knobs, `resolution` and `scheduler`. Raises UserError.
        """
        self.resolution = settings["resolution"]
        self.knobs = {name: settings[name] for name in type(self).knobs}
        self.pipeline = _load_pipeline(type(self), model_id, settings["scheduler"], device, dtype)
        self.pipeline.set_progress_bar_config(disable=not progress, desc="denoising", leave=False)

    def __call__(self, images: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
        """Edits images (B, 3, H, W) in [-1, 1], each by its own instruction -> float32 (B, 3, H, W).

        The noise comes from a CPU generator seeded with `seed` afresh for each image, so it depends neither
        on the batch nor on the device. Raises UserError for an edit that is not finite.
        """
        import torch

        working = to_working(images, self.resolution, self.multiple)
        for prompt in prompts:
            _warn_if_cut(self.pipeline, prompt)
        with torch.no_grad():
            edited = self.pipeline(
                prompt=list(prompts),
                image=(working + 1) / 2,  # diffusers takes and gives tensors in [0, 1]
                generator=[torch.Generator().manual_seed(seed) for _ in prompts],
                output_type="pt",
                **self.knobs,
            ).images
        if not edited.isfinite().all():  # as a file it would be black, and count as protection
            hint = "" if edited.dtype == torch.float32 else "; try --dtype fp32"
            raise UserError(f"the edit has NaN or infinite pixels{hint}")
        edited = (edited.float() * 2 - 1).to(images.device)
        return from_working(edited, images.shape[-2:], self.resolution)


class InstructPix2Pix(Editor):
    """InstructPix2Pix (Brooks et al. 2023) and what is trained like it: MagicBrush, HQ-Edit."""

    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    knobs: ClassVar = {"num_inference_steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}


class StableDiffusion(Editor):
    """Stable Diffusion's img2img (Meng et al. 2022, Rombach et al. 2022)."""

    pipeline_class = "StableDiffusionImg2ImgPipeline"
    knobs: ClassVar = {"num_inference_steps": 100, "guidance_scale": 7.5, "strength": 0.5}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        steps, strength = settings["num_inference_steps"], settings["strength"]
        if steps * strength < 1:
            raise UserError(f"{steps} steps at strength {strength:g} are less than one")


EDITORS: dict[str, type[Editor]] = {"instruct-pix2pix": InstructPix2Pix, "stable-diffusion": StableDiffusion}


@functools.cache
def _warn_if_cut(pipeline: Any, prompt: str) -> None:
    """Says once that an instruction is longer than its encoder reads."""
    n_tokens, most = len(pipeline.tokenizer(prompt).input_ids), pipeline.tokenizer.model_max_length
    if n_tokens > most:
        warn(f"the editor reads {most} tokens; the last {n_tokens - most} are cut: {prompt!r}")


@functools.cache
def _load_pipeline(
    editor: type[Editor], model_id: str, scheduler: str | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """An editor's pipeline of frozen networks, with the scheduler asked for."""
    import diffusers

    with loading("the editor", model_id):
        name, where = from_hub(model_id)
        parts = dict.fromkeys(editor.unused) | _load_networks(editor.networks, name, where, device, dtype)
        pipeline = getattr(diffusers, editor.pipeline_class).from_pretrained(
            name, requires_safety_checker=False, **parts, **where
        )
        if scheduler is not None:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    return pipeline


def _load_networks(
    classes: dict[str, str], name: str, where: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Parts of a pipeline, each straight to its place; the pipeline's own device_map knows no "cuda:1"."""
    import diffusers
    import transformers

    variant, how = fp16_only(name, where), {"dtype": dtype, "device_map": {"": device}, **where}
    networks = {}
    for part, class_name in classes.items():
        network = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
        loaded = network.from_pretrained(name, subfolder=part, **variant.get(part, {}), **how)
        networks[part] = frozen(loaded, device, dtype)
    return networks


# ---------------------------------------------------------------------------------------------------------
# the autoencoder alone


class WorkingVAE:
    """The VAE as the defenses get it: images of any size go in, and are first brought to the working size.

    `encode` applies `images.to_working`, the very function that an editor applies, so what is optimised is
    what the editor will see. Casts images and latents to the network's dtype.
    """

    def __init__(self, vae: Any, resolution: int, multiple: int = 8) -> None:
        self.vae = vae
        self.resolution = resolution
        self.multiple = multiple

    def encode(self, images: Tensor) -> Any:
        """Encodes (B, 3, H, W) in [-1, 1] at the working size -> diffusers' encoder output."""
        working = to_working(images, self.resolution, self.multiple)
        return self.vae.encode(working.to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Any:
        """Decodes latents -> diffusers' decoder output at the working size, with its padding."""
        return self.vae.decode(latents.to(self.vae.dtype))


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

    checkpointing: a gradient computes activations again instead of keeping them. compile: with torch.compile.
    """
    with loading("the VAE of", model_id):
        networks = _load_networks({"vae": editor.networks["vae"]}, *from_hub(model_id), device, dtype)
        vae = networks["vae"]
    if checkpointing:
        _checkpoint(vae)
    if compile:
        compiled(vae.encoder)
        compiled(vae.decoder)
    return WorkingVAE(vae, resolution, editor.multiple)


def _checkpoint(vae: Any) -> None:
    """Gradient checkpointing in two levels: diffusers' own, by blocks, and within them by residual blocks.

    The outermost block at 1024x1024 alone would take some 20 GB while its activations are computed again.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from torch.utils.checkpoint import checkpoint

    vae.enable_gradient_checkpointing()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
