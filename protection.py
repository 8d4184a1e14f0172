"""The one way of a portrait, for one and for thousands: read, find faces, protect, save, measure.

args = defend.parse_args(["--input_path=portrait.png", "--models=mini"])
protector = Protector(args)
subject = protector.load(args.input_path)
(report,) = protector.save([subject], [Path("protected.png")])
print(report)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import masks
import models.sets
from images import (
    Portrait,
    linf,
    load_image,
    load_portrait,
    psnr,
    save_png,
    to_tensor,
    to_uint8_within,
)
from loops import GradientError, Objective, random_start
from methods import METHODS, NEED
from models.denoiser import Denoiser
from models.faces import Box, FaceDetector, clip_box, scale_box
from models.loading import recorded
from models.perceptual import load_perceptual, perceptual_distance_to
from models.recognizers import Recognizer, face_similarity_to, recorded_recognizer
from models.vaes import WorkingVAE, load_vae
from transforms import around
from utils import USUAL_BUDGET, UserError, in_levels, one_line, pick_dtype, start_seed, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OF_SOME = ("lr", "smoothing")  # fields of Run that are flags which few methods read


def readers(name: str) -> str:
    """Lists the methods that read a flag."""
    return ", ".join(key for key, method in METHODS.items() if name in (*method.reads, *method.parameters))


def knobs() -> list[str]:
    """Lists the knobs of all methods: what is a flag that some of them read."""
    defaults = [item for method in METHODS.values() for item in method.parameters.items()]
    return list(dict.fromkeys(name for name, default in defaults if default is not NEED))


def generator_of(seed: int) -> torch.Generator:
    """Seeds the draws of one image's objective: other numbers than those of its start, by the same seed."""
    import torch

    return torch.Generator().manual_seed(start_seed(seed, "objective"))


@dataclass
class Subject:
    """A portrait with the faces found in it, in pixels of its working size."""

    portrait: Portrait
    boxes: list[Box]


@dataclass
class Report:
    """What a saved file measures."""

    path: Path
    method: str
    budget: float
    linf: float
    psnr: float  # dB
    # By recogniser, the attacked ones first: cos(f(D(E(.))), f(source)) of the source and the protected file
    similarity: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    faceless: bool = False  # no face was found, so that there is nothing to compare

    def __str__(self) -> str:
        size = f"L-infinity {self.linf:.4f} (budget {self.budget:g})"
        text = f"{one_line(str(self.path))}: {size}, PSNR {self.psnr:.1f} dB"
        why = " (no face found)" if self.faceless else ""
        values = [
            f"{name} {pair[0]:.2f} -> {pair[1]:.2f}" if pair else f"{name} not measured{why}"
            for name, pair in self.similarity.items()
        ]
        if values:
            text += f"\n  face similarity after a VAE round trip, source -> protected: {', '.join(values)}"
        return text

    def facts(self) -> dict[str, Any]:
        """Gives its numbers, for a table."""
        found = {"method": self.method, "budget": self.budget, "linf": self.linf, "psnr": self.psnr}
        for name, pair in self.similarity.items():
            found |= {f"{name}_before": pair[0], f"{name}_after": pair[1]} if pair else {}
        return found


