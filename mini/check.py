"""Measures the embedded models against their targets, and exits with 1 if a target is missed.

    python mini/check.py                # people of the validation range, for tuning
    python mini/check.py --split test   # people that nothing else uses: for final figures only
    python mini/check.py --num_inference_steps 4    # instead of the mini set's own

Takes about half an hour on one CPU core. Prints the Markdown table of assets/mini/README.md, each row as soon
as it is measured, and writes a sheet of reconstructions and edits to mini/checkpoints/. Everything is loaded
and run as the project's scripts do it. The models are stand-ins: nothing here says how well a real photo is
protected.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
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

from evaluation.eval_facial import WHATS, metric_of
from evaluation.features import FaceFeatures
from evaluation.pairing import Key
from evaluation.purify import chain, purify
from images import save_png, to_tensor, to_uint8_within
from protection import Protector
from utils import HelpFormatter, edit_prompts, positive_int, start_seed

SPLITS = {
    "validation": portraits.VALIDATION,
    # Apart from the demo's people, those of earlier weights' figures, and those of docs/results.md.
    "test": range(portraits.TEST_FROM + 6_000, portraits.TEST_FROM + 7_000),
}
PEOPLE = 20  # for the edits and the defenses
PEOPLE_OF_VAE, PEOPLE_OF_CLIP, PEOPLE_OF_RECOGNISERS, PEOPLE_ALTERED = 50, 100, 200, 60
PROMPTS = (0, 4, 5, 10, 13, 19)  # for the defenses and the paper's guidance: hair, face, skin, clothes, ...
BUDGET = 0.06
RECOGNISERS = ("recognizer", "judge")
PURIFIER = "jpeg:75+resize:0.5"
LEFT = {"shifted": 0.95, "mirrored": 0.9, "gamma": 0.9, "saturated": 0.9, "blurred": 0.85, "scaled": 0.95}

CPU = torch.device("cpu")


class Table:
    """Prints measured values beside their targets, and counts the missed ones."""

    def __init__(self) -> None:
        self.missed = 0
        print("| what | measured | target | |\n|---|---|---|---|", flush=True)

    def row(self, what: str, measured: str, target: str = "", met: bool | None = None) -> None:
        """Prints a row. met: whether the target is met; None if there is no target."""
        self.missed += met is not None and not met  # numpy's bools are not Python's
        print(f"| {what} | {measured} | {target} | {_verdict(met)} |", flush=True)


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: ""}[met]


def print_nothing(text: str) -> None:
    """Drops the evaluations' own output, since the table shows the same."""


class Models:
    """Loads the mini set, once."""

    def __init__(self, steps: int | None = None) -> None:
        self.config = world.mini_set(num_inference_steps=steps)
        self.editor = self.config.load_editor()
        self.recognizers = {
            name: self.config.load_recognizer(self.config.panel()[name]) for name in RECOGNISERS
        }
        self.views: dict[range, FaceFeatures] = {}

    def faces(self, people: range, edits: np.ndarray) -> dict[str, dict[str, float]]:
        """Measures edits (N, P, H, W, 3) of the first N people; the others are strangers in the gallery.

        Returns for each recogniser `similarity` (FR), `recognised` and `identified`, means over all edits,
        and `by_prompt`, the mean FR of each prompt, (P,).
        """
        if people not in self.views:
            self.views[people] = view = FaceFeatures(self.recognizers, crops.detector(), CPU)
            for person in people[:PEOPLE_OF_RECOGNISERS]:
                view.add_source(str(person), world.render([(person, 0, None)])[0])
        values: dict[str, dict[str, list]] = {name: {what: [] for what in WHATS} for name in RECOGNISERS}
        for person, images in zip(people, edits, strict=False):
            seen = self.views[people](images, [Key(0, n, str(person)) for n in range(len(images))])
            for who, what in itertools.product(RECOGNISERS, WHATS):
                metric = metric_of(what, who, who)
                values[who][what].append(metric.function(*(seen[need] for need in metric.needs)).numpy())
        found = {
            name: {what: float(np.nanmean(of)) for what, of in by.items()} for name, by in values.items()
        }
        for name in RECOGNISERS:
            found[name]["by_prompt"] = np.nanmean(values[name]["similarity"], axis=0)
        return found


def check_vae(table: Table, people: range, loaded: Models) -> None:
    """Measures what the autoencoder loses."""
    pictures, outputs = train_vae.reconstructions(loaded.editor.pipeline.vae, people[:PEOPLE_OF_VAE], CPU)
    values = train_vae.psnr(pictures, outputs)
    face = train_vae.psnr(pictures[:, *train_vae.CENTRE], outputs[:, *train_vae.CENTRE])
    table.row(
        f"VAE reconstruction, {len(pictures)} pictures of {PEOPLE_OF_VAE} people",
        f"{values.mean():.2f} dB (lowest {values.min():.1f}; the face alone {face.mean():.1f})",
        ">= 28 dB",
        bool(values.mean() >= 28),
    )


