"""The editors, one class each.

An editor has no safety checker: a checker that blanks an edit would be counted as protection. To add one,
write its class, enter it in EDITORS, and give its hub id to a set of config.py.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from images import from_working, resize, to_uint8, to_working, working_size
from models.attention import Attention, Flux2Attention
from models.denoiser import Denoiser
from models.loading import check_tokenizer, from_hub, hub_way, load_network, loading
from models.vaes import load_vae
from utils import UserError, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Editor:
    """An instruction-following editor: tensors in [-1, 1] and instructions in, edited tensors out.

    A subclass names its diffusers pipeline and what that takes; the rest is common to Stable Diffusion's.
    """

    pipeline_class: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {  # of its from_pretrained; None: a part that isn't loaded
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }
    scheduler: ClassVar[str | None] = "EulerAncestralDiscreteScheduler"  # None: the checkpoint's own
    resolution: ClassVar[int] = 512  # px, long side of what it works on
    multiple: ClassVar[int] = 8  # px; its sides must be multiples of it
    half: ClassVar[str] = "fp16"  # the 16 bits that its networks were made for
    fp32_vae: ClassVar[bool] = False  # whether its VAE overflows in float16
    tokenizer: ClassVar[tuple[str, float]] = ("tokenizer", math.inf)  # and the tokens that its pipeline takes
    knobs: ClassVar[dict[str, float]] = {}  # keywords of the pipeline's call, with their defaults
    tiny_vae: ClassVar[str | None] = None  # hub id of an autoencoder that was distilled from its own
    by_words: ClassVar[bool] = True  # whether it takes instructions and seeds
    denoiser: ClassVar[type[Denoiser | Attention] | None] = Denoiser  # as defenses see it, if they can

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        """Refuses settings that the pipeline can't work with. Raises UserError."""

    working_size = staticmethod(working_size)  # at which an image (H, W) is seen, before padding
    from_working = staticmethod(from_working)  # undoes `to_working`

    @classmethod
    def to_working(cls, images: Tensor, resolution: int) -> Tensor:
        """Brings (B, 3, H, W) in [-1, 1] to what the editor takes; differentiable. Raises UserError."""
        return to_working(images, resolution, cls.multiple)

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

        working = self.to_working(images, self.resolution)
        for prompt in prompts:
            _warn_if_cut(self.pipeline, prompt, *self.tokenizer)
        with torch.no_grad():
            edited = self.edit(working, list(prompts), [torch.Generator().manual_seed(seed) for _ in prompts])
        return self._finished(edited * 2 - 1, images)

    def _finished(self, edited: Tensor, images: Tensor) -> Tensor:
        """Brings edits in [-1, 1] from the working size to that of the images. Raises UserError for NaN."""
        if not edited.isfinite().all():  # as a file it would be black, and count as protection
            hint = "; try --dtype fp32" if edited.dtype.itemsize == 2 else ""
            raise UserError(f"the edit has NaN or infinite pixels{hint}")
        return self.from_working(edited.float().to(images.device), images.shape[-2:], self.resolution)

    def edit(self, images: Tensor, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """Edits images at the working size, (B, 3, h, w) in [-1, 1] -> the same in [0, 1]."""
        return self.pipeline(
            prompt=prompts,
            image=(images + 1) / 2,  # diffusers takes and gives tensors in [0, 1]
            generator=generators,
            output_type="pt",
            **self.more(*images.shape[-2:]),
        ).images

    def more(self, height: int, width: int) -> dict[str, Any]:
        """Gives the call's other keywords: the knobs, and what an image of this size needs."""
        return self.knobs


class InstructPix2Pix(Editor):
    """InstructPix2Pix (Brooks et al. 2023) and what is trained like it: MagicBrush, HQ-Edit."""

    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    tiny_vae = "madebyollin/taesd"
    knobs: ClassVar = {"num_inference_steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}


class StableDiffusion(Editor):
    """Stable Diffusion's img2img (Meng et al. 2022, Rombach et al. 2022)."""

    pipeline_class = "StableDiffusionImg2ImgPipeline"
    tiny_vae = "madebyollin/taesd"
    knobs: ClassVar = {"num_inference_steps": 100, "guidance_scale": 7.5, "strength": 0.5}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        steps, strength = settings["num_inference_steps"], settings["strength"]
        if steps * strength < 1:
            raise UserError(f"{steps} steps at strength {strength:g} are less than one")


class SDXLInstructPix2Pix(Editor):
    """InstructPix2Pix on Stable Diffusion XL (Podell et al. 2023), with the pipeline's defaults."""

    pipeline_class = "StableDiffusionXLInstructPix2PixPipeline"
    tiny_vae = "madebyollin/taesdxl"
    options: ClassVar = {"add_watermarker": False}  # else edits depend on what else is installed
    scheduler = None
    denoiser = None
    resolution = 768
    fp32_vae = True
    knobs: ClassVar = {"num_inference_steps": 100, "guidance_scale": 5.0, "image_guidance_scale": 1.5}

    def more(self, height: int, width: int) -> dict[str, Any]:
        return {**self.knobs, "height": height, "width": width}


class TokenEditor(Editor):
    """What is common to editors that read the image as tokens beside those they denoise.

    They work at an area: `resolution` is the side of the square that has it. An image is resized to about
    that in its own shape and handed over alone, as the 8-bit pixels that these pipelines take.
    """

    options: ClassVar = {}
    scheduler = None
    denoiser = None
    resolution = 1024
    multiple = 16
    half = "bf16"
    enlarges: ClassVar[bool] = True  # whether smaller images are enlarged

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.is_unguided() and self.knobs["guidance_scale"] > 1:
            warn("--guidance_scale is ignored: this editor was distilled to work without")

    def is_unguided(self) -> bool:
        """Tells whether the pipeline would ignore its guidance."""
        return False

    @classmethod
    def working_size(cls, size: Sequence[int], resolution: int) -> tuple[int, int]:
        scale = resolution / math.sqrt(size[0] * size[1])
        if not cls.enlarges:
            scale = min(scale, 1)
        fit = round if cls.enlarges else math.floor  # what is over the area would be reduced once more
        height, width = (max(1, fit(side * scale / cls.multiple)) * cls.multiple for side in size)
        return height, width

    @classmethod
    def to_working(cls, images: Tensor, resolution: int) -> Tensor:
        return resize(images, cls.working_size(images.shape[-2:], resolution))

    @classmethod
    def from_working(cls, images: Tensor, size: Sequence[int], resolution: int) -> Tensor:
        return resize(images, size)

    def edit(self, images: Tensor, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        import torch
        from PIL import Image

        height, width = images.shape[-2:]
        how = {"height": height, "width": width, "output_type": "pt", **self.more(height, width)}
        edited = []
        for pixels, prompt, generator in zip(to_uint8(images), prompts, generators, strict=True):
            picture = Image.fromarray(pixels)
            edited.append(self.pipeline(image=picture, prompt=prompt, generator=generator, **how).images)
        return torch.cat(edited)


class FluxKontext(TokenEditor):
    """FLUX.1 Kontext [dev] (Black Forest Labs 2025), with the guidance of diffusers' example.

    An image takes the nearest in shape of the 17 sizes for which it was trained.
    """

    pipeline_class = "FluxKontextPipeline"
    tiny_vae = "madebyollin/taef1"
    denoiser = Attention
    tokenizer = ("tokenizer_2", 512)  # the other one's gives no more than a summary
    knobs: ClassVar = {"num_inference_steps": 28, "guidance_scale": 2.5}

    @classmethod
    def working_size(cls, size: Sequence[int], resolution: int) -> tuple[int, int]:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        shape = size[1] / size[0]
        width, height = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda one: abs(shape - one[0] / one[1]))
        step = cls.multiple * cls.resolution / resolution  # px of those sizes
        return max(1, round(height / step)) * cls.multiple, max(1, round(width / step)) * cls.multiple

    def is_unguided(self) -> bool:
        return not self.pipeline.transformer.config.guidance_embeds

    def more(self, height: int, width: int) -> dict[str, Any]:
        length = min(512, self.pipeline.tokenizer_2.model_max_length)
        how = {"max_area": height * width, "_auto_resize": False, "max_sequence_length": length}
        return {**self.knobs, **how}


class Flux2Klein(TokenEditor):
    """FLUX.2 [klein] (Black Forest Labs 2026): four steps and no guidance, for which it was distilled."""

    pipeline_class = "Flux2KleinPipeline"
    tiny_vae = "madebyollin/taef2"
    denoiser = Flux2Attention
    tokenizer = ("tokenizer", 512)
    enlarges = False
    knobs: ClassVar = {"num_inference_steps": 4, "guidance_scale": 1.0}

    @classmethod
    def check(cls, settings: dict[str, Any]) -> None:
        if settings["resolution"] > cls.resolution:
            raise UserError(f"--resolution: over {cls.resolution}, its pipeline would reduce images again")

    @classmethod
    def working_size(cls, size: Sequence[int], resolution: int) -> tuple[int, int]:
        height, width = super().working_size(size, resolution)
        if min(height, width) < 64 or max(height, width) > 8 * min(height, width):
            raise UserError(f"an image worked on at {width}x{height}: under 64 px, or over 8:1, is refused")
        return height, width

    def is_unguided(self) -> bool:
        return self.pipeline.config.is_distilled


class QwenImageEdit(TokenEditor):
    """Qwen-Image-Edit (Qwen team 2025), with the pipeline's defaults; its text encoder sees images, too."""

    pipeline_class = "QwenImageEditPlusPipeline"
    multiple = 32
    knobs: ClassVar = {"num_inference_steps": 50, "guidance_scale": 4.0}

    def more(self, height: int, width: int) -> dict[str, Any]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

        pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = height * width  # else it resizes images
        guidance = self.knobs["guidance_scale"]
        negative = " " if guidance > 1 else None  # without one, there is no guidance
        steps = self.knobs["num_inference_steps"]
        return {"num_inference_steps": steps, "true_cfg_scale": guidance, "negative_prompt": negative}


class RoundTrip(Editor):
    """The round trip D(E(x)) through an autoencoder alone, which every edit in its latent space includes.

    No words, no seed. The model is the autoencoder: an editor's, a tiny one, or your own.
    """

    pipeline_class = ""
    tiny_vae = "madebyollin/taef2"  # the newest, and the one that photos were measured with here
    by_words = False
    denoiser = None
    scheduler = None
    multiple = 16  # FLUX.2's takes no other; those with 8 take it, too
    half = "fp32"

    def __init__(
        self, model_id: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype, *_: Any
    ) -> None:
        self.resolution, self.device = settings["resolution"], device
        self.vae = load_vae(type(self), model_id, self.resolution, device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
        return self._finished(self.vae.round_trip(images.to(self.device)), images)


EDITORS: dict[str, type[Editor]] = {
    "instruct-pix2pix": InstructPix2Pix,
    "stable-diffusion": StableDiffusion,
    "sdxl-instruct-pix2pix": SDXLInstructPix2Pix,
    "flux-kontext": FluxKontext,
    "flux2-klein": Flux2Klein,
    "qwen-image-edit": QwenImageEdit,
    "round-trip": RoundTrip,
}
DENOISERS = {one.denoiser.need for one in EDITORS.values() if one.denoiser}  # what defenses need of them


@functools.cache
def _warn_if_cut(pipeline: Any, prompt: str, name: str, most: float) -> None:
    """Warns once of an instruction that is longer than its encoder reads."""
    tokenizer = getattr(pipeline, name)
    n_tokens, most = len(tokenizer(prompt).input_ids), min(most, tokenizer.model_max_length)
    if n_tokens > most:
        warn(f"the editor reads {most} tokens; the last {n_tokens - most} are cut: {prompt!r}")


def unload() -> int:
    """Drops the loaded pipelines, to make room for another -> exit status."""
    _warn_if_cut.cache_clear()
    _load_pipeline.cache_clear()
    gc.collect()  # some networks refer to themselves
    return 0


@functools.cache
def _load_pipeline(
    editor: type[Editor], model_id: str, scheduler: str | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """An editor's pipeline of frozen networks, with the scheduler asked for."""
    import diffusers

    with loading("the editor", model_id, hub_way(model_id)):
        name, where = from_hub(model_id)
        kind = getattr(diffusers, editor.pipeline_class)
        index = kind.load_config(name, **where).items()  # part -> [library, class], and more
        classes = {part: entry[1] for part, entry in index if isinstance(entry, list | tuple)}
        networks = {
            part: load_network(str(class_name), name, where, part, device, dtype)
            for part, class_name in classes.items()
            if part not in editor.options
        }
        networks = {part: network for part, network in networks.items() if network is not None}
        pipeline = kind.from_pretrained(name, **editor.options, **networks, **where)
        for part in classes:
            if part.startswith("tokenizer"):
                check_tokenizer(getattr(pipeline, part))
        if scheduler is not None:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    return pipeline
