"""Trains the mini world's CLIP, a small transformers CLIPModel with its CLIPProcessor.

    python mini/train_clip.py                # -> assets/mini/clip
    python mini/train_clip.py --export_only  # exports and evaluates the last checkpoint again

Three losses: a contrastive one between pictures and captions (an edit's caption includes its instruction);
one between an edited picture and its instruction alone; and one between the edit's direction,
E(edit) - E(source), and its instruction, which is what CLIP-S measures. The texts are the 25 instructions
and captions made from portraits.describe. A stopped run resumes; checkpoints and log: mini/checkpoints/.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import portraits
import torch
import torch.nn.functional as F
import world
from tokenizer import build_tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from images import to_tensor
from models.clip import load_clip
from utils import edit_prompts, pick_device

SIZE, PATCH, WIDTH = 64, 8, 128  # px, px, vision width
TEXT_WIDTH, PROJECTION = 96, 128
TEMPERATURE = 0.07  # of the two losses over the 25 instructions; the contrastive loss starts from it
AUGMENT = {"shift": 0.03, "light": 0.1, "noise": 0.08}
SOURCES = 2  # unedited training pictures per identity
EDITS = 3  # per source
MAX_TOLD = 3  # attributes in a caption, so that with an instruction it fits the tokenizer's length
VALIDATION_COUNT = 100  # identities, each with all 25 edits

PHRASES = {  # the wording of each key of portraits.describe; other keys become "with ..."
    "clothes": "wearing {}",
    "background": "in front of {}",
    "expression": "looking {}",
}


def caption(words: dict[str, str], draw: random.Random, edit: str | None = None) -> str:
    """Writes a caption: a random subset of the attributes in random order, then the instruction if any."""
    told = draw.sample(sorted(words), draw.randint(1, min(MAX_TOLD, len(words))))
    text = "a portrait of a person " + ", ".join(
        PHRASES.get(key, "with {}").format(words[key]) for key in told
    )
    return text if edit is None else f"{text}, {edit}"


def image_embedding(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Embeds (B, 3, 64, 64) -> (B, 128), not normalised, as CLIP-S needs it."""
    return model.visual_projection(model.vision_model(pixel_values=images).pooler_output).float()