def check_edits(table: Table, people: range, loaded: Models, sheet: Path) -> np.ndarray:
    """Measures edits at the set's defaults -> those by PROMPTS, (PEOPLE, 6, H, W, 3), for later rows."""
    found = train_editor.measure(loaded.editor, people[:PEOPLE])
    save_png(sheet, found.sheet(8))
    what = f"edits of {PEOPLE} people x 25 prompts"
    table.row(
        f"{what}: closer to the generator's inside its mask, on >= 80 % of people",
        f"{found.prompts_met()} of 25 prompts",
        ">= 24",
        found.prompts_met() >= 24,
    )
    psnrs = {"the source outside the mask": (found.outside, 25), "the generator's edit": (found.whole, 24)}
    for name, (values, least) in psnrs.items():
        mean, by_prompt = np.nanmean(values), np.nanmean(values, axis=0)
        lowest = int(np.nanargmin(by_prompt))
        table.row(
            f"... PSNR to {name}",
            f"{mean:.2f} dB (lowest: {edit_prompts[lowest]!r}, {by_prompt[lowest]:.1f})",
            f">= {least} dB",
            bool(mean >= least),
        )
    edited, truth = (loaded.faces(people, edits) for edits in (found.edits, found.truth))
    for name, of in edited.items():
        lowest, fr = int(of["by_prompt"].argmin()), of["similarity"]
        table.row(
            f"... FR(source, edit) by the {name}",
            f"{fr:.3f} (lowest: {edit_prompts[lowest]!r}, {of['by_prompt'][lowest]:.2f}; "
            f"the generator's own edits {truth[name]['similarity']:.3f})",
            ">= 0.75",
            fr >= 0.75,
        )
        table.row(
            f"... identified by the {name} among {PEOPLE_OF_RECOGNISERS} (recognised)",
            f"{of['identified']:.1%} ({of['recognised']:.1%})",
            ">= 95 %",
            of["identified"] >= 0.95,
        )
    seconds = found.seconds
    table.row("... time of an edit, in batches of 25", f"{seconds:.2f} s", "<= 0.5 s", seconds <= 0.5)
    return found.edits[:, list(PROMPTS)]


def check_second(table: Table, people: range, loaded: Models, sheet: Path) -> None:
    """Measures the second editor's edits. No targets: it only serves to show what carries over."""
    editor = world.mini_set(model="flux-kontext").load_editor()
    pictures, outputs = train_vae.reconstructions(editor.pipeline.vae, people[:PEOPLE], CPU)
    table.row("the second editor's VAE: reconstruction", f"{train_vae.psnr(pictures, outputs).mean():.2f} dB")
    found = train_editor.measure(editor, people[:PEOPLE])
    save_png(sheet, found.sheet(8))
    table.row(
        f"its edits of {PEOPLE} people x 25 prompts",
        f"{found.prompts_met()} of 25 prompts closer, outside {np.nanmean(found.outside):.1f} dB, "
        f"whole {found.whole.mean():.1f} dB; {found.seconds:.2f} s each",
    )
    for name, of in loaded.faces(people, found.edits).items():
        table.row(
            f"... FR by the {name}; recognised; identified among {PEOPLE_OF_RECOGNISERS}",
            f"{of['similarity']:.3f}; {of['recognised']:.0%}; {of['identified']:.0%}",
        )


def check_guidance(table: Table, people: range, loaded: Models) -> None:
    """Measures edits by a few prompts at the paper's guidance. No targets."""
    editor = world.mini_set(guidance_scale=7.5, image_guidance_scale=1.5).load_editor()
    found = train_editor.measure(editor, people[:PEOPLE], prompts=PROMPTS)
    met = found.prompts_met()
    table.row(
        f"edits at the paper's guidance 1.5 / 7.5, {PEOPLE} people x {len(PROMPTS)} prompts",
        f"{met} of {len(PROMPTS)} prompts closer, outside {np.nanmean(found.outside):.1f} dB, "
        f"whole {found.whole.mean():.1f} dB",
    )


def check_recognisers(table: Table, people: range, loaded: Models) -> None:
    """Measures how well recogniser and judge tell people apart, and how robust the judge is."""
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
    """Measures how often CLIP recognises an edit's instruction."""
    found = train_clip.evaluate(Path(loaded.config.clip), CPU, people[:PEOPLE_OF_CLIP], print_nothing)
    table.row(
        f"CLIP, {PEOPLE_OF_CLIP} people: the right prompt nearest to the edit direction",
        f"{found['direction_top1']:.1%} (worst prompt {found['worst_prompt_top1']:.0%})",
        ">= 70 %",
        found["direction_top1"] >= 0.7,
    )


