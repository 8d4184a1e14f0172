"""Trains the second mini editor, a token editor (a FLUX.1 Kontext pipeline) -> assets/mini/kontext

It shows whether a protection against the first editor holds against one of another kind: a transformer that
reads the image as tokens beside those that it denoises (64 + 64 for a 128x128 portrait), with its own VAE.
Needs that VAE (how it was made: assets/mini/README.md). Latents are made once; a step takes a third of a
second on two CPU cores; a killed run resumes from its last checkpoint when started again:
    python mini/train_kontext.py --vae=mini/checkpoints/kontext/vae

The result is a plain diffusers directory:
    FluxKontextPipeline.from_pretrained("assets/mini/kontext")
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import portraits
import torch
import train_editor
import world
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from tokenizer import build_tokenizer
from torch import Tensor, nn
from train_editor import WIDTH
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from utils import edit_prompts, pick_device, positive_int

NAME = "kontext"
HEADS, HEAD = 5, 32  # of the attention
WIDTH_OF_TOKENS = HEADS * HEAD
AXES = (4, 14, 14)  # channels of a head that rotate with the picture, the row and the column
TOKENS = 16  # most tokens in an instruction
NOISY = 0.4  # share of a step's pictures whose noise is drawn from the upper half


class Kontext(nn.Module):
    """Holds what is trained: instruction -> two text encoders -> transformer."""

    def __init__(self, channels: int, tokenizer: CLIPTokenizer, words: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * channels,  # a token is 2x2 of the latent
            num_layers=2,
            num_single_layers=5,
            attention_head_dim=HEAD,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=AXES,
        )
        begin(self.transformer)
        # The fused attention's backward pass is slow on CPUs.
        self.transformer.set_attention_backend("_native_math")
        self.text_encoder = train_editor.text_encoder(tokenizer)
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(words),
                d_model=WIDTH,
                d_kv=WIDTH // 4,
                d_ff=2 * WIDTH,
                num_layers=1,
                num_heads=4,
                dropout_rate=0.0,
            )
        )

    def forward(self, noisy: Tensor, image: Tensor, sigmas: Tensor, pooled: Tensor, words: Tensor) -> Tensor:
        """Predicts the velocity, (B, 64, 4 C). noisy, image: the same shape; pooled, words: token ids."""
        ids = FluxKontextPipeline._prepare_latent_image_ids(1, 8, 8, noisy.device, torch.float32)  # (64, 3)
        velocity = self.transformer(
            hidden_states=torch.cat([noisy, image], dim=1),
            timestep=sigmas,
            pooled_projections=self.text_encoder(pooled).pooler_output,
            encoder_hidden_states=self.text_encoder_2(words)[0],
            txt_ids=torch.zeros(words.shape[1], 3, device=noisy.device),
            img_ids=torch.cat([ids, ids + torch.tensor([1.0, 0, 0], device=noisy.device)]),
            return_dict=False,
        )[0]
        return velocity[:, : noisy.shape[1]]


@torch.no_grad()
def begin(transformer: FluxTransformer2DModel) -> None:
    """Initialises three heads to attend to a token's own place: two in the source, one in the noisy edit.

    An edit copies most of its source, and a network is slow to learn that equal places belong together (loss
    after 100 steps: .91 with this start, 1.32 without). Queries and keys of these heads are nearly constant,
    so that their product depends on the rotation between two places. Residual branches begin at half their
    size and without modulation, the output at 0.
    """
    key = torch.zeros(HEAD)
    key[0] = 1.2
    key[[AXES[0], AXES[0] + 2, AXES[0] + AXES[1], AXES[0] + AXES[1] + 2]] = 1.0  # fast channels
    query = key.clone()
    query[:2] = 1.2 * torch.tensor([math.cos(1), math.sin(1)])  # rotated by one picture
    queries = torch.stack([query, query, key])
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        attention = block.attn
        for linear, bias in ((attention.to_q, queries), (attention.to_k, key.expand(3, -1))):
            linear.weight[: bias.numel()] *= 0.2
            linear.bias[: bias.numel()] = bias.flatten()
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight[queries.any(dim=0)] = 2.0
    for name, module in transformer.named_modules():
        if "norm" in name and isinstance(module, nn.Linear):  # shift, scale and gate: a third each
            module.weight.zero_()
            module.bias.zero_()
            if name.startswith(("transformer_blocks", "single_transformer_blocks")):
                module.bias.view(-1, 3, WIDTH_OF_TOKENS)[:, 2] = 0.5
    transformer.proj_out.weight.zero_()
    transformer.proj_out.bias.zero_()


def build_words() -> T5Tokenizer:
    """Builds a unigram tokenizer with one token per word of the instructions; other words are spelled out."""
    words = sorted({word for text in edit_prompts.values() for word in text.split()})
    letters = [(chr(code), -10.0) for code in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0)]
    vocab = dict(special + letters) | {f"▁{word}": -1.0 for word in words}
    return T5Tokenizer(vocab=list(vocab.items()), extra_ids=0, model_max_length=TOKENS)


def ids_of(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> Tensor:
    """Tokenizes instructions, padded as the pipeline pads them -> (25, length)."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def pack(latents: Tensor) -> Tensor:
    """Packs latents into tokens as the pipeline does: (B, C, 16, 16) -> (B, 64, 4 C)."""
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)


