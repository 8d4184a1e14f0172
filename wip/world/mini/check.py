"""Measures the embedded models against what is asked of them, and exits 1 where a target is missed.

    python mini/check.py                # people of the validation range, for every tuning
    python mini/check.py --split test   # people that nothing else looks at: the final figures only
    python mini/check.py --num_inference_steps 4    # other than the mini set's own

About 10 minutes on two CPU cores. Prints the Markdown table of assets/mini/README.md, a row as soon as it is
measured, and leaves a sheet of reconstructions and edits in mini/checkpoints/. Everything is loaded and run
as the project's scripts do it. The models are stand-ins: nothing here says how a real photo is protected.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import crops
import numpy as np
import portraits
import torch
import train_clip
import train_editor
import train_recognizer
import train_vae
import world
from pairing import Key  # of evaluation/
from views import FaceView

import defend
from images import save_png, to_tensor, to_uint8_within
from models.faces import load_recognizer
from protection import Protector
from utils import HelpFormatter, edit_prompts, positive_int, start_seed

SPLITS = {
    "validation": portraits.VALIDATION,
    # Below are the demo's, the people whom earlier weights were measured on, and the README's experiment.
    "test": range(portraits.TEST_FROM + 3_000, portraits.TEST_FROM + 4_000),
}
PEOPLE = 20  # of the edits and of the defenses
PEOPLE_OF_VAE, PEOPLE_OF_CLIP, PEOPLE_OF_RECOGNISERS, PEOPLE_ALTERED = 50, 100, 200, 60
PROMPTS = (0, 4, 5, 10, 13, 19)  # of the defenses and of the paper's guidance: hair, face, skin, clothes, ...
BUDGET = 0.06
RECOGNISERS = ("recognizer", "judge")
LEFT = {"shifted": 0.95, "mirrored": 0.9, "gamma": 0.9, "saturated": 0.9, "blurred": 0.85, "scaled": 0.95}

CPU = torch.device("cpu")


class Table:
    """Prints rows of what was measured beside what is asked, and counts the misses."""

    def __init__(self) -> None:
        self.missed = 0
        print("| what | measured | target | |\n|---|---|---|---|", flush=True)

    def row(self, what: str, measured: str, target: str = "", met: bool | None = None) -> None:
        """Prints a row. met: whether the target is; None where there is none."""
        self.missed += met is not None and not met  # numpy's bools are not Python's
        print(f"| {what} | {measured} | {target} | {_verdict(met)} |", flush=True)


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: ""}[met]


def print_nothing(text: str) -> None:
    """Drops the evaluations' own lines, since the table says the same."""


class Models:
    """Loads the mini set, once."""

    def __init__(self, steps: int | None = None) -> None:
        self.chosen = world.mini_set(num_inference_steps=steps)
        self.editor = self.chosen.load_editor()
        self.recognizers = {
            name: load_recognizer(getattr(self.chosen, name), CPU, torch.float32) for name in RECOGNISERS
        }

    def similarity(self, edits: np.ndarray, sources: np.ndarray) -> dict[str, np.ndarray]:
        """Measures FR of edits (N, P, H, W, 3) to the sources (N, H, W, 3), by each -> (N, P)."""
        view = FaceView(self.recognizers, crops.detector(), CPU)
        values: dict[str, list[np.ndarray]] = {name: [] for name in RECOGNISERS}
        for number, (images, source) in enumerate(zip(edits, sources, strict=True)):
            view.add_source(str(number), source)
            seen = view(images, [Key(0, prompt, str(number)) for prompt in range(len(images))])
            for name in RECOGNISERS:
                values[name].append((seen[f"{name}_edits"] * seen[f"{name}_sources"]).sum(dim=1).numpy())
        return {name: np.stack(of_people) for name, of_people in values.items()}


def check_vae(table: Table, people: range, loaded: Models) -> None:
    """Measures what the autoencoder loses."""
    pictures, outputs = train_vae.reconstructions(loaded.editor.pipeline.vae, people[:PEOPLE_OF_VAE], CPU)
    values = train_vae.psnr(pictures, outputs)
    face = train_vae.psnr(pictures[:, *train_vae.CENTRE], outputs[:, *train_vae.CENTRE])
    table.row(
        f"VAE reconstruction, {len(pictures)} pictures of {PEOPLE_OF_VAE} people",
        f"{values.mean():.2f} dB (lowest {values.min():.1f}; the face alone {face.mean():.1f})",
        ">= 30 dB",
        bool(values.mean() >= 30),
    )