def text_embedding(model: CLIPModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeds the tokens of B texts -> (B, 128), not normalised."""
    return model.text_projection(model.text_model(**tokens).pooler_output).float()


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Computes the cosines of (N, D) with (M, D) -> (N, M), in float32 even under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float()) @ F.normalize(b.float()).T


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Makes the untrained model."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        **ends,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


@torch.no_grad()
def evaluate(
    out: Path, device: torch.device, identities: range, say: Callable[[str], None]
) -> dict[str, float]:
    """Loads the exported model as the scripts do, and measures it on the generator's edits of new people."""
    count = len(identities)
    clip = load_clip(str(out), device, torch.float32)
    instructions = list(edit_prompts.values())
    texts = clip.embed_texts(instructions)  # (25, D)
    requests = [(i, 0, prompt) for i in identities for prompt in (None, *edit_prompts)]
    pictures = world.render(requests)
    rows = range(0, len(pictures), 250)
    embeddings = torch.cat([clip.embed_images(np.array(pictures[row : row + 250])) for row in rows])
    embeddings = embeddings.unflatten(0, (count, 1 + len(edit_prompts)))  # (count, 26, D)
    source, edits = embeddings[:, :1], embeddings[:, 1:]
    scores = F.cosine_similarity((edits - source)[:, :, None], texts[None, None], dim=-1)  # (count, 25, 25)
    right = scores.argmax(-1) == torch.arange(len(instructions), device=device)
    own = scores.diagonal(dim1=1, dim2=2)
    clip_i = F.cosine_similarity(edits, source, dim=-1)
    result = {
        "direction_top1": float(right.float().mean()),
        "worst_prompt_top1": float(right.float().mean(0).min()),
        "clip_s": float(own.mean()),
        "clip_s_wrong": float((scores.sum() - own.sum()) / (scores.numel() - own.numel())),
        "clip_i": float(clip_i.mean()),
    }
    worst = right.float().mean(0).argsort()[:3].tolist()
    prompts = list(edit_prompts)
    by_prompt = ", ".join(f"{prompts[k]}: {float(right.float().mean(0)[k]):.0%}" for k in worst)
    say(
        f"{count} identities from {identities[0]}: right prompt nearest to the edit direction "
        f"{result['direction_top1']:.1%} "
        f"(target 70 %), worst {by_prompt}; "
        f"CLIP-S {result['clip_s']:.3f} for the right prompt, {result['clip_s_wrong']:.3f} for wrong ones; "
        f"CLIP-I of an edit {result['clip_i']:.3f}",
    )
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = world.parser_of(__doc__, steps=500, identities=700, batch=64, lr=1e-3, seed=2, out="clip")
    return world.parse(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and evaluates."""
    args = parse(argv)
    device = pick_device(args.device)

    identities = portraits.TRAIN[: args.identities]
    sources = [(i, v) for i in identities for v in range(SOURCES)]
    words = [portraits.describe(i, v) for i, v in sources]
    draw = random.Random(args.seed)
    # Independent of --identities, so that the vocabulary stays the same; a thousand people use every word.
    texts = [caption(portraits.describe(i, v), draw) for i in portraits.TRAIN[:1_000] for v in range(3)]
    tokenizer = build_tokenizer([*texts, *edit_prompts.values()])

    torch.manual_seed(args.seed)
    model = build(tokenizer).to(device)
    world.log("clip", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args}")

    prompts = list(edit_prompts)
    told = [[draw.choice(prompts) for _ in range(EDITS)] for _ in sources]
    requests = [(i, v, prompt) for (i, v), drawn in zip(sources, told) for prompt in (None, *drawn)]
    pictures = None
    if not args.export_only:
        pictures = world.pictures(requests, SIZE)

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        return tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(device)

    instructions = tokens(list(edit_prompts.values()))

    def loss_fn(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(sources), (args.batch,), generator=generator)
        which = torch.randint(EDITS, (args.batch,), generator=generator)
        wording = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        target = [told[row][k] for row, k in zip(rows.tolist(), which.tolist())]
        captions = [caption(words[row], wording) for row in rows.tolist()]
        captions += [caption(words[row], wording, edit_prompts[p]) for row, p in zip(rows.tolist(), target)]
        first = rows * (1 + EDITS)  # each source is followed by its edits
        images = to_tensor(pictures[torch.cat([first, first + 1 + which]).numpy()]).to(device)
        images = world.jitter(images, generator, **AUGMENT)  # (2B, 3, 64, 64)
        image = image_embedding(model, images)
        text = text_embedding(model, tokens(captions))
        prompt = text_embedding(model, instructions)  # (25, D)
        source, edit = image.chunk(2)

        similarity = cosines(image, text) * model.logit_scale.exp().clamp(max=100)
        own = torch.arange(len(image), device=device)
        contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        label = torch.tensor([prompts.index(p) for p in target], device=device)
        instruction = F.cross_entropy(cosines(edit, prompt) / TEMPERATURE, label)
        directions = cosines(edit - source, prompt)
        direction = F.cross_entropy(directions / TEMPERATURE, label)
        return {
            "loss": contrastive + instruction + direction,
            "contrastive": contrastive,
            "instruction": instruction,
            "direction": direction,
            "direction_top1": (directions.argmax(1) == label).float().mean(),
        }

    steps = 0 if args.export_only else args.steps  # 0 steps return the checkpoint's averaged weights
    trained = world.train("clip", model, loss_fn, steps=steps, lr=args.lr, seed=args.seed, flags=args)
    trained.half().save_pretrained(args.out)
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, resample=2,  # 2: bilinear
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(args.out)
    evaluate(args.out, device, portraits.VALIDATION[:VALIDATION_COUNT], partial(world.log, "clip"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
