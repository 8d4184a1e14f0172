"""Tiny random models in the real libraries' formats: machinery for the tests, no claim about protection."""

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import lpips
import numpy as np
import torch
import transformers
from facenet_pytorch import InceptionResnetV1
from PIL import Image
from safetensors.torch import save_file

CPU, F32 = torch.device("cpu"), torch.float32
WIDTH = 8  # channels
TOKENS = 32  # of a prompt
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


UNET = {
    "sample_size": 8,
    "out_channels": 4,
    "block_out_channels": (WIDTH, WIDTH),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
LEVELS = {  # of an autoencoder
    "block_out_channels": (WIDTH,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def tiny_vae(dtype: torch.dtype = torch.float32, seed: int = 0) -> diffusers.AutoencoderKL:
    """Makes an AutoencoderKL of four levels (f=8) and 4 latent channels, frozen."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(**LEVELS, latent_channels=4)
    return vae.to(dtype).eval().requires_grad_(False)


def write_autoencoder(directory: Path, seed: int = 0) -> Path:
    """Writes an AutoencoderTiny in the layout of TAESD, 8 channels wide."""
    torch.manual_seed(seed)
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (WIDTH,) * 4)
    diffusers.AutoencoderTiny(**widths).save_pretrained(directory)
    return directory


def write_taef2(directory: Path, halves: bool = False, seed: int = 0) -> Path:
    """Writes random weights under TAEF2's keys: taef2.safetensors, or, numbered otherwise, two .pth files."""
    from models.tiny_vae import TAEF2

    torch.manual_seed(seed)
    state = TAEF2().state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    if not halves:
        save_file(state, directory / "taef2.safetensors")
        return directory
    for part, offset in (("encoder", 0), ("decoder", 1)):
        own = [key.split(".", 3)[2:] for key in state if key.startswith(part)]
        of_part = {f"{int(i) + offset}.{name}": state[f"{part}.layers.{i}.{name}"] for i, name in own}
        torch.save(of_part, directory / f"taef2_{part}.pth")
    return directory


def _unet(in_channels: int, seed: int) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**UNET, in_channels=in_channels, cross_attention_dim=WIDTH).eval()


def tiny_tokenizer() -> transformers.CLIPTokenizer:
    """Makes a CLIPTokenizer that spells: one token a letter, one a letter at a word's end."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def text_config(layers: int) -> transformers.CLIPTextConfig:
    """Makes the configuration of a text encoder for `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _text_encoder(seed: int) -> transformers.CLIPTextModel:
    torch.manual_seed(seed)
    return transformers.CLIPTextModel(text_config(layers=1)).eval()


def tiny_editor(
    shown: bool = True, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SimpleNamespace:
    """Makes what a Denoiser takes of an editor. shown: as channels (InstructPix2Pix), else img2img."""
    tokenizer = tiny_tokenizer()
    parts = {"vae": tiny_vae(seed=seed), "unet": _unet(8 if shown else 4, seed)}
    parts["text_encoder"] = _text_encoder(seed)
    for part in parts.values():
        part.to(dtype).requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(**SCHEDULE | {"prediction_type": prediction_type})
    kind = type("Img2Img", (SimpleNamespace,), {"knobs": {} if shown else {"strength": 0.5}})
    return kind(pipeline=SimpleNamespace(tokenizer=tokenizer, scheduler=scheduler, **parts))


def write_editor(directory: Path, seed: int = 0, shown: bool = True) -> Path:
    """Writes a complete InstructPix2Pix, or an img2img pipeline; its VAE is `tiny_vae(seed=seed)`."""
    kind = diffusers.StableDiffusionImg2ImgPipeline
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    if shown:
        kind = diffusers.StableDiffusionInstructPix2PixPipeline
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
    kind(
        vae=tiny_vae(seed=seed),
        text_encoder=_text_encoder(seed),
        tokenizer=tiny_tokenizer(),
        unet=_unet(8 if shown else 4, seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


def write_img2img(directory: Path, seed: int = 0) -> Path:
    """Writes a complete StableDiffusionImg2ImgPipeline, with a DDIM scheduler."""
    return write_editor(directory, seed, shown=False)


def write_recognizer(
    directory: Path, size: int = 32, mean: float = 0.5, std: float = 0.5, seed: int = 0, network: Any = None
) -> Path:
    """Writes a ResNetModel with its preprocessor_config.json."""
    torch.manual_seed(seed)
    shape = {"hidden_sizes": [WIDTH, 2 * WIDTH], "depths": [1, 1]}
    config = transformers.ResNetConfig(embedding_size=WIDTH, layer_type="basic", **shape)
    network = network or transformers.ResNetModel(config)
    network.eval().save_pretrained(directory)
    settings = {"size": {"height": size, "width": size}, "image_mean": [mean] * 3, "image_std": [std] * 3}
    settings["strangers_mean"] = 0.25
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def write_convnext(directory: Path, seed: int = 1, **how: Any) -> Path:
    """Writes a ConvNextModel with its preprocessor_config.json."""
    torch.manual_seed(seed)
    config = transformers.ConvNextConfig(hidden_sizes=[WIDTH, 2 * WIDTH], depths=[1, 1], num_stages=2)
    return write_recognizer(directory, network=transformers.ConvNextModel(config), **how)


def facenet_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes a random state dict as facenet-pytorch publishes them: InceptionResnetV1 with its classifier."""
    torch.manual_seed(seed)
    state = InceptionResnetV1(pretrained=None, classify=True, num_classes=3).state_dict()
    for value in state.values():
        if value.ndim == 4:
            # He's variance: signals that fade away layer by layer end in slow denormal numbers
            value *= 6**0.5
    return {key: value.contiguous() for key, value in state.items()}


def write_protector(
    directory: Path,
    editor: Path,
    method: str = "facelock-dim",
    kind: str = "unet",
    rms: float | None = None,
    seed: int = 0,
) -> Path:
    """Writes a network of `instant` for an editor's autoencoder, of one of models/protector.py's kinds."""
    from models.loading import recorded
    from models.protector import KINDS

    torch.manual_seed(seed)
    sizes = {
        "unet": {"channels": [WIDTH, 2 * WIDTH], "depths": [1, 1]},
        "universal": {"num_patterns": 2, "size": 16},
    }
    network = KINDS[kind](**sizes[kind])
    state = {name: 0.5 * torch.randn_like(values).half() for name, values in network.state_dict().items()}
    directory.mkdir(parents=True)
    save_file(state, directory / "model.safetensors")
    trained = {"method": method, "vae": [recorded(str(editor))], "rms": rms}
    config = {"network": {"kind": kind, **sizes[kind]}, "trained": trained}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_perceptual(directory: Path, heads: bool = False, seed: int = 0) -> Path:
    """Writes an LPIPS on a random SqueezeNet trunk; heads: with lpips' own linear heads."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    network = lpips.LPIPS(net="squeeze", lpips=heads, pnet_rand=True, pretrained=heads, verbose=False)
    state = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"net": "squeeze", "lpips": heads}))
    return directory


def forget() -> None:
    """Forgets what this process has loaded."""
    from models import clip, editors, loading, perceptual, protector, recognizers, vaes

    loaders = [vaes.load_vae, editors._load_pipeline, editors._warn_if_cut, recognizers.load_recognizer]
    loaders += [clip.load_clip, perceptual.load_perceptual, protector.load_protector, loading.recorded]
    for loader in loaders:  # without editors.unload's gc, which takes half a second each time
        loader.cache_clear()


def spoil(state: dict[str, torch.Tensor], change: str) -> None:
    """Takes something from the largest tensor of a file, or adds another: what must not be loaded."""
    name = max(state, key=lambda key: state[key].numel())
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["99.something"] = torch.zeros(3)
    elif change == "mismatched":
        state[name] = state[name].flatten()[:-1].clone()
    elif change == "nan":
        state[name].flatten()[7] = torch.nan


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draws noise (B, 3, H, W) in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def portrait(size: int | Iterable[int] = 64, seed: int = 0) -> np.ndarray:
    """Paints a smooth, head-like blob on a gradient, (H, W, 3) uint8; `size` is the side or (H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    skin, backdrop, tilt = (
        generator.uniform(90, 220, 3),
        generator.uniform(30, 200, 3),
        generator.uniform(-9, 9, 3),
    )
    image = backdrop + tilt * (x + y)[..., None] + generator.normal(0, 2, (height, width, 3))
    head = (x / 0.6) ** 2 + (y / 0.8) ** 2 < 1
    image[head] += skin - backdrop
    for eye in (-0.25, 0.25):
        image[(x - eye) ** 2 + (y + 0.2) ** 2 < 0.01] = 25
    return image.round().clip(0, 255).astype(np.uint8)


class WholeImage:
    """Stands in for FaceDetector, which rightly sees no face in these blobs: all of an image is one.

    A flat one shows none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
        height, width = pixels.shape[:2]
        return [(0, 0, width, height)] if np.ptp(pixels) else []

    def find(self, images: Sequence[np.ndarray]) -> list[list[tuple[int, int, int, int]]]:
        return [self(pixels) for pixels in images]


def write_portraits(directory: Path, n: int = 3, size: int | Iterable[int] = 64) -> list[Path]:
    """Writes n PNG files face0.png, face1.png..."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"face{number}.png" for number in range(n)]
    for number, path in enumerate(paths):
        Image.fromarray(portrait(size, seed=number)).save(path)
    return paths


NAMES = ("anna", "ben", "cleo")  # of the portraits that the evaluation is tested with
WEAK, STRONG = "facelock/budget_0.02", "facelock/budget_0.03"


def write(path: Path, pixels: np.ndarray) -> None:
    """Writes (H, W, 3) uint8, with the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def changed(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Moves all pixels `levels` away, without clipping."""
    return np.where(pixels > 127, pixels - levels, pixels + levels).astype(np.uint8)


def write_edits(world: Path, row: str, seed: int, levels: list[int]) -> None:
    """Writes the edits of NAMES in edits/ROW, so many levels away from their portraits."""
    for prompt in (0, 3):
        for number, (name, level) in enumerate(zip(NAMES, levels, strict=True)):
            place = world / "edits" / row / f"seed{seed}/prompt{prompt}/{name}.png"
            write(place, changed(portrait(32, seed=number), level + prompt * (level > 0)))


def write_protected(world: Path, weak: int, strong: int) -> None:
    """Writes NAMES in protected/WEAK and protected/STRONG, so many levels away from their portraits."""
    for row, level in ((WEAK, weak), (STRONG, strong)):
        for number, name in enumerate(NAMES):
            write(world / "protected" / row / f"{name}.png", changed(portrait(32, seed=number), level))


def bomb(width: int, height: int) -> bytes:
    """Makes a PNG of 70 bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b""), b"IEND"]
    parts = [struct.pack(">I", len(it) - 4) + it + struct.pack(">I", zlib.crc32(it)) for it in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
