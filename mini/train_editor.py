"""Trains the mini editor (UNet and text encoder of an InstructPix2Pix pipeline) -> assets/mini/editor

Needs assets/mini/editor/vae (mini/train_vae.py). Latents are made once; a step takes about .6 s on two CPU
cores; a killed run resumes from its last checkpoint when started again:
    python mini/train_editor.py

Export and measure an unfinished training:
    python mini/train_editor.py --export_only

Train a finished editor further, on other people and mostly on its worst prompts:
    python mini/train_editor.py --start_from=assets/mini/editor --first=1500 --identities=2500 \
        --variations=1 --often 0 1 10 12 17 --noisy=0.5 --mask_weight=2 --lr=8e-4 --steps=7000 \
        --work=mini/checkpoints/further

The result is a plain diffusers directory:
    StableDiffusionInstructPix2PixPipeline.from_pretrained("assets/mini/editor")
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import portraits
import torch
import world
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizer import build_tokenizer
from torch import nn
from train_vae import CHANNELS, psnr, reconstruct
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from images import save_png, to_tensor, to_uint8
from models import editors
from utils import edit_prompts, pick_device, positive_int

NAME = "editor"
LATENT = (CHANNELS, 16, 16)  # of a 128x128 portrait
WIDTH = 128  # of the text embedding
DROPOUT = 0.05  # chance of each: no instruction, no image, neither (Brooks et al. 2023, section 3.2.1)
MASK_LEVEL = 8  # of 255: an edit's mask is where the generator's edit differs by more
OFTEN = 5  # the prompts of --often are drawn this many times as often as others
NOISY = 0.4  # --noisy draws from this noisiest share of the timesteps
EMPTY = len(edit_prompts)  # row of the empty instruction, after the 25 prompts


class Editor(nn.Module):
    """Holds what is trained: instruction -> text encoder -> UNet."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=LATENT[1],
            in_channels=2 * LATENT[0],  # the noisy edit and the source image
            out_channels=LATENT[0],
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            # At 4x4 only the middle block has attention; more there costs a fifth of the weights for little.
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # in diffusers the NUMBER of heads; with 32 a step takes 2.7 times as long
        )
        self.text_encoder = text_encoder(tokenizer)
        # The fused attention's backward pass is slow on CPUs: without it a step takes two thirds of the time.
        self.unet.set_attn_processor(AttnProcessor())

    def forward(
        self, noisy: torch.Tensor, image: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Predicts v, (B, 5, 16, 16). noisy, image: (B, 5, 16, 16); tokens: (B, 32)."""
        text = self.text_encoder(tokens)[0]  # (B, 32, 128)
        return self.unet(torch.cat([noisy, image], dim=1), timesteps, text).sample


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Makes an untrained text encoder of CLIP's structure."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Makes a scheduler with zero terminal SNR (Lin et al. 2023): sampling starts from pure noise.

    With it, v prediction and trailing steps, an edit's colours are right. With epsilon prediction they were
    not: low frequencies are decided at the noisiest steps, where the epsilon loss teaches least.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,  # the last step ends at the clean latent
    )


# ---------------------------------------------------------------------------------------------------------
# data


def requests(
    identities: range, edits: int, seed: int, variations: int = 2, often: Sequence[int] = ()
) -> list[world.Request]:
    """Lists each source picture, then `edits` different random edits of it. Prompts in `often` are OFTEN
    times as likely as others."""
    rng = np.random.default_rng(seed)
    chances = np.ones(len(edit_prompts))
    chances[list(often)] = OFTEN
    chances /= chances.sum()
    return [
        (identity, variation, prompt)
        for identity in identities
        for variation in range(variations)
        for prompt in [None, *rng.choice(len(chances), edits, replace=False, p=chances).tolist()]
    ]


@torch.no_grad()
def latents_of(wanted: list[world.Request], folder: Path, device: torch.device) -> torch.Tensor:
    """Encodes pictures as the pipelines do, by latent_dist.mode() -> float16 (N, C, 16, 16).

    Cached in mini/checkpoints/data under a hash of the generator's version, requests and autoencoder.
    """
    vae_file = folder / "diffusion_pytorch_model.safetensors"
    path = world.WORK / "data" / f"latents-{world.cache_key(wanted, vae_file.read_bytes())}.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    world.log(NAME, f"rendering and encoding {len(wanted)} pictures")
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    shape = (len(wanted), vae.config.latent_channels, *LATENT[1:])
    latents, batch = torch.empty(shape, dtype=torch.float16), []
    for row, pixels in enumerate(world.stream(wanted), 1):
        batch.append(pixels)
        if len(batch) == 32 or row == len(wanted):
            # bfloat16 halves the time; its error, a hundredth of a latent's std, doesn't hurt training
            with torch.autocast(device.type, dtype=torch.bfloat16):
                modes = vae.encode(to_tensor(np.stack(batch)).to(device)).latent_dist.mode()
            latents[row - len(batch) : row] = modes.half().cpu()
            batch = []
        if row % 5000 == 0:
            world.log(NAME, f"{row} of {len(wanted)} pictures encoded")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return latents.to(device)


def tokens_of(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Tokenizes the 25 instructions and the empty one, padded as the pipeline pads them -> (26, 32)."""
    texts = [*edit_prompts.values(), ""]
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


# ---------------------------------------------------------------------------------------------------------
# loss


def make_loss(
    latents: torch.Tensor, wanted: list[world.Request], tokens: torch.Tensor, args: argparse.Namespace
):
    """Makes the v loss, with more weight on the latent cells that the edit changes.

    There are no weights by noise level (min-SNR): they would give none to the pure noise that sampling starts
    from, and the edit is decided there, since it depends only on the source and the instruction.
    """
    device = latents.device
    group = args.edits + 1  # a source and its edits, see `requests`
    prompts = torch.tensor([EMPTY if prompt is None else prompt for _, _, prompt in wanted], device=device)
    tokens = tokens.to(device)
    scheduler = make_scheduler()
    last = scheduler.config.num_train_timesteps

    def loss_fn(editor: Editor, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        sources = torch.randint(len(latents) // group, (args.batch,), generator=generator) * group
        edits = sources + 1 + torch.randint(args.edits, (args.batch,), generator=generator)
        chance = torch.rand(args.batch, generator=generator)
        # An empty instruction asks for the unedited source, so that text guidance points towards the edit.
        no_text = (chance < DROPOUT) | ((chance >= 2 * DROPOUT) & (chance < 3 * DROPOUT))
        no_image = (chance >= DROPOUT) & (chance < 3 * DROPOUT)
        edits = torch.where(no_text, sources, edits)
        noise = torch.randn(args.batch, *LATENT, generator=generator).to(device)
        noisier = torch.rand(args.batch, generator=generator) < args.noisy
        timesteps = torch.randint(last, (args.batch,), generator=generator)
        timesteps = torch.where(noisier, (last - 1 - NOISY * timesteps).long(), timesteps).to(device)
        sources, edits, no_image = sources.to(device), edits.to(device), no_image.to(device)

        source, target = latents[sources].float(), latents[edits].float()  # (B, 5, 16, 16)
        changed = ((target - source).abs().mean(1, keepdim=True) / 0.5).clamp(max=1)  # (B, 1, 16, 16)
        weight = 1 + args.mask_weight * changed
        weight = weight / weight.mean()
        image = torch.where(no_image[:, None, None, None], torch.zeros_like(source), source)
        noisy = scheduler.add_noise(target, noise, timesteps)
        velocity = scheduler.get_velocity(target, noise, timesteps)
        error = (editor(noisy, image, timesteps, tokens[prompts[edits]]).float() - velocity).square()
        return {"loss": (weight * error).mean(), "plain": error.mean()}

    return loss_fn


# ---------------------------------------------------------------------------------------------------------
# export and evaluation


def load(editor: Editor, folder: Path) -> None:
    """Loads the weights of an exported editor, which has no optimizer state."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    editor.unet.load_state_dict(unet.state_dict())
    editor.text_encoder.load_state_dict(text_encoder.state_dict())


def export(editor: Editor, tokenizer: CLIPTokenizer, vae_folder: Path, out: Path) -> None:
    """Writes a plain diffusers directory in float16."""
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float16),
        text_encoder=editor.text_encoder.half(),
        tokenizer=tokenizer,
        unet=editor.unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    load_in_float32(out / "text_encoder")


def load_in_float32(folder: Path) -> None:
    """Makes transformers load a model in float32, as diffusers does; else a pipeline mixes two dtypes."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


@dataclass
class Edits:
    """Holds edits of N portraits by each of P prompts, and how close they are to the generator's own edits.

    `closer`: whether the edit is closer (MSE inside the mask) to the generator's edit than the source's
    reconstruction is; `outside`: PSNR to the source outside the mask; `whole`: PSNR to the generator's edit
    over the whole picture, dB. nan for a mask under 0.2 % or an outside under a tenth of the picture.
    """

    sources: np.ndarray  # (N, H, W, 3) uint8
    plain: np.ndarray  # (N, H, W, 3), the sources' reconstructions
    truth: np.ndarray  # (N, P, H, W, 3), the generator's edits
    edits: np.ndarray  # (N, P, H, W, 3), the editor's
    closer: np.ndarray  # (N, P)
    outside: np.ndarray
    whole: np.ndarray
    seconds: float  # per edit, all prompts of a portrait in one batch

    def prompts_met(self) -> int:
        """Counts the prompts whose edits are closer for >= 80 % of identities, at least half not nan."""
        return sum(_mean(column) >= 0.8 and np.isfinite(column).mean() >= 0.5 for column in self.closer.T)

    def sheet(self, people: int) -> np.ndarray:
        """Puts the source and the generator's edits above the reconstruction and the editor's edits."""
        rows = []
        for n in range(people):
            rows.append(np.concatenate([self.sources[n], *self.truth[n]], axis=1))
            rows.append(np.concatenate([self.plain[n], *self.edits[n]], axis=1))
            rows.append(np.zeros_like(rows[0][:4]))
        return np.concatenate(rows)


def apply(editor: editors.Editor, pictures: np.ndarray, prompts: Sequence[int], seed: int) -> np.ndarray:
    """Edits (N, H, W, 3) uint8 by each of the prompts, as the edit scripts do -> (N, prompts, H, W, 3)."""
    texts = [edit_prompts[number] for number in prompts]
    return np.stack(
        [to_uint8(editor(to_tensor(np.stack([picture] * len(texts))), texts, seed)) for picture in pictures]
    )


def measure(
    editor: editors.Editor, identities: Sequence[int], seed: int = 0, prompts: Sequence[int] | None = None
) -> Edits:
    """Edits new people by the prompts (by default all), and compares with the generator's edits."""
    numbers = list(prompts or edit_prompts)
    pictures = world.render([(i, 0, p) for i in identities for p in (None, *numbers)])
    pictures = pictures.reshape(len(identities), 1 + len(numbers), *pictures.shape[1:])
    sources, truth = pictures[:, 0], pictures[:, 1:]
    plain = reconstruct(editor.pipeline.vae, sources, editor.pipeline.device)
    began = time.perf_counter()
    edits = apply(editor, sources, numbers, seed)
    seconds = (time.perf_counter() - began) / edits[..., 0, 0, 0].size
    closer, outside, whole = (np.full(edits.shape[:2], np.nan) for _ in range(3))
    for row, column in np.ndindex(*closer.shape):
        source, wanted, ours = sources[row], truth[row, column], edits[row, column]
        mask = (np.abs(wanted.astype(int) - source) > MASK_LEVEL).any(axis=-1)  # (H, W)
        whole[row, column] = psnr(ours[None], wanted[None])[0]
        if mask.mean() >= 0.002:
            mine, untouched = (psnr(image[mask][None], wanted[mask][None])[0] for image in (ours, plain[row]))
            closer[row, column] = mine > untouched
        if (~mask).mean() > 0.1:
            outside[row, column] = psnr(ours[~mask][None], source[~mask][None])[0]
    return Edits(sources, plain, truth, edits, closer, outside, whole, seconds)


def evaluate(name: str, args: argparse.Namespace, **flags: str) -> None:
    """Measures validation identities at the mini set's defaults, logs each prompt and writes a sheet."""
    editor = world.mini_set(args.device, model_id=str(args.out), **flags).load_editor()
    found = measure(editor, portraits.VALIDATION[: args.eval_identities], args.seed)
    for column, (number, text) in enumerate(edit_prompts.items()):
        closer, outside, whole = (values[:, column] for values in (found.closer, found.outside, found.whole))
        world.log(
            name,
            f"{number:2d} {text:38s} closer {_mean(closer):.2f} of {np.isfinite(closer).sum()}, "
            f"outside {_mean(outside):.1f} dB, whole {whole.mean():.1f} dB",
        )
    world.log(
        name,
        f"{args.eval_identities} validation identities: {found.prompts_met()} of 25 prompts closer on "
        f">= 80 %, outside {_mean(found.outside):.2f} dB, whole {found.whole.mean():.2f} dB, "
        f"{found.seconds:.2f} s an edit",
    )
    save_png(world.WORK / f"{name}.png", found.sheet(min(4, args.eval_identities)))
    world.log(name, f"sheet (source and its edits, below the model's): {world.WORK / f'{name}.png'}")


def _mean(values: np.ndarray) -> float:
    """Averages the values that aren't nan; nan if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(__doc__, steps=10_000, identities=1_500, batch=32, lr=1e-3, seed=0, out="editor")
    parser.add_argument("--first", type=int, default=0, help="identity to train on, --identities from there")
    parser.add_argument("--variations", type=positive_int, default=2, help="pictures of each identity")
    parser.add_argument("--edits", type=positive_int, default=6, help="of the 25, for each picture")
    parser.add_argument(
        "--often", type=int, nargs="*", default=[], help=f"prompts drawn {OFTEN} times as often"
    )
    parser.add_argument(
        "--noisy", type=float, default=0.0, help="share of the steps' pictures that gets most of the noise"
    )
    parser.add_argument("--mask_weight", type=float, default=1.0, help="more on cells that an edit changes")
    parser.add_argument("--eval_identities", type=positive_int, default=8, help="of the validation range")
    parser.add_argument("--start_from", type=Path, help="a finished editor, trained further")
    parser.add_argument("--vae", type=Path, default=world.ASSETS / "editor" / "vae", help="from train_vae.py")
    args = world.parse(parser, argv)
    if not set(args.often) <= set(edit_prompts):
        parser.error(f"--often: prompts are numbered 0 to {len(edit_prompts) - 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = build_tokenizer(list(edit_prompts.values()))
    loss_fn = None
    if not args.export_only:
        people = range(args.first, args.first + args.identities)
        wanted = requests(people, args.edits, args.seed, args.variations, args.often)
        loss_fn = make_loss(latents_of(wanted, args.vae, device), wanted, tokens_of(tokenizer), args)
    steps = 0 if args.export_only else args.steps
    editor = Editor(tokenizer)
    if args.start_from:
        load(editor, args.start_from)
    editor = editor.to(device)
    editor = world.train(NAME, editor, loss_fn, steps=steps, lr=args.lr, seed=args.seed, flags=args)
    export(editor, tokenizer, args.vae, args.out)
    evaluate(NAME, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