def make_loss(
    latents: Tensor, wanted: list[world.Request], ids: tuple[Tensor, Tensor], args: argparse.Namespace
):
    """Makes the loss of a rectified flow (Liu et al. 2023), with more weight on what the edit changes.

    x_s = (1 - s) x_0 + s e, and the velocity is e - x_0. No condition is ever dropped, which classifier-free
    guidance would need: Kontext's pipeline works without guidance.
    """
    device, group = latents.device, args.edits + 1  # a source and its edits, see train_editor.requests
    prompts = torch.tensor([-1 if prompt is None else prompt for _, _, prompt in wanted], device=device)
    pooled, words = (part.to(device) for part in ids)

    def loss_fn(model: Kontext, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        sources = torch.randint(len(latents) // group, (args.batch,), generator=generator) * group
        edits = sources + 1 + torch.randint(args.edits, (args.batch,), generator=generator)
        noisier = torch.rand(args.batch, generator=generator) < NOISY
        sigmas = torch.rand(args.batch, generator=generator)
        sigmas = torch.where(noisier, (1 + sigmas) / 2, sigmas).to(device)
        sources, edits = sources.to(device), edits.to(device)
        source, target = pack(latents[sources].float()), pack(latents[edits].float())  # (B, 64, 4 C)
        noise = torch.randn(target.shape, generator=generator).to(device)
        changed = ((target - source).abs().mean(2, keepdim=True) / 0.5).clamp(max=1)  # (B, 64, 1)
        weight = 1 + args.mask_weight * changed
        at = sigmas[:, None, None]
        noisy = (1 - at) * target + at * noise
        number = prompts[edits]
        velocity = model(noisy, source, sigmas, pooled[number], words[number]).float()
        error = (velocity - (noise - target)).square()
        return {"loss": (weight / weight.mean() * error).mean(), "plain": error.mean()}

    return loss_fn


def pipeline_of(
    model: Kontext, tokenizer: CLIPTokenizer, words: T5Tokenizer, vae: AutoencoderKL
) -> FluxKontextPipeline:
    """Assembles the editing pipeline."""
    return FluxKontextPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=words,
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def export(model: Kontext, tokenizer: CLIPTokenizer, words: T5Tokenizer, vae_folder: Path, out: Path) -> None:
    """Writes a plain diffusers directory in float16."""
    vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float16)
    pipeline_of(model.half(), tokenizer, words, vae).save_pretrained(out)
    for part in ("text_encoder", "text_encoder_2"):
        train_editor.load_in_float32(out / part)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(
        __doc__, steps=8_800, identities=2_000, batch=16, lr=1.2e-3, seed=1, out="kontext"
    )
    parser.add_argument("--first", type=int, default=20_000, help="identity to train on")
    parser.add_argument("--edits", type=positive_int, default=6, help="of the 25, for each picture")
    parser.add_argument("--mask_weight", type=float, default=2.0, help="more on tokens that an edit changes")
    parser.add_argument("--eval_identities", type=positive_int, default=8, help="of the validation range")
    parser.add_argument("--vae", type=Path, default=world.WORK / "kontext" / "vae", help="from train_vae.py")
    return world.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    device, texts = pick_device(args.device), list(edit_prompts.values())
    tokenizer, words = build_tokenizer(texts), build_words()
    loss_fn = None
    if not args.export_only:
        people = portraits.TRAIN[args.first :][: args.identities]
        wanted = train_editor.requests(people, args.edits, args.seed, variations=1)
        latents = train_editor.latents_of(wanted, args.vae, device)
        loss_fn = make_loss(latents, wanted, (ids_of(tokenizer, texts), ids_of(words, texts)), args)
    steps = 0 if args.export_only else args.steps
    channels = AutoencoderKL.load_config(args.vae)["latent_channels"]
    model = Kontext(channels, tokenizer, words).to(device)
    model = world.train(NAME, model, loss_fn, steps=steps, lr=args.lr, seed=args.seed, flags=args)
    export(model, tokenizer, words, args.vae, args.out)
    train_editor.evaluate(NAME, args, model="flux-kontext")
    return 0


if __name__ == "__main__":
    sys.exit(main())
