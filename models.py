"""The model sets, and how each member is loaded: editor, its VAE alone, recogniser, judge, LPIPS, CLIP.

A member is a hub id, a name that its library knows, or a local directory or file. Nothing is downloaded but
what the set or a flag names; nothing from a hub is executed; pickles are read with `weights_only=True`.
Heavy imports are inside the functions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import (
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPE_NAMES,
    EDITOR_NAMES,
    UserError,
    first_line,
    from_working,
    memory_format,
    pick_device,
    pick_dtype,
    positive_int,
    to_working,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parent
MINI = ROOT / "assets" / "mini"

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 outside


@dataclass(frozen=True)
class ModelSet:
    """The members that belong together, and the defaults that the editor was made for."""

    name: str
    editors: dict[str, str]  # one of EDITOR_NAMES -> model id
    recognizer: str  # what the attack sees
    judge: str  # a recogniser that no attack ever sees
    perceptual: str
    clip: str
    scheduler: str | None  # a diffusers scheduler class, or None for the editor's own
    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float
    strength: float  # of img2img
    resolution: int  # px, long side of what the editor works on
    detect_faces: bool  # MTCNN finds the face; else the box is the whole image
    only_size: int | None = None  # px; the one portrait size that the models were made for


MODEL_SETS = {
    "full": ModelSet(
        name="full",
        editors={
            "instruct-pix2pix": "timbrooks/instruct-pix2pix",
            "stable-diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        },
        recognizer="vggface2",
        judge="casia-webface",
        perceptual="vgg",
        clip="openai/clip-vit-base-patch32",
        scheduler="EulerAncestralDiscreteScheduler",
        num_inference_steps=100,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        strength=0.5,
        resolution=512,
        detect_faces=True,
    ),
    "mini": ModelSet(
        name="mini",
        editors={"instruct-pix2pix": str(MINI / "editor")},
        recognizer=str(MINI / "recognizer"),
        judge=str(MINI / "judge"),
        perceptual=str(MINI / "perceptual"),
        clip=str(MINI / "clip"),
        scheduler=None,
        num_inference_steps=20,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        strength=0.5,
        resolution=128,
        detect_faces=False,
        only_size=128,
    ),
}

# facenet-pytorch's two trainings of InceptionResnetV1 (its release v2.2.9)
FACENET_URLS = {
    "vggface2": "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
    "20180402-114759-vggface2.pt",
    "casia-webface": "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
    "20180408-102900-casia-webface.pt",
}
FACENET_CROP = 160  # px
FACENET_SCALE = 127.5 / 128  # facenet's fixed standardisation (v - 127.5) / 128, for values in [-1, 1]
LPIPS_TRUNKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # lpips name -> torchvision's
HUB_HELP = "hub id (ID@REVISION for a fixed one) or local directory"
DETECTION_SIDE = 1024  # px; larger photos are reduced to it before MTCNN looks at them


# ---------------------------------------------------------------------------------------------------------
# flags


def set_help(text: str, field: str) -> str:
    """A flag's help with the value that each model set has for it, in place of the default None."""
    values = ", ".join(f"{name}: {getattr(models, field)}" for name, models in MODEL_SETS.items())
    return f"{text} (default: {values})"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--models, --device, --dtype and --debug: what every script that loads a model has."""
    parser.add_argument(
        "--models",
        choices=tuple(MODEL_SETS),
        default="full",
        help="full: the paper's models; mini: the bundled stand-ins, for 128x128 synthetic portraits",
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="auto", help=DTYPE_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_editor_arguments(parser: argparse.ArgumentParser) -> None:
    """--model (or, as the authors' batch scripts call it, --target_model), --model_id and --resolution."""
    parser.add_argument(
        "--model",
        "--target_model",
        dest="model",
        choices=EDITOR_NAMES,
        default=EDITOR_NAMES[0],
        help="kind of editor: instruct-pix2pix, or stable-diffusion's img2img",
    )
    ids = "; ".join(
        f"{name}: {', '.join(shown(model_id) for model_id in models.editors.values())}"
        for name, models in MODEL_SETS.items()
    )
    parser.add_argument("--model_id", help=f"{HUB_HELP} of the editor (default: {ids})")
    parser.add_argument(
        "--resolution",
        type=positive_int,
        help=set_help("long side in px at which the editor works; larger images are reduced", "resolution"),
    )


def add_face_arguments(parser: argparse.ArgumentParser) -> None:
    """--recognizer and --judge."""
    for field, what in (
        ("recognizer", "face recogniser that the attack sees"),
        ("judge", "face recogniser that no attack sees"),
    ):
        parser.add_argument(
            f"--{field}",
            help=f"{what}: {', '.join(FACENET_URLS)}, a facenet-pytorch state dict, or a local transformers "
            f"directory (default: {_members(field)})",
        )


def add_perceptual_argument(parser: argparse.ArgumentParser) -> None:
    """--lpips"""
    parser.add_argument(
        "--lpips",
        help=f"perceptual distance: {', '.join(LPIPS_TRUNKS)}, or a local directory "
        f"(default: {_members('perceptual')})",
    )


def add_clip_argument(parser: argparse.ArgumentParser) -> None:
    """--clip_id"""
    parser.add_argument(
        "--clip_id",
        dest="clip",
        help=f"{HUB_HELP} of a transformers CLIP (default: {_members('clip')})",
    )


def _members(field: str) -> str:
    """What each model set has for it, as --help shows it."""
    return ", ".join(f"{name}: {shown(getattr(models, field))}" for name, models in MODEL_SETS.items())


def shown(member: str) -> str:
    """A bundled model's path relative to the repository, as it is written in --help."""
    path = Path(member)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else member


def choose(args: argparse.Namespace) -> ModelSet:
    """The set that --models names, with the members and values that other flags replace.

    Raises UserError if the set has no editor of the kind asked for.
    """
    models = MODEL_SETS[args.models]
    given = vars(args)
    changes = {
        field.name: given[flag]
        for field in dataclasses.fields(ModelSet)
        if given.get(flag := "lpips" if field.name == "perceptual" else field.name) is not None
    }
    kind = given.get("model")
    if kind is not None:
        if given.get("model_id"):
            changes["editors"] = {**models.editors, kind: given["model_id"]}
        elif kind not in models.editors:
            raise UserError(f"the {models.name} models have no {kind} editor; it comes with --models full")
    return dataclasses.replace(models, **changes)


def set_up(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Quiets the model libraries; --device and --dtype -> where the networks run and in what."""
    quiet()
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, device)


def size_warning(models: ModelSet, size: Sequence[int]) -> str | None:
    """A sentence for the person if the set's models were not made for an image of this (H, W)."""
    if models.only_size is None or tuple(size) == (models.only_size, models.only_size):
        return None
    side = models.only_size
    return (
        f"warning: the {models.name} models were made for {side}x{side} synthetic portraits, not for a "
        f"{size[1]}x{size[0]} image: the result says nothing about how well a real photo is protected"
    )


# ---------------------------------------------------------------------------------------------------------
# loading


def quiet() -> None:
    """Warnings and loading bars of the libraries don't belong between a script's few lines;
    downloads show.
    """
    import logging
    import warnings

    import diffusers
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    # of lpips' call
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models._utils")


@contextlib.contextmanager
def _loading(what: str, member: str) -> Iterator[None]:
    """Turns whatever a library raises for weights that can't be had into one clear line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, HTTP errors, KeyError of a wrong state dict, unpickling errors...
        raise UserError(
            f"{what} '{shown(member)}' can't be loaded ({first_line(error)}); "
            "the bundled --models mini work offline"
        ) from None


def _from_hub(member: str) -> tuple[str, dict[str, Any]]:
    """A hub id, or ID@REVISION, or a local directory -> what `from_pretrained` wants: name and keywords.

    Asking the hub once first makes a missing network or a wrong id an error at once, not after the libraries'
    five retries; without a network, what an earlier run has downloaded is used.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    if Path(member).is_dir():
        return member, {"local_files_only": True}
    if Path(member).is_absolute() or member.startswith(".") or member.count("/") > 1:
        raise FileNotFoundError("no such directory")
    name, _, revision = member.partition("@")
    fixed = {"revision": revision} if revision else {}
    try:
        HfApi().model_info(name, timeout=10, **fixed)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # a gated one is among them
        raise
    except Exception as error:  # no connection, a hub out of order, or HF_HUB_OFFLINE
        if not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).exists():
            reason = f"the hub can't be reached, {first_line(error)}, and it is not in the local cache"
            raise ConnectionError(reason) from None
        fixed["local_files_only"] = True
    return name, fixed


def _frozen(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A network for inference: no dropout, no gradients for its parameters."""
    network = network.to(device=device, dtype=dtype, memory_format=memory_format(device))
    return network.eval().requires_grad_(False)


class WorkingVAE:
    """The VAE as the defenses get it: images of any size go in, and are first brought to the working size.

    `encode` applies `utils.to_working`, the very function the edit scripts apply before the editor, so what
    is optimised is what the editor will see. Casts images and latents to the network's dtype.
    """

    def __init__(self, vae: Any, resolution: int) -> None:
        self.vae = vae
        self.resolution = resolution

    def encode(self, images: Tensor) -> Any:
        """(B, 3, H, W) in [-1, 1] -> diffusers' encoder output at the working size."""
        return self.vae.encode(to_working(images, self.resolution).to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Any:
        """Latents -> diffusers' decoder output at the working size, with its padding."""
        return self.vae.decode(latents.to(self.vae.dtype))


def load_vae(
    models: ModelSet, kind: str, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False
) -> WorkingVAE:
    """The editor's autoencoder alone, from its `vae` folder: all that a defense needs. Raises UserError.

    checkpointing: whether a gradient computes activations again instead of keeping them.
    """
    from diffusers import AutoencoderKL

    member = models.editors[kind]
    with _loading("the VAE of", member):
        name, where = _from_hub(member)
        vae = AutoencoderKL.from_pretrained(
            name, subfolder="vae", dtype=dtype, device_map={"": device}, **where
        )
    if checkpointing:
        _checkpoint(vae)
    return WorkingVAE(_frozen(vae, device, dtype), models.resolution)


def _checkpoint(vae: Any) -> None:
    """Gradient checkpointing in two levels: diffusers' own, by blocks, and within them by residual blocks.

    The outermost block at 1024x1024 alone would take some 20 GB while its activations are computed again.
    """
    import functools

    from diffusers.models.resnet import ResnetBlock2D
    from torch.utils.checkpoint import checkpoint

    vae.enable_gradient_checkpointing()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


class _EncodeOnce:
    """A VAE's `encode` that keeps the latents of the last batch: a portrait has many instructions.

    Each image is encoded alone, so its latent depends on nothing that was encoded before.
    """

    def __init__(self, encode: Callable[[Tensor], Any]) -> None:
        self.encode = encode
        self.known: dict[bytes, Tensor] = {}  # by the image's bytes: mean and log variance, (1, 2C, h, w)

    def __call__(self, images: Tensor) -> Any:
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        keys = [hashlib.sha256(image.cpu().view(torch.uint8).numpy()).digest() for image in images]
        self.known = {key: self.known[key] for key in keys if key in self.known}
        for key, image in zip(keys, images, strict=True):
            if key not in self.known:
                self.known[key] = self.encode(image[None]).latent_dist.parameters
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([self.known[key] for key in keys])))


class Editor:
    """An instruction-following editor: tensors in [-1, 1] and instructions in, edited tensors out.

    Each instruction is embedded once, and each portrait encoded once for the instructions that follow.
    """

    def __init__(self, pipeline: Any, models: ModelSet, kind: str) -> None:
        self.pipeline = pipeline
        self.models = models
        self.kind = kind  # one of EDITOR_NAMES
        self.texts: dict[str, Tensor] = {}  # (1, tokens, D)
        pipeline.vae.encode = _EncodeOnce(pipeline.vae.encode)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Instructions as the UNet gets them -> (B, tokens, D); a longer one than it reads is cut."""
        import torch

        for text in texts:
            if text not in self.texts:
                tokens = self.pipeline.tokenizer(
                    text, padding="max_length", truncation=True, return_tensors="pt"
                )
                ids = tokens.input_ids.to(self.pipeline.device)
                self.texts[text] = self.pipeline.text_encoder(ids).last_hidden_state
        return torch.cat([self.texts[text] for text in texts])

    def __call__(self, images: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
        """Edits images (B, 3, H, W) in [-1, 1], each by its own instruction -> float32 (B, 3, H, W).

        The noise comes from a CPU generator seeded with `seed` afresh for each image, so it depends neither
        on the batch nor on the device.
        """
        import torch

        working = to_working(images, self.models.resolution)
        knobs: dict[str, Any] = {"guidance_scale": self.models.guidance_scale}
        if self.kind == "instruct-pix2pix":
            knobs["image_guidance_scale"] = self.models.image_guidance_scale
        else:
            knobs["strength"] = self.models.strength
        with torch.no_grad():
            edited = self.pipeline(
                prompt_embeds=self.embed(prompts),
                negative_prompt_embeds=self.embed([""] * len(prompts)),
                image=(working + 1) / 2,  # diffusers takes and gives tensors in [0, 1]
                num_inference_steps=self.models.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for _ in prompts],
                output_type="pt",
                **knobs,
            ).images
        if not edited.isfinite().all():  # as a file it would be black, and count as protection
            raise UserError("the edit has NaN or infinite pixels; try --dtype fp32")
        edited = (edited.float() * 2 - 1).to(images.device)
        return from_working(edited, images.shape[-2:], self.models.resolution)


def load_editor(
    models: ModelSet, kind: str, device: torch.device, dtype: torch.dtype, *, progress: bool
) -> Editor:
    """The whole editing pipeline of `kind` (one of EDITOR_NAMES), without a safety checker. Raises UserError.

    progress: whether diffusers shows its bar over the denoising steps.
    """
    import diffusers
    from transformers import CLIPTextModel

    member = models.editors[kind]
    networks = {
        "vae": diffusers.AutoencoderKL,
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
    }
    pipelines = {
        "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
        "stable-diffusion": "StableDiffusionImg2ImgPipeline",
    }
    with _loading("the editor", member):
        name, where = _from_hub(member)
        loaded = {  # each straight to its place; a pipeline's own device_map knows no "cuda:1"
            part: _frozen(
                network.from_pretrained(name, subfolder=part, dtype=dtype, device_map={"": device}, **where),
                device,
                dtype,
            )
            for part, network in networks.items()
        }
        # A checker that blanks an edit would be counted as protection, so there is none.
        pipeline = getattr(diffusers, pipelines[kind]).from_pretrained(
            name, safety_checker=None, requires_safety_checker=False, **loaded, **where
        )
        if models.scheduler is not None:
            scheduler = getattr(diffusers, models.scheduler)
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=not progress, desc="denoising", leave=False)
    return Editor(pipeline, models, kind)


# ---------------------------------------------------------------------------------------------------------
# faces


@dataclass
class Recognizer:
    """A face recogniser and how its crops are made: box, resize to `size`, (x - mean) / std."""

    name: str
    network: Callable[[Tensor], Tensor]  # (N, 3, size, size) -> (N, D)
    size: int  # px
    mean: Tensor  # (1, 3, 1, 1), in [-1, 1]
    std: Tensor
    dtype: torch.dtype

    def embed(self, images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
        """Unit embeddings of all boxes of all images, image by image -> float (sum of boxes, D).

        images: (B, 3, H, W) in [-1, 1], boxes in its pixels. Crops are resized with antialias;
        differentiable.
        """
        import torch
        import torch.nn.functional as F

        crops = []
        for image, faces in zip(images, boxes, strict=True):
            for x0, y0, x1, y1 in faces:
                crop = image[None, :, y0:y1, x0:x1]
                if crop.shape[-2:] != (self.size, self.size):
                    crop = F.interpolate(
                        crop,
                        size=(self.size, self.size),
                        mode="bilinear",
                        antialias=True,
                        align_corners=False,
                    )
                crops.append(crop)
        batch = torch.cat(crops)  # (N, 3, size, size)
        batch = (batch - self.mean.to(batch)) / self.std.to(batch)
        return F.normalize(self.network(batch.to(self.dtype)).to(images.dtype), dim=1)


def face_similarity_to(
    recognizer: Recognizer, clean: Tensor, boxes: Sequence[Sequence[Box]]
) -> Callable[[Tensor], Tensor]:
    """A function of images like `clean` (B, 3, H, W): the cosine similarity of their faces to its, (B,).

    Every image has at least one box; with several, the mean over them. The clean faces are embedded here,
    once.
    """
    import torch

    with torch.no_grad():
        reference = recognizer.embed(clean, boxes)  # (sum of boxes, D)
    counts = torch.tensor([len(faces) for faces in boxes])
    owner = torch.repeat_interleave(torch.arange(len(boxes)), counts).to(clean.device)

    def face_similarity(images: Tensor) -> Tensor:
        cosines = (recognizer.embed(images, boxes) * reference).sum(dim=1)  # (sum of boxes,)
        sums = torch.zeros(len(boxes), dtype=cosines.dtype, device=cosines.device)
        return sums.index_add(0, owner, cosines) / counts.to(cosines)

    return face_similarity


def load_recognizer(member: str, device: torch.device, dtype: torch.dtype) -> Recognizer:
    """A recogniser: a facenet-pytorch training by name, a state-dict file of one,
    or a transformers directory.

    The directory's `preprocessor_config.json` says what crops it wants (size: height; image_mean, image_std);
    its embedding is `pooler_output`.
    Raises UserError.
    """
    with _loading("the face recogniser", member):
        if member not in FACENET_URLS and Path(member).is_dir():
            return _transformers_recognizer(Path(member), device, dtype)
        import torch
        from facenet_pytorch import InceptionResnetV1

        state = _facenet_state(member)
        network = InceptionResnetV1(pretrained=None)
        # The classifier over the training identities is not part of the embedding.
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith("logits.")})
        return Recognizer(
            name=member,
            network=_frozen(network, device, dtype),
            size=FACENET_CROP,
            mean=torch.zeros(1, 3, 1, 1),
            std=torch.full((1, 3, 1, 1), 1 / FACENET_SCALE),
            dtype=dtype,
        )


def _facenet_state(member: str) -> dict[str, Tensor]:
    import torch

    if member in FACENET_URLS:
        return torch.hub.load_state_dict_from_url(
            FACENET_URLS[member], map_location="cpu", weights_only=True
        )
    if not Path(member).is_file():
        raise FileNotFoundError(f"neither a file, a directory nor one of {', '.join(FACENET_URLS)}")
    return _read_state(Path(member))


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a pickle that may hold nothing but tensors."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _transformers_recognizer(path: Path, device: torch.device, dtype: torch.dtype) -> Recognizer:
    import torch
    from transformers import AutoModel

    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    # transformers keeps the dtype of the file, float16, unless it is told
    network = AutoModel.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    network = _frozen(network, device, dtype)
    # of values in [0, 1]
    mean, std = (torch.tensor(preprocessor[key]) for key in ("image_mean", "image_std"))
    return Recognizer(
        name=path.name,
        network=lambda crops: network(crops).pooler_output.flatten(1),
        size=preprocessor["size"]["height"],
        mean=(2 * mean - 1).view(1, 3, 1, 1),
        std=(2 * std).view(1, 3, 1, 1),
        dtype=dtype,
    )


class FaceDetector:
    """Finds faces with MTCNN, whose weights come inside facenet-pytorch; or, in the mini world, doesn't.

    find: whether to look at all; if not, every image has one face, the whole of it.
    """

    def __init__(self, find: bool, device: torch.device) -> None:
        self.mtcnn = None
        if find:
            from facenet_pytorch import MTCNN

            self.mtcnn = MTCNN(keep_all=True, device=device)

    def __call__(self, pixels: np.ndarray) -> list[Box]:
        """Boxes in an image (H, W, 3) uint8, the largest first, cut to the image; margin 0."""
        from PIL import Image

        height, width = pixels.shape[:2]
        if self.mtcnn is None:
            return [(0, 0, width, height)]
        image = Image.fromarray(pixels)
        scale = max(1.0, max(width, height) / DETECTION_SIDE)
        if scale > 1:
            image = image.resize((round(width / scale), round(height / scale)), Image.Resampling.BILINEAR)
        if min(image.size) < self.mtcnn.min_face_size:  # no face fits, and its pyramid would be empty
            return []
        found, _ = self.mtcnn.detect(image)
        boxes = [] if found is None else [clip_box(box * scale, (height, width)) for box in found]
        return sorted((box for box in boxes if box), key=_area, reverse=True)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def clip_box(box: Sequence[float], size: Sequence[int]) -> Box | None:
    """A box in whole pixels inside an image of size (H, W), or None if nothing of it is inside."""
    height, width = size
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(width, int(box[2])), min(height, int(box[3]))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


# ---------------------------------------------------------------------------------------------------------
# perceptual distance


def perceptual_distance_to(network: Any, clean: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of images like `clean` (B, 3, H, W) in [-1, 1]: their LPIPS distance to it, (B,).

    The same as `network(images, clean)` of an lpips.LPIPS (Zhang et al. 2018), with the clean image's
    features computed here, once. The gradient is finite where a pixel's features are all zero, which lpips'
    isn't.
    """
    import torch

    dtype = next(network.net.parameters()).dtype

    def features(images: Tensor) -> list[Tensor]:
        unit = []
        for layer in network.net(network.scaling_layer(images.to(dtype))):
            layer = layer.float() if layer.dtype.itemsize == 2 else layer
            norm = (layer.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
            unit.append(layer / (norm + 1e-10))
        return unit

    with torch.no_grad():
        reference = features(clean)

    def perceptual_distance(images: Tensor) -> Tensor:
        total = torch.zeros(len(images), device=images.device, dtype=reference[0].dtype)
        for k, (layer, other) in enumerate(zip(features(images), reference, strict=True)):
            difference = (layer - other).square()  # (B, C, h, w)
            if network.lpips:
                difference = network.lins[k](difference.to(dtype)).to(total.dtype)
            total = total + difference.sum(dim=1).mean(dim=(1, 2))
        return total

    return perceptual_distance


def load_perceptual(member: str, device: torch.device, dtype: torch.dtype) -> Any:
    """An lpips.LPIPS: by trunk (vgg, alex, squeeze: ImageNet weights of torchvision, heads of lpips)
    or directory.

    The directory has `config.json` (the keywords net and lpips) and `model.safetensors`. Raises UserError.
    """
    import lpips

    with _loading("LPIPS", member):
        if member in LPIPS_TRUNKS:
            network = lpips.LPIPS(net=member, pnet_rand=True, verbose=False)
            network.net.load_state_dict(_trunk_state(member, network.net))
        elif Path(member).is_dir():
            config = json.loads((Path(member) / "config.json").read_text())
            network = lpips.LPIPS(
                net=config["net"], lpips=config["lpips"], pretrained=False, pnet_rand=True, verbose=False
            )
            network.load_state_dict(_read_state(Path(member) / "model.safetensors"))
        else:
            raise FileNotFoundError(f"neither a directory nor one of {', '.join(LPIPS_TRUNKS)}")
        return _frozen(network, device, dtype)


def _trunk_state(member: str, trunk: torch.nn.Module) -> dict[str, Tensor]:
    """torchvision's ImageNet weights under lpips' names: slice2.5.weight is features.5.weight there.

    lpips would load them itself, but without `weights_only`.
    """
    import torch
    import torchvision

    url = torchvision.models.get_model_weights(LPIPS_TRUNKS[member]).DEFAULT.url
    state = torch.hub.load_state_dict_from_url(
        url, map_location="cpu", weights_only=True, check_hash=True
    )
    return {key: state[re.sub(r"^slice\d+\.", "features.", key)] for key in trunk.state_dict()}


# ---------------------------------------------------------------------------------------------------------
# CLIP


class Clip:
    """A CLIP (Radford et al. 2021): images and texts -> their projected embeddings, not normalised."""

    def __init__(self, network: Any, processor: Any) -> None:
        self.network = network
        self.processor = processor

    def embed_images(self, images: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8, resized and standardised by CLIP's own processor -> float32 (B, D)."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        pixels = inputs["pixel_values"].to(self.network.device, self.network.dtype)
        with torch.no_grad():
            return self.network.get_image_features(pixel_values=pixels).pooler_output.float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """-> float32 (B, D); a text longer than CLIP reads is cut."""
        import torch

        tokens = self.processor.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            found = self.network.get_text_features(**tokens.to(self.network.device))
        return found.pooler_output.float()


def load_clip(member: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """A transformers CLIPModel with its processor, from a hub id or a local directory. Raises UserError."""
    from transformers import CLIPModel, CLIPProcessor

    with _loading("CLIP", member):
        name, where = _from_hub(member)
        network = CLIPModel.from_pretrained(name, dtype=dtype, **where)
        return Clip(_frozen(network, device, dtype), CLIPProcessor.from_pretrained(name, **where))
