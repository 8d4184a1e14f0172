"""Trains the mini editor (UNet and text encoder of an InstructPix2Pix pipeline) -> assets/mini/editor

Needs assets/mini/editor/vae (mini/train_vae.py). About 10 minutes for the latents, made once, and an hour
of training on two CPU cores; a killed run goes on from its last checkpoint when started again:
    python mini/train_editor.py

Export and measure what an unfinished training has reached:
    python mini/train_editor.py --export_only

The result is a plain diffusers directory:
    StableDiffusionInstructPix2PixPipeline.from_pretrained("assets/mini/editor")
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
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
from PIL import Image
from tokenizer import build_tokenizer
from torch import nn
from train_vae import psnr, reconstruct
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from utils import (
    DEVICE_HELP,
    HelpFormatter,
    edit_prompts,
    pick_device,
    positive_int,
    save_png,
    start_seed,
    to_tensor,
)

NAME = "editor"
LATENT = (16, 16, 16)  # channels, height, width of a 128x128 portrait's latent
WIDTH = 128  # of the text embedding
VARIATIONS = 2  # pictures of each identity
DROPOUT = 0.05  # each: the instruction alone, the image alone, both (Brooks et al. 2023, section 3.2.1)
MASK_LEVEL = 8  # of 255: where the generator's edit differs by more is the edit's mask
EMPTY = len(edit_prompts)  # the row of the empty instruction, after those of the 25 prompts


class Editor(nn.Module):
    """What is trained: instruction -> text encoder -> UNet."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=LATENT[1],
            in_channels=2 * LATENT[0],  # the noisy edit and the source image
            out_channels=LATENT[0],
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            # At 4x4 the middle block attends; more attention there is a fifth of the weights for little.
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # in diffusers the NUMBER of heads; with 32 a step takes 2.7 times as long
        )
        self.text_encoder = CLIPTextModel(
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

    def forward(
        self, noisy: torch.Tensor, image: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """noisy, image: (B, 16, 16, 16); tokens: (B, 32) -> the prediction of v, (B, 16, 16, 16)."""
        text = self.text_encoder(tokens)[0]  # (B, 32, 128)
        return self.unet(torch.cat([noisy, image], dim=1), timesteps, text).sample


def make_scheduler() -> DDIMScheduler:
    """Zero terminal SNR (Lin et al. 2023): sampling starts from what training called pure noise.

    With it, v prediction and trailing steps, an edit's colours are right; with epsilon they were not, since
    the low frequencies are decided where epsilon teaches least.
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


def requests(identities: range, edits: int, seed: int) -> list[world.Request]:
    """For each picture the source and then `edits` different edits of it, drawn at random."""
    rng = np.random.default_rng(seed)
    return [
        (identity, variation, prompt)
        for identity in identities
        for variation in range(VARIATIONS)
        for prompt in [None, *rng.permutation(len(edit_prompts))[:edits].tolist()]
    ]


@torch.no_grad()
def latents_of(wanted: list[world.Request], folder: Path, device: torch.device) -> torch.Tensor:
    """What the pipeline feeds to the UNet, vae.encode(image).latent_dist.mode(), as float16 (N, 16, 16, 16).

    Cached in mini/checkpoints/data under a hash of generator, autoencoder and requests.
    """
    key = hashlib.sha256(Path(portraits.__file__).read_bytes())
    key.update((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    key.update(np.array([(i, v, -1 if p is None else p) for i, v, p in wanted], dtype=np.int64).tobytes())
    path = world.WORK / "data" / f"latents-{key.hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    world.log(NAME, f"rendering and encoding {len(wanted)} pictures")
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    latents, batch = torch.empty(len(wanted), *LATENT, dtype=torch.float16), []
    for row, pixels in enumerate(world.stream(wanted), 1):
        batch.append(pixels)
        if len(batch) == 32 or row == len(wanted):
            # bfloat16 halves the time; its error, a hundredth of a latent's std, is noise to the training
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
    """(26, 32): the 25 instructions and the empty one, padded as the pipeline pads them."""
    texts = [*edit_prompts.values(), ""]
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


# ---------------------------------------------------------------------------------------------------------
# loss


def make_loss(
    latents: torch.Tensor, wanted: list[world.Request], tokens: torch.Tensor, args: argparse.Namespace
):
    """The v loss, with more weight on the latent cells that the edit changes.

    Weights by noise level (min-SNR) are left out: they give nothing to the pure noise that sampling starts
    from, and the edit is decided there, since it is a function of the source and the instruction.
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
        # An empty instruction asks for the unedited source, so that text guidance points along the edit.
        no_text = (chance < DROPOUT) | ((chance >= 2 * DROPOUT) & (chance < 3 * DROPOUT))
        no_image = (chance >= DROPOUT) & (chance < 3 * DROPOUT)
        edits = torch.where(no_text, sources, edits)
        noise = torch.randn(args.batch, *LATENT, generator=generator).to(device)
        timesteps = torch.randint(last, (args.batch,), generator=generator).to(device)
        sources, edits, no_image = sources.to(device), edits.to(device), no_image.to(device)

        source, target = latents[sources].float(), latents[edits].float()  # (B, 16, 16, 16)
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


def export(editor: Editor, tokenizer: CLIPTokenizer, vae_folder: Path, out: Path) -> None:
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
    # transformers loads a model in its config's dtype, diffusers in float32: without this, a plain
    # from_pretrained of the pipeline would mix float16 text with a float32 UNet.
    path = out / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    """Edits of validation identities, as a user's program would make them, against the generator's own.

    Per prompt: `closer`, the share of identities whose edit is nearer (MSE inside the mask) to the
    generator's than the source's reconstruction is; PSNR to the source outside the mask; PSNR to the
    generator's edit over the whole picture. A mask under 0.2 % does not count, nor an outside under a tenth.
    """
    device = pick_device(args.device)
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(args.out, dtype=torch.float32)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    identities = portraits.VALIDATION[: args.eval_identities]
    numbers = list(edit_prompts)
    pictures = world.render([(i, 0, p) for i in identities for p in (None, *numbers)])
    closer, outside, whole = (np.full((len(identities), len(numbers)), np.nan) for _ in range(3))
    sheet = []
    for row, identity in enumerate(identities):
        source, *truth = pictures[row * (len(numbers) + 1) : (row + 1) * (len(numbers) + 1)]
        truth = np.stack(truth)
        plain = reconstruct(pipeline.vae, source[None], device)
        seeds = [start_seed(args.seed, f"{identity}-{number}") for number in numbers]
        outputs = pipeline(
            prompt=list(edit_prompts.values()),
            image=[Image.fromarray(source)] * len(numbers),
            num_inference_steps=args.inference_steps,
            guidance_scale=1.0,
            image_guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        edits = np.stack([np.asarray(image) for image in outputs])
        whole[row] = psnr(edits, truth)
        masks = (np.abs(truth.astype(int) - source) > MASK_LEVEL).any(axis=-1)  # (25, H, W)
        for column, mask in enumerate(masks):
            if mask.mean() >= 0.002:
                wanted = truth[column][mask][None]
                ours, untouched = edits[column][mask][None], plain[0][mask][None]  # (1, pixels, 3)
                closer[row, column] = psnr(ours, wanted)[0] > psnr(untouched, wanted)[0]
            if (~mask).mean() > 0.1:
                outside[row, column] = psnr(edits[column][~mask][None], source[~mask][None])[0]
        if len(sheet) < 12:  # 4 identities, 3 rows each
            sheet += [np.concatenate([source, *truth], axis=1), np.concatenate([plain[0], *edits], axis=1)]
            sheet += [np.zeros_like(sheet[0][:4])]
    for column, number in enumerate(numbers):
        world.log(
            NAME,
            f"{number:2d} {edit_prompts[number]:38s} closer {_mean(closer[:, column]):.2f} of "
            f"{np.isfinite(closer[:, column]).sum()}, outside {_mean(outside[:, column]):.1f} dB, "
            f"whole {whole[:, column].mean():.1f} dB",
        )
    met = sum(_mean(column) >= 0.8 and np.isfinite(column).mean() >= 0.5 for column in closer.T)
    world.log(
        NAME,
        f"{len(identities)} validation identities, {args.inference_steps} steps, guidance 1/1: "
        f"{met} of 25 prompts closer on >= 80 %, outside {_mean(outside):.2f} dB, "
        f"whole {whole.mean():.2f} dB",
    )
    save_png(world.WORK / f"{NAME}.png", np.concatenate(sheet))
    world.log(NAME, f"sheet (source and its edits, below the model's): {world.WORK / f'{NAME}.png'}")


def _mean(values: np.ndarray) -> float:
    """Of what was counted; nan if nothing was."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=4500, help="also the cosine schedule's length")
    parser.add_argument("--identities", type=positive_int, default=2500, help=f"times {VARIATIONS} pictures")
    parser.add_argument("--edits", type=positive_int, default=6, help="of the 25, for each picture")
    parser.add_argument("--batch", type=positive_int, default=32, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--mask_weight", type=float, default=1.0, help="more on cells that an edit changes")
    parser.add_argument("--save_every", type=positive_int, default=200, help="steps between checkpoints")
    parser.add_argument("--eval_identities", type=positive_int, default=8, help="of the validation range")
    parser.add_argument("--inference_steps", type=positive_int, default=20, help="DDIM, of the evaluation")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and batches")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--out", type=Path, default=world.ASSETS / "editor", help="the pipeline's folder")
    parser.add_argument("--vae", type=Path, default=world.ASSETS / "editor" / "vae", help="from train_vae.py")
    parser.add_argument("--work", type=Path, default=world.WORK, help="for checkpoint, data cache and log")
    parser.add_argument("--export_only", action="store_true", help="write and measure the last checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    world.WORK = args.work
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = build_tokenizer(list(edit_prompts.values()))
    editor = Editor(tokenizer).to(device)
    if args.export_only:
        world.require_checkpoint(NAME)
        editor = world.load_average(NAME, editor)
    else:
        wanted = requests(portraits.TRAIN[: args.identities], args.edits, args.seed)
        editor = world.train(
            NAME,
            editor,
            make_loss(latents_of(wanted, args.vae, device), wanted, tokens_of(tokenizer), args),
            steps=args.steps,
            lr=args.lr,
            seed=args.seed,
            save_every=args.save_every,
        )
    export(editor, tokenizer, args.vae, args.out)
    evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