def check_edits(table: Table, people: range, loaded: Models, sheet: Path) -> np.ndarray:
    """Measures edits at the set's defaults -> those of PROMPTS, (PEOPLE, 6, H, W, 3), for the other rows."""
    found = train_editor.measure(loaded.editor, people[:PEOPLE])
    save_png(sheet, found.sheet(8))
    what = f"edits of {PEOPLE} people x 25 prompts"
    table.row(
        f"{what}: closer to the generator's inside its mask, on >= 80 % of people",
        f"{found.prompts_met()} of 25 prompts",
        ">= 24",
        found.prompts_met() >= 24,
    )
    psnrs = {"the source outside the mask": found.outside, "the generator's edit": found.whole}
    for name, values in psnrs.items():
        mean, by_prompt = np.nanmean(values), np.nanmean(values, axis=0)
        lowest = int(np.nanargmin(by_prompt))
        table.row(
            f"... PSNR to {name}",
            f"{mean:.2f} dB (lowest: {edit_prompts[lowest]!r}, {by_prompt[lowest]:.1f})",
            ">= 26 dB",
            bool(mean >= 26),
        )
    similarity, of_truth = (loaded.similarity(edits, found.sources) for edits in (found.edits, found.truth))
    for name, values in similarity.items():
        mean, by_prompt = np.nanmean(values), np.nanmean(values, axis=0)
        lowest = int(by_prompt.argmin())
        table.row(
            f"... FR(source, edit) by the {name}",
            f"{mean:.3f} (lowest: {edit_prompts[lowest]!r}, {by_prompt[lowest]:.2f}; "
            f"the generator's own edits {np.nanmean(of_truth[name]):.3f})",
            ">= 0.75",
            bool(mean >= 0.75),
        )
    seconds = found.seconds
    table.row("... time of an edit, in batches of 25", f"{seconds:.2f} s", "<= 1.0 s", seconds <= 1)
    return found.edits[:, list(PROMPTS)]


def check_guidance(table: Table, people: range, loaded: Models) -> None:
    """Measures edits by a few prompts at the paper's guidance: reported, nothing is asked of them."""
    editor = world.mini_set(guidance_scale=7.5, image_guidance_scale=1.5).load_editor()
    found = train_editor.measure(editor, people[:PEOPLE], prompts=PROMPTS)
    met = found.prompts_met()
    table.row(
        f"edits at the paper's guidance 1.5 / 7.5, {PEOPLE} people x {len(PROMPTS)} prompts",
        f"{met} of {len(PROMPTS)} prompts closer, outside {np.nanmean(found.outside):.1f} dB, "
        f"whole {found.whole.mean():.1f} dB",
    )


def check_recognisers(table: Table, people: range, loaded: Models) -> None:
    """Measures how well recogniser and judge tell people apart, and how little else sways the judge."""
    for name in RECOGNISERS:
        found = train_recognizer.evaluate(
            loaded.recognizers[name], people[:PEOPLE_OF_RECOGNISERS], print_nothing
        )
        what = f"{name}, {PEOPLE_OF_RECOGNISERS} people"
        plain, edited, identified = found["eer_plain"], found["eer_edited"], found["identified"]
        table.row(f"{what}: equal error rate", f"{plain:.2%}", "<= 1 %", plain <= 0.01)
        table.row("... with one of the two edited", f"{edited:.2%}", "<= 4 %", edited <= 0.04)
        table.row(
            "... identified by the generator's edits among the sources",
            f"{identified:.1%}",
            ">= 95 %",
            identified >= 0.95,
        )
        table.row(
            "... cosine that one pair of strangers in a thousand exceeds (its verification threshold)",
            f"{found['verification']:.3f} ({loaded.recognizers[name].threshold})",
        )
        table.row(
            "... mean cosine of different people (of one person's pictures)",
            f"{found['cosine_different']:.3f} ({found['cosine_same']:.3f})",
        )
    judge = loaded.recognizers["judge"]
    left = train_recognizer.evaluate_altered(judge, people[:PEOPLE_ALTERED], print_nothing)
    for name, share in left.items():
        table.row(
            f"judge's FR of the generator's edits {name}, {PEOPLE_ALTERED} people",
            f"{share:.3f} x of unaltered",
            f">= {LEFT[name]} x",
            share >= LEFT[name],
        )