def check_defenses(table: Table, people: range, loaded: Models, clean: np.ndarray) -> None:
    """Measures protected portraits, their reconstructions and edits. clean: edits of unprotected ones."""
    sources = np.array(world.render([(person, 0, None) for person in people[:PEOPLE]]))  # (N, H, W, 3)
    through = partial(train_vae.reconstruct, loaded.editor.pipeline.vae, device=CPU)
    edit = partial(train_editor.apply, loaded.editor, prompts=PROMPTS, seed=0)
    plain, unprotected = through(sources), loaded.faces(people, clean)
    for method in ("noise", "encoder", "vae", "facelock"):
        protected, seconds = protect(method, people[:PEOPLE], sources)
        before, after = decibels(sources, protected), decibels(plain, through(protected))
        gain = before - after
        met = gain >= 8 if method == "encoder" else None
        what = f"{method} at {BUDGET}, {PEOPLE} people: the VAE's gain, PSNR in - PSNR out"
        table.row(what, f"{before:.1f} - {after:.1f} = {gain:.1f} dB", "" if met is None else ">= 8 dB", met)
        edits = edit(protected)
        apart = decibels(clean, edits)
        least, most = (32, math.inf) if method == "noise" else (0, 22 if method != "vae" else math.inf)
        target = {"noise": ">= 32 dB", "vae": ""}.get(method, "<= 22 dB")
        what = f"... PSNR between the edits by {len(PROMPTS)} prompts of protected and clean"
        table.row(what, f"{apart:.1f} dB", target, least <= apart <= most if target else None)
        for name, of in loaded.faces(people, edits).items():
            whole = unprotected[name]
            share = of["similarity"] / whole["similarity"]
            attacked = method == "facelock" and name == "recognizer"
            table.row(
                f"... FR by the {name}; recognised; identified among {PEOPLE_OF_RECOGNISERS}",
                f"{of['similarity']:.3f} of {whole['similarity']:.3f}: {share:.2f} x; "
                f"{of['recognised']:.0%} of {whole['recognised']:.0%}; "
                f"{of['identified']:.0%} of {whole['identified']:.0%}",
                "<= 0.45 x" if attacked else "",
                share <= 0.45 if attacked else None,
            )
    middle = statistics.median(seconds)  # of facelock, the last method
    table.row("one facelock protection, 100 iterations", f"{middle:.1f} s", "<= 15 s", middle <= 15)
    steps = chain(PURIFIER)
    of_protected, of_sources = (
        decibels(clean, edit(np.stack([purify(image, steps, 0, str(n)) for n, image in enumerate(images)])))
        for images in (protected, sources)
    )
    share = (of_protected - apart) / (of_sources - apart)
    table.row(
        f"share of facelock's effect on the edits' PSNR that {PURIFIER} takes back",
        f"{apart:.1f} -> {of_protected:.1f} dB, of {of_sources:.1f} for the purified sources: {share:.0%}",
        ">= 33 %",
        share >= 1 / 3,
    )
    began = time.perf_counter()
    view = FaceFeatures(loaded.recognizers, crops.detector(), CPU)
    for person, source, images in zip(people, sources, edits, strict=False):
        view.add_source(str(person), source)
        view(images, [Key(0, n, str(person)) for n in range(len(images))])
    seconds_of_500 = (time.perf_counter() - began) / (PEOPLE * len(PROMPTS)) * 500
    what = "faces of 500 edits found, and embedded by both"
    table.row(what, f"{seconds_of_500:.0f} s", "<= 40 s", seconds_of_500 <= 40)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the mean PSNR of pictures (..., H, W, 3) uint8, in dB."""
    return float(train_vae.psnr(*(images.reshape(-1, *images.shape[-3:]) for images in (a, b))).mean())


def protect(method: str, people: Sequence[int], sources: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Protects one by one, as defend.py does -> the pixels it would save, (N, H, W, 3) uint8, and seconds."""
    protector = Protector(method=method, budget=BUDGET, models="mini", device=str(CPU))
    protector.preload()
    files, seconds = [], []
    for person, source in zip(people, sources, strict=True):
        began = time.perf_counter()
        seeds = [start_seed(protector.seed, f"portrait_{person}")]
        boxes = crops.boxes_of(crops.largest([source]))
        images, mask = protector.perturb(to_tensor(source), boxes, seeds)
        seconds.append(time.perf_counter() - began)
        files.append(to_uint8_within(images, source[None], BUDGET, mask)[0])
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
    check_second(table, people, loaded, world.WORK / f"check-{args.split}-second.png")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{args.split} split, {minutes:.0f} minutes, {table.missed} targets missed; sheet: {sheet}")
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