class Protector:
    """A method with its settings and networks, each of which is loaded when it is first asked for.

    Raises UserError for flags that don't go together; warns of one that the method doesn't read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.name = args.defend_method
        self.method = METHODS[args.defend_method]
        self.seed, self.faces = args.seed, args.faces
        self.checkpointing, self.compile = args.checkpointing, args.compile
        if args.compile and args.checkpointing:
            raise UserError("--compile and --checkpointing don't go together")
        parameters = self.method.parameters
        self.needs = [name for name, default in parameters.items() if default is NEED]
        self.knobs = {name: default for name, default in parameters.items() if default is not NEED}
        self.mask = args.budget_mask or self.method.mask
        self.needs_face = "face_similarity" in self.needs or "face" in self.mask
        self.looks_at_faces = args.check or self.needs_face  # the method, or its report
        for knob in (*knobs(), *OF_SOME):
            if getattr(args, knob, None) is None:
                continue
            if knob in self.knobs:
                self.knobs[knob] = getattr(args, knob)
            elif knob not in self.method.reads:
                flag = "untargeted" if args.targeted is False and knob == "targeted" else knob
                warn(f"--{flag} is ignored: {self.name} has no such knob ({readers(knob)} has)")
        if args.clamp_min is not None or args.clamp_max is not None:
            warn("--clamp_min and --clamp_max change nothing: every method is given [-1, 1] and keeps to it")
        if args.attack_budget > USUAL_BUDGET:
            warn(f"--attack_budget {args.attack_budget:g} is a lot. {in_levels(args.attack_budget)}")
        given = {name: getattr(args, name) for name in ("step_size", "num_iters", *OF_SOME)}
        given = {name: value for name, value in given.items() if value is not None}
        self.run = dataclasses.replace(self.method.run, budget=args.attack_budget, **given)
        self.attacked = models.sets.choose_vaes(args)  # the editors whose VAEs the objective averages over
        if self.method.fp32:
            if args.dtype not in ("auto", "fp32"):
                warn(f"{self.name} runs in fp32, whatever --dtype says")
            self.attacked = [
                dataclasses.replace(one, dtype=pick_dtype("fp32", one.device)) for one in self.attacked
            ]
        self.chosen = chosen = self.attacked[0]
        self.device, self.resolution = chosen.device, chosen.resolution
        self.is_ensemble = bool(vars(args).get("vae_ids"))
        self.denoisers: dict[str, Denoiser] = {}
        self.unavailable: set[str] = set()  # members that only a report asked for, and that can't be had

    def settings(self) -> dict[str, Any]:
        """Gives all that decides about pixels, for run.json: a run with others makes other files."""
        found = {
            "seed": self.seed,
            "defend_method": self.name,
            "method_version": self.method.version,
            "attack_budget": self.run.budget,
            "budget_mask": self.mask,
            **{name: getattr(self.run, name) for name in self.method.reads},
            **self.knobs,
        }
        chosen = self.chosen
        if self.mask != "none":
            found["mask_version"] = masks.VERSION
        if self.needs:  # noise sees no network
            found |= {"model": chosen.kind, "model_id": recorded(chosen.model_id)}
            found |= {"resolution": self.resolution, "dtype": chosen.dtype_name}
        if "vae" in self.needs:
            names = [f"{one.kind}={recorded(one.model_id)}, {one.resolution} px" for one in self.attacked]
            found["vae_ids"] = names if self.is_ensemble else None
        if self.needs_face:
            found |= {"faces": self.faces, "resolution": self.resolution}
        if "face_similarity" in self.needs:
            found["recognizer"] = " ".join(map(recorded_recognizer, chosen.recognizers))
        if "perceptual_distance" in self.needs:
            found["lpips"] = recorded(chosen.perceptual)
        return found

    # -----------------------------------------------------------------------------------------------------
    # networks

    @property
    def vae(self) -> WorkingVAE:
        """The editor's autoencoder."""
        return self.vae_of(self.chosen)

    def vae_of(self, one: models.sets.Chosen) -> WorkingVAE:
        """Loads an editor's autoencoder, or takes it from an earlier call. Raises UserError."""
        how = self.checkpointing, self.compile
        return load_vae(one.editor, one.model_id, one.resolution, one.device, one.dtype, *how)

    @property
    def editor(self) -> Denoiser:
        """The editor's denoiser."""
        return self.editor_of(self.chosen)

    def editor_of(self, one: models.sets.Chosen) -> Denoiser:
        """Loads an editor's denoiser, or takes it from an earlier call. Raises UserError."""
        if one.model_id not in self.denoisers:
            self.denoisers[one.model_id] = Denoiser(one.load_editor(), self.checkpointing)
        return self.denoisers[one.model_id]

    @property
    def recognizers(self) -> list[Recognizer]:
        """What the attack sees."""
        return [self.recognizer_of(member) for member in self.chosen.recognizers]

    def recognizer_of(self, member: str) -> Recognizer:
        """Loads a recogniser or a judge, or takes it from an earlier call. Raises UserError."""
        is_attacked = member in self.chosen.recognizers
        return self.chosen.load_recognizer(member, compile=self.compile and is_attacked)

    @cached_property
    def perceptual(self) -> Any:
        """The LPIPS network."""
        return load_perceptual(self.chosen.perceptual, self.device, self.chosen.dtype, self.compile)

    @cached_property
    def detector(self) -> FaceDetector:
        """What finds faces."""
        return FaceDetector(self.device)

    def preload(self) -> None:
        """Loads what the method can't do without, before anything is written. Raises UserError."""
        if "face_similarity" in self.needs:
            _ = self.recognizers
        if "perceptual_distance" in self.needs:
            _ = self.perceptual
        for one in self.attacked:
            if "vae" in self.needs:
                self.vae_of(one)
            if "editor" in self.needs:
                self.editor_of(one)

    def _if_there(self, name: str, load: Callable[[], Any]) -> Any:
        """Loads a member for a report, or gives None if it can't be had, which is reported and tried once."""
        if name in self.unavailable:
            return None
        try:
            return load()
        except UserError as error:
            self.unavailable.add(name)
            warn(f"{name} not measured: {error}")
            return None

    # -----------------------------------------------------------------------------------------------------
    # the way of a portrait

    def load(self, path: Path, box: Box | None = None) -> Subject:
        """Reads a portrait and, if something needs them, finds its faces, once, on the clean image.

        box: a face given by hand, in the portrait's pixels. Raises UserError naming the file: not readable,
        too small, or no face where the method needs one.
        """
        portrait = load_portrait(path, self.resolution)
        if not self.looks_at_faces:
            return Subject(portrait, [])
        if box is None:
            found = self.detector(portrait.pixels)[: 1 if self.faces == "largest" else None]
        elif inside := clip_box(box, portrait.size):
            found = [inside]
        else:
            height, width = portrait.size
            raise UserError(f"{path}: the face box {box} is outside the {width}x{height} image")
        working = self.chosen.editor.working_size(portrait.size, self.resolution)
        boxes = [inside for face in found if (inside := scale_box(face, portrait.size, working))]
        if not boxes and self.needs_face:
            raise UserError(f"{path}: no face found; say where it is with defend.py --face_box x0,y0,x1,y1")
        return Subject(portrait, boxes)

    def protect(
        self,
        images: Tensor,
        boxes: Sequence[Sequence[Box]],
        seeds: Sequence[int],
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Protects images (B, 3, H, W) in [-1, 1]; returns the same.

        The one way from a script to `METHODS`. boxes: the faces of each image at the working size; seeds: of
        the random starts. Raises UserError if a gradient is not finite.
        """
        size = images.shape[-2:]
        own = self.chosen.editor.working_size(size, self.resolution)  # to which the boxes belong

        def objective_on(x: Tensor, one: models.sets.Chosen) -> Objective:
            working = one.editor.to_working(images, one.resolution)
            inner = one.editor.working_size(size, one.resolution)
            faces = [list(filter(None, (scale_box(box, own, inner) for box in found))) for found in boxes]
            if self.needs_face and not all(faces):
                raise UserError(f"a face is too small for {one.kind}, which works at {inner[1]}x{inner[0]}")
            offers: dict[str, Callable[[], Any]] = {
                "vae": lambda: self.vae_of(one),
                "face_similarity": lambda: face_similarity_to(self.recognizers, working, faces),
                "face_window": lambda: around(faces, working),
                "perceptual_distance": lambda: perceptual_distance_to(self.perceptual, working),
                "editor": lambda: self.editor_of(one),
                "generators": lambda: [generator_of(seed) for seed in seeds],
            }
            needs = {need: offers[need]() for need in self.needs}
            return self.method.objective(x, **needs, **self.knobs)

        def objective(x: Tensor) -> Objective:
            parts = [objective_on(x, one) for one in self.attacked]
            return lambda x_adv, t: sum(part(x_adv, t) for part in parts) / len(parts)

        start = random_start(images, self.run.budget, seeds)
        run = dataclasses.replace(self.run, start=start, callback=callback)
        mask = self.budget_mask(images, boxes)
        try:
            return self.method._replace(objective=objective).protect(images, run, mask)
        except GradientError as error:
            dtype = self.chosen.dtype_name
            hint = "" if dtype == "float32" else "; try --dtype fp32"
            raise UserError(f"{error}, with the networks in {dtype}{hint}") from None

    def budget_mask(self, images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor | None:
        """Gives each pixel's share of the budget, (B, 1, H, W); boxes at the working size."""
        size = images.shape[-2:]
        working = self.chosen.editor.working_size(size, self.resolution)
        scaled = [[inside for box in faces if (inside := scale_box(box, working, size))] for faces in boxes]
        return masks.budget_mask(images, scaled, self.mask)

    def save(
        self,
        subjects: Sequence[Subject],
        outputs: Sequence[Path | None],
        callback: Callable[[int, Tensor], None] | None = None,
        write: Callable[..., None] = save_png,
    ) -> list[Report]:
        """Protects portraits of one size, saves and measures those with an output path. Raises UserError."""
        import numpy as np

        sources = np.stack([subject.portrait.pixels for subject in subjects])  # (B, H, W, 3)
        seeds = [start_seed(self.seed, subject.portrait.path.stem) for subject in subjects]
        boxes = [subject.boxes for subject in subjects]
        images = to_tensor(sources).to(self.device)
        protected = self.protect(images, boxes, seeds, callback)
        pixels = to_uint8_within(protected, sources, self.run.budget, self.budget_mask(images, boxes))
        reports = []
        for subject, output, result in zip(subjects, outputs, pixels, strict=True):
            if output is not None:
                write(output, result, subject.portrait.alpha)
                reports.append(self.measure(subject, output))
        return reports

    def measure(self, subject: Subject, output: Path) -> Report:
        """Reads a protected file back, which is what counts. Raises UserError if it leaves the budget."""
        source = subject.portrait.pixels
        saved = load_image(output).pixels
        size = linf(saved, source)
        if size > self.run.budget + 1e-9:
            raise UserError(f"{output}: differs by {size:.4f} from its source, over the budget")
        facts = self.name, self.run.budget, size, psnr(source, saved)
        report = Report(output, *facts, faceless=not subject.boxes)
        if self.looks_at_faces:
            report.similarity = self._round_trip(subject, saved)
        return report

    def _round_trip(self, subject: Subject, saved: Any) -> dict[str, tuple[float, float] | None]:
        """cos(f(D(E(.))), f(source)) of the source and of the protected file, by recognisers and judges."""
        import numpy as np
        import torch

        panel = self.chosen.panel()
        found: dict[str, tuple[float, float] | None] = dict.fromkeys(panel)
        vae = self._if_there("vae", lambda: self.vae) if subject.boxes else None
        if vae is None:
            return found
        pair = to_tensor(np.stack([subject.portrait.pixels, saved])).to(self.device)
        with torch.no_grad():
            working = self.chosen.editor.to_working(pair[:1], self.resolution)
            trips = vae.decode(vae.encode(pair).latent_dist.mean).sample.clamp(-1, 1).to(pair.dtype)
            for name, member in panel.items():
                if recognizer := self._if_there(name, partial(self.recognizer_of, member)):
                    similarity = face_similarity_to([recognizer], working, [subject.boxes])
                    found[name] = tuple(similarity(trip[None]).item() for trip in trips)
        return found
