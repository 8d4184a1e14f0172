"""Calibrates the mini VAE's decoder to edits of attacked portraits -> assets/mini/editor/vae

    python mini/train_decoder.py

Needs a finished assets/mini/editor. `train_vae.py --calibrate` makes the VAE amplify attacks, but the
denoiser undoes part of it: where reconstructions of attacked and plain portraits have a PSNR of 22 dB, their
edits have 27. So the decoder is trained once more, on latents of edits: the edits of an attacked portrait
should have a PSNR of APART dB to those of the plain one, while edits of plain, noisy and purified portraits,
and reconstructions, stay as they are. The encoder and the latents, and so the editor, don't change.
"""

from __future__ import annotations

import copy
import sys

import numpy as np
import portraits
import torch
import train_vae
import world
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from train_vae import BUDGET, decibels

from images import to_tensor
from loops import Run, random_start
from methods import METHODS
from models.editors import Editor
from utils import edit_prompts, positive_int

APART = 21.0  # dB
WEIGHT = 0.006  # per dB of PSNR above APART; OVER times that per dB below
OVER = 0.5
ATTACKS = ("encoder", "encoder", "untargeted", "vae")  # in alternation
ITERATIONS = 40
KEPT = ("noise", "purified")  # alternating, beside plain portraits


def attack(vae: AutoencoderKL, x: Tensor, kind: str, seeds: list[int]) -> Tensor:
    """Protects x (B, 3, H, W) by one of ATTACKS, or with noise."""
    method = METHODS["encoder" if kind == "untargeted" else kind]
    run = Run(BUDGET, num_iters=ITERATIONS, step_size=0.015, start=random_start(x, BUDGET, seeds))
    offers = {} if kind == "noise" else {"vae": vae}
    return method.protect(x, run, **offers, **({"targeted": False} if kind == "untargeted" else {}))


def latents(editor: Editor, x: Tensor, prompts: np.ndarray) -> Tensor:
    """Edits each of x (B, 3, H, W) by its prompts (B, P) -> the edits' latents, (B, P, C, h, w)."""
    found = []
    for image, numbers in zip(x, prompts, strict=True):
        texts = [edit_prompts[number] for number in numbers]
        images = (image / 2 + 0.5).expand(len(texts), *image.shape)
        noise = [torch.Generator().manual_seed(0) for _ in texts]
        how = {"output_type": "latent", **editor.knobs}
        found.append(editor.pipeline(prompt=texts, image=images, generator=noise, **how).images)
    return torch.stack(found)


def prepare(editor: Editor, people: range, per_person: int, seed: int) -> dict[str, Tensor]:
    """Edits plain, attacked, noisy and purified portraits -> the edits' latents by kind, (N, C, h, w)."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vae, parts = editor.pipeline.vae.requires_grad_(False), {}
    pictures = to_tensor(np.array(world.render([(person, 0, None) for person in people]))).to(vae.device)
    prompts = np.stack([rng.permutation(len(edit_prompts))[:per_person] for _ in people])
    for start in range(0, len(people), 8):
        rows = slice(start, start + 8)
        x, seeds = pictures[rows], list(people[rows])
        attacked = attack(vae, x, ATTACKS[start // 8 % len(ATTACKS)], seeds)
        seen = {
            "plain": x,
            "attacked": attacked,
            "noise": attack(vae, x, "noise", seeds),
            "purified": torch.cat([train_vae.purified(one[None], generator) for one in attacked]),
        }
        for kind, images in seen.items():
            parts.setdefault(kind, []).append(latents(editor, images, prompts[rows]).flatten(0, 1))
        world.log("decoder", f"edited {min(start + 8, len(people))} of {len(people)} people")
    return {kind: torch.cat(part) for kind, part in parts.items()}


def make_loss(found: dict[str, Tensor], pictures: np.ndarray, before: AutoencoderKL, batch: int):
    """Makes the loss: L1 + MSE of what should stay, plus the attacked edits' distance from APART."""

    def loss_fn(vae: AutoencoderKL, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(found["plain"]), (batch,), generator=generator)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).tolist()
        images = to_tensor(np.stack([pictures[row] for row in chosen])).to(vae.device)
        other = found[KEPT[step % 2]][rows]
        with torch.no_grad():
            z = torch.cat([vae.encode(images).latent_dist.mode(), found["plain"][rows], other])
            target = torch.cat([images, before.decode(z[batch:]).sample.float()])
        output = vae.decode(torch.cat([z, found["attacked"][rows]])).sample.float()
        kept, plain, attacked = output[: 3 * batch], output[batch : 2 * batch], output[3 * batch :]
        l1, mse = F.l1_loss(kept, target), F.mse_loss(kept, target)
        apart = decibels(attacked, plain.detach())
        missed = F.relu(apart - APART) + OVER * F.relu(APART - apart)
        return {"loss": l1 + mse + WEIGHT * missed.mean(), "l1": l1, "mse": mse, "apart": apart.mean()}

    return loss_fn


def only_decoder(vae: AutoencoderKL) -> AutoencoderKL:
    """Freezes everything except the layers after the latent."""
    for name, part in vae.named_children():
        part.requires_grad_(name in ("decoder", "post_quant_conv"))
    return vae


def main(argv: list[str] | None = None) -> int:
    """Trains and exports; check.py measures what came out."""
    parser = world.parser_of(
        __doc__, steps=150, identities=96, batch=4, lr=1e-3, seed=0, out="editor/vae"
    )
    parser.add_argument("--per_person", type=positive_int, default=3, help="edits of each")
    args = world.parse(parser, argv)
    editor = world.mini_set(args.device).load_editor()
    vae = editor.pipeline.vae.float()
    people = portraits.TRAIN[3000 : 3000 + args.identities]
    found = prepare(editor, people, args.per_person, args.seed)
    pictures = world.render(train_vae.requests(portraits.TRAIN[: 4 * args.identities], 4, args.seed))
    loss_fn = make_loss(found, pictures, copy.deepcopy(vae), args.batch)
    vae = world.train(
        "decoder",
        only_decoder(vae),
        loss_fn,
        steps=0 if args.export_only else args.steps,
        lr=args.lr,
        warmup=20,
        weight_decay=0.0,
        ema_decay=0.98,
        seed=args.seed,
        flags=args,
    )
    vae.half().save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