def check_clip(table: Table, people: range, loaded: Models) -> None:
    """Measures whether CLIP knows an edit's instruction."""
    found = train_clip.evaluate(Path(loaded.chosen.clip), CPU, people[:PEOPLE_OF_CLIP], print_nothing)
    table.row(
        f"CLIP, {PEOPLE_OF_CLIP} people: the right prompt nearest to the edit direction",
        f"{found['direction_top1']:.1%} (worst prompt {found['worst_prompt_top1']:.0%})",
        ">= 70 %",
        found["direction_top1"] >= 0.7,
    )


def check_defenses(table: Table, people: range, loaded: Models, clean: np.ndarray) -> None:
    """Measures FR of the edits of protected portraits beside that of the unprotected ones, `clean`."""
    people = people[:PEOPLE]
    sources = np.array(world.render([(person, 0, None) for person in people]))  # (N, H, W, 3)
    unprotected = {name: np.nanmean(fr) for name, fr in loaded.similarity(clean, sources).items()}
    limits = {"noise": {"recognizer": 0.95, "judge": 0.95}, "facelock": {"recognizer": 0.4, "judge": 0.75}}
    for method in ("noise", "encoder", "vae", "facelock"):
        protected, seconds = protect(method, people, sources)
        edits = train_editor.apply(loaded.editor, protected, PROMPTS, seed=0)
        if method == "facelock":
            middle = statistics.median(seconds)
            table.row("one facelock protection, 100 iterations", f"{middle:.1f} s", "<= 15 s", middle <= 15)
        for name, values in loaded.similarity(edits, sources).items():
            value = np.nanmean(values)
            share, limit, met = value / unprotected[name], limits.get(method, {}).get(name), None
            if limit:
                met = share >= limit if method == "noise" else share <= limit
            table.row(
                f"{method} at {BUDGET}, {PEOPLE} people x {len(PROMPTS)} prompts: FR by the {name}",
                f"{value:.3f} of {unprotected[name]:.3f}: {share:.2f} x",
                f"{'>=' if method == 'noise' else '<='} {limit} x" if limit else "",
                met,
            )


def protect(method: str, people: Sequence[int], sources: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Protects one by one, as defend.py does -> what it would save, (N, H, W, 3) uint8, and seconds each."""
    args = defend.parse_args(
        ["--input_path=-", "--models=mini", f"--device={CPU}"]
        + [f"--defend_method={method}", f"--attack_budget={BUDGET}"]
    )
    protector = Protector(args)
    protector.preload()
    files, seconds = [], []
    for person, source in zip(people, sources, strict=True):
        began = time.perf_counter()
        seeds = [start_seed(args.seed, f"portrait_{person}")]
        boxes = crops.boxes_of(crops.largest([source]))
        images = protector.protect(to_tensor(source), boxes, seeds)
        seconds.append(time.perf_counter() - began)
        files.append(to_uint8_within(images, source[None], BUDGET)[0])
    return np.stack(files), seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="validation", help="test: for the final figures only"
    )
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="of the edits (default: the mini set's)"
    )
    args = parser.parse_args(argv)
    people = SPLITS[args.split]
    began = time.perf_counter()
    loaded = Models(args.num_inference_steps)
    table = Table()
    sheet = world.WORK / f"check-{args.split}.png"
    check_vae(table, people, loaded)
    clean = check_edits(table, people, loaded, sheet)
    check_recognisers(table, people, loaded)
    check_clip(table, people, loaded)
    check_defenses(table, people, loaded, clean)
    check_guidance(table, people, loaded)
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{args.split} split, {minutes:.0f} minutes, {table.missed} targets missed; sheet: {sheet}")
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
