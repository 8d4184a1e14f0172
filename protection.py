"""Protects portraits: the library's entry point, which the scripts and the page use, too.

from protection import Protector
Protector(method="facelock", budget=0.06, models="mini").protect("portrait.png").save("protected.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import masks
import utils
from images import Portrait, as_portrait, linf, load_image, psnr, save_png, to_tensor, to_uint8_within
from loops import GradientError, Objective, random_start
from methods import METHODS, NEED
from models.config import ModelConfig, ModelSettings, identity, resolve_vaes
from models.editors import DENOISERS, Editor
from models.faces import Box, FaceDetector, clip_box, scale_boxes
from models.loading import load_all, recorded, shown
from models.perceptual import perceptual_distance_to
from models.recognizers import face_similarity_to, recorded_recognizer
from transforms import Draws, around
from utils import USUAL_BUDGET, UserError, in_levels, one_line, pick_dtype, start_seed, warn
from verdict import Face, face_of, numbered

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.protector import Network

    Callback = Callable[[int, Tensor], None] | None  # gets (iteration, values (B,))

NUMBERS = ("step_size", "num_iters", "lr", "rms", "momentum")  # fields of Run, which loops or objectives read


def readers(name: str) -> dict[str, Any]:
    """Returns the methods that read a flag, each with its own default."""
    own = {
        key: method.parameters | {one: getattr(method.run, one) for one in method.reads}
        for key, method in METHODS.items()
    }
    return {key: values[name] for key, values in own.items() if name in values}


def methods_for(editor: type[Editor]) -> list[str]:
    """Lists the methods that work on a kind of editor; a network, for one autoencoder alone, is left out."""
    lacking = DENOISERS - {editor.denoiser and editor.denoiser.need}
    loops = {name: method for name, method in METHODS.items() if not method.is_network}
    return [name for name, method in loops.items() if lacking.isdisjoint(method.parameters)]


def output_prefix(models: str) -> str:
    """Returns the prefix of a protected file's name, which shows whether stand-ins made the file."""
    return "protected_mini" if models == "mini" else "protected"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """Says how portraits are protected, and by which models. None: the method's default."""

    method: str = "facelock"  # one of METHODS
    budget: float | None = None  # L-infinity in [-1, 1]
    seed: int = 0  # of the random start, together with the file's stem
    step_size: float | None = None
    num_iters: int | None = None
    lr: float | None = None
    rms: float | None = None
    momentum: float | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)  # of the method's objective: {"c": 0.1}
    budget_mask: str | None = None  # one of BUDGET_MASKS
    faces: str = "largest"  # or all
    check: bool = False  # whether every method's report measures face similarity
    checkpointing: bool = False  # less memory, more time
    compile: bool = False


@dataclass
class Subject:
    """Holds a portrait and the boxes of the faces to protect, in its own pixels."""

    portrait: Portrait
    boxes: list[Box]
    n_found: int = 0  # faces, not all of which need be in `boxes`


@dataclass
class Report:
    """Holds the measurements of a saved file."""

    path: Path
    method: str
    budget: float
    linf: float
    psnr: float  # dB
    # By recogniser, the attacked ones first: cos(f(D(E(.))), f(source)) of the source and the protected file
    similarity: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    faceless: bool = False  # no face was found, so that there is nothing to compare
    faces: list[Face] = field(default_factory=list)  # the same for each face
    n_found: int = 0  # faces in the portrait

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

    def verdict(self, advice: str = "") -> list[str]:
        """Returns the verdict on each face after the round trip, by the judges that have a threshold."""
        told = [face.verdict("round trip", advice) for face in self.faces if face.has_judges]
        return [f"{number}{verdict}" for number, verdict in zip(numbered(told), told, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Returns the numbers, for a table."""
        found = {"method": self.method, "budget": self.budget, "linf": self.linf, "psnr": self.psnr}
        for name, pair in self.similarity.items():
            found |= {f"{name}_before": pair[0], f"{name}_after": pair[1]} if pair else {}
        return found


class Protector:
    """Holds a method with its settings and networks, each of which is loaded when first needed.

    given: fields of Settings that replace those of `settings`. Raises UserError for settings that don't go
    together; warns of settings that the method doesn't read.
    """

    def __init__(self, settings: Settings | None = None, **given: Any) -> None:
        self.wanted = wanted = replace(settings or Settings(), **given)
        if wanted.method not in METHODS:
            raise UserError(f"{wanted.method!r} is not a method; there are {', '.join(METHODS)}")
        if wanted.compile and wanted.checkpointing:
            raise UserError("--compile and --checkpointing don't go together")
        # what the objective averages over
        how = {"checkpointing": wanted.checkpointing, "compile": wanted.compile}
        self.attacked = [replace(one, **how) for one in resolve_vaes(replace(wanted, edit={}))]
        self.name, self.seed, self.method = wanted.method, wanted.seed, METHODS[wanted.method]
        usual = METHODS[self._trained()["method"]] if self.method.is_network else self.method
        budget = usual.run.budget
        if wanted.budget is not None:
            budget = utils.given(utils.budget_size, "budget", wanted.budget)
        if budget > USUAL_BUDGET:
            warn(f"--attack_budget {budget:g} is large. {in_levels(budget)}")
        knobs = dict(wanted.knobs)
        if self.method.is_network and (refine := knobs.pop("refine", 0)):
            self.method = self.method.refined(usual, refine)
        parameters = self.method.parameters
        self.needs = [name for name, default in parameters.items() if default is NEED]
        numbers = {name: value for name in NUMBERS if (value := getattr(wanted, name)) is not None}
        if self.method.is_network:
            numbers.pop("num_iters", None)  # meant for loops that start at random
        self.run = replace(self.method.run, budget=budget, **numbers)
        known = {**knobs, **numbers}
        self.knobs = {name: known.get(name, own) for name, own in parameters.items() if own is not NEED}
        for name, value in known.items():
            if not readers(name):
                raise UserError(f"no method has a knob {name!r}")
            reads = name in (*self.knobs, *self.method.reads, "step_size", "num_iters")
            if not reads and self.name not in readers(name):
                flag = "untargeted" if value is False and name == "targeted" else name
                warn(f"--{flag} is ignored: {self.name} has no such knob, unlike {', '.join(readers(name))}")
        self.mask = wanted.budget_mask or self.method.mask
        self.needs_face = "face_similarity" in self.needs or "face" in self.mask
        if self.method.is_network:  # one with a frame changes only faces, whatever the mask
            self.needs_face |= self._trained()["has_frame"]
        self.looks_at_faces = wanted.check or self.needs_face  # the method, or its report
        # a network alone answers at once; what its report would measure takes longer
        self.reports_faces = wanted.check or (self.needs_face and not self.is_at_once)
        if needed := DENOISERS & {*self.needs}:
            for one in self.attacked:
                one.check_denoiser(self.name, needed)
        if self.method.fp32:
            if wanted.dtype not in ("auto", "fp32"):
                warn(f"{self.name} runs in fp32, whatever --dtype says")
            self.attacked = [replace(one, dtype=pick_dtype("fp32", one.device)) for one in self.attacked]
        self.config = self.attacked[0]
        if self.method.is_network:  # recognisers that its training saw are no judges
            seen = self._trained().get("recognizers", ())
            judges = tuple(one for one in self.config.judges if identity(one) not in seen)
            self.config = replace(self.config, judges=judges)
        self.device, self.resolution = self.config.device, self.config.resolution
        self.unavailable: set[str] = set()  # members that a report would use, but that can't be loaded

    def settings(self) -> dict[str, Any]:
        """Returns all that determines pixels, for run.json: a run with other values makes other files."""
        config = self.config
        found = {
            "seed": self.seed,
            "defend_method": self.name,
            "method_version": self.method.version,
            "attack_budget": self.run.budget,
            "budget_mask": self.mask,
            **{name: getattr(self.run, name) for name in self.method.reads},
            **self.knobs,
        }
        if self.mask != "none":
            found["mask_version"] = masks.VERSION
        if self.method.is_network:
            found |= {"protector": recorded(config.protector), "model": config.kind}
            found |= {"resolution": self.resolution, "dtype": config.dtype_name}
        if self.is_at_once:
            del found["seed"]  # nothing is random
        if self.needs:  # noise uses no network
            found |= {"model": config.kind, "model_id": recorded(config.vae)}
            found["dtype"] = config.dtype_name
        if self.needs or self.needs_face:
            found["resolution"] = self.resolution
        if "vae" in self.needs:
            names = [f"{one.kind}={recorded(one.vae)}, {one.resolution} px" for one in self.attacked]
            found["vae"] = names if self.wanted.vae else None
            found["vae_ids"] = None  # where an older run.json names several editors
        if self.needs_face:
            found["faces"] = self.wanted.faces
            if len(self.attacked) > 1:
                found["boxes_version"] = 2  # scaled for each autoencoder from the portrait's own pixels
        if "face_similarity" in self.needs:
            found["recognizer"] = " ".join(map(recorded_recognizer, config.recognizers))
        if "perceptual_distance" in self.needs:
            found["lpips"] = recorded(config.perceptual)
        return found

    # -----------------------------------------------------------------------------------------------------
    # networks

    def loaders(self, one: ModelConfig) -> dict[str, Callable[[], Any]]:
        """Returns, for each need of a method, a function that loads its network or raises UserError.

        one: the editor whose VAE, denoiser and attention are loaded.
        """
        return {
            "vae": one.load_vae,
            **dict.fromkeys(DENOISERS, one.load_denoiser),
            "face_similarity": lambda: list(map(self.config.load_recognizer, self.config.recognizers)),
            "perceptual_distance": self.config.load_perceptual,
        }

    @property
    def network(self) -> Network:
        """Loads the network of `instant`. Raises UserError."""
        from models.protector import is_for, load_protector

        trained, config = self._trained(), self.config
        if not is_for(trained, config.vae):
            warn(f"{shown(config.protector)} was not trained for the autoencoder of {shown(config.vae)}")
        return load_protector(config.protector, self.device, config.dtype)

    def _trained(self) -> dict[str, Any]:
        """Reads what the network's directory records about its training. Raises UserError."""
        from models.protector import read_config

        if (member := self.attacked[0].protector) is None:
            text = "needs a network that was trained for this autoencoder: --protector DIRECTORY"
            raise UserError(f"instant {text} (train_protector.py makes one)")
        config = read_config(member)
        trained = config["trained"]
        if trained["method"] not in METHODS:
            raise UserError(f"{shown(member)}: trained on {trained['method']!r}, which is not a method")
        return trained | {"has_frame": config.get("frame") is not None}

    @property
    def num_iters(self) -> int:
        """Returns the number of iterations, 0 without a loop."""
        return self.run.num_iters if "num_iters" in self.method.reads else 0

    @property
    def is_at_once(self) -> bool:
        """Returns whether nothing follows the network."""
        return self.method.is_network and not self.needs

    @cached_property
    def detector(self) -> FaceDetector:
        """Loads the face detector."""
        return FaceDetector(self.device)

    def preload(self) -> None:
        """Loads what the method needs, before anything is written.

        Raises UserError; for missing weights, one that names all of them, including the report's.
        """
        needed, asked = [lambda: self.network] if self.method.is_network else [], []
        for one in self.attacked:
            needed += [load for need, load in self.loaders(one).items() if need in self.needs]
        if self.reports_faces:
            asked = [partial(self.config.load_recognizer, member) for member in self.config.judges]
        load_all(needed, asked)

    # -----------------------------------------------------------------------------------------------------
    # from a portrait to a protected file

    def protect(
        self,
        image: str | os.PathLike | Image.Image | np.ndarray,
        boxes: Sequence[Box] = (),
        callback: Callback = None,
    ) -> Image.Image:
        """Protects one picture: a path, a PIL image or (H, W, 3) uint8 -> a PIL image, within the budget.

        boxes: faces given by hand, as in `load`. A file's alpha is kept. Raises UserError as `load` does, and
        for models that can't be loaded.
        """
        subject = self.load(image, boxes)
        self.config.warn_of([subject.portrait.size])
        (pixels,) = self.pixels([subject], callback)
        protected = Image.fromarray(pixels)
        if subject.portrait.alpha is not None:
            protected.putalpha(Image.fromarray(subject.portrait.alpha))
        return protected

    def load(self, image: str | os.PathLike | Image.Image | np.ndarray, boxes: Sequence[Box] = ()) -> Subject:
        """Reads a portrait and, if anything needs them, finds its faces, once, on the clean image.

        boxes: faces given by hand, in the portrait's pixels. Raises UserError naming the file if it can't be
        read, is too small, or shows no face where the method needs one.
        """
        portrait = as_portrait(image, self.resolution, self.method.most_pixels)
        if not self.looks_at_faces:
            return Subject(portrait, [])
        path, size = portrait.path, portrait.size
        if outside := [box for box in boxes if not clip_box(box, size)]:
            raise UserError(f"{path}: the face box {outside[0]} is outside the {size[1]}x{size[0]} image")
        there = boxes or self.detector(portrait.pixels)
        chosen = scale_boxes(there if boxes or self.wanted.faces == "all" else there[:1], size, size)
        sizes = [one.editor.working_size(size, one.resolution) for one in self.attacked]
        found = [box for box in chosen if all(scale_boxes([box], size, working) for working in sizes)]
        if not found and self.needs_face:
            why = f"the face is too small to be worked on at {'x'.join(map(str, min(sizes)[::-1]))}"
            why = why if chosen else "no face found; say where it is with defend.py --face_box x0,y0,x1,y1"
            raise UserError(f"{path}: {why}")
        return Subject(portrait, found, len(there))

    def perturb(
        self,
        images: Tensor,
        boxes: Sequence[Sequence[Box]],
        seeds: Sequence[int],
        callback: Callback = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Protects images (B, 3, H, W) in [-1, 1] -> protected, and the budget's mask (B, 1, H, W) or None.

        boxes: the faces of each image, in its pixels; seeds: of the random starts. Raises UserError if a
        gradient is not finite.
        """
        mask = masks.budget_mask(images, boxes, self.mask)
        start = partial(self._guess, images, boxes, mask)
        if not self.method.is_network:
            start = partial(random_start, images, self.run.budget, seeds)
        run = replace(self.run, start=start, is_warm=self.method.is_network, callback=callback)
        objective = self.objective_of(images, boxes, lambda: [generator_of(seed) for seed in seeds])
        try:
            return self.method._replace(objective=objective).protect(images, run, mask), mask
        except GradientError as error:
            dtype = self.config.dtype_name
            hint = "" if dtype == "float32" else "; try --dtype fp32"
            raise UserError(f"{error}, with the networks in {dtype}{hint}") from None

    def _guess(self, images: Tensor, boxes: Sequence[Sequence[Box]], mask: Tensor | None) -> Tensor:
        """Runs the network on images (B, 3, H, W) -> the loop's start, of that shape; boxes as in `perturb`.

        The network sees the working size, or each face in its own frame, cut out of the full-size image.
        """
        import torch

        from models.protector import limited

        config, size, budget = self.config, images.shape[-2:], self.run.budget
        whole = images.new_ones(len(images), 1, *size) if mask is None else mask
        seen, network = [images, budget * whole], self.network
        if network.frame is None:
            seen = [config.editor.to_working(one, self.resolution) for one in seen]
        with torch.no_grad():
            shares = network(*seen, boxes)  # only frames need boxes, and are cut out of the images themselves
            if network.frame is None:
                shares = config.editor.from_working(shares, size, self.resolution)
            shares.mul_(budget * (whole > 0))  # a loop that follows counts what isn't 0
            return limited(shares, whole, self._trained()["rms"]).add_(images)

    def objective_of(
        self, images: Tensor, boxes: Sequence[Sequence[Box]], draws: Callable[[], Draws]
    ) -> Callable[[Tensor], Objective]:
        """Returns a maker of the objective of images (B, 3, H, W), the mean over the attacked autoencoders.

        boxes as in `perturb`; draws: makes one generator per image, anew for each autoencoder.
        """
        size = images.shape[-2:]

        def objective_on(x: Tensor, one: ModelConfig) -> Objective:
            working = one.editor.to_working(images, one.resolution)
            faces = [
                scale_boxes(found, size, one.editor.working_size(size, one.resolution)) for found in boxes
            ]
            load = self.loaders(one)
            offers = load | {
                "face_similarity": lambda: face_similarity_to(load["face_similarity"](), working, faces),
                "perceptual_distance": lambda: perceptual_distance_to(load["perceptual_distance"](), working),
                "face_window": lambda: around(faces, working),
                "generators": draws,
            }
            needs = {need: offers[need]() for need in self.needs}
            return self.method.objective(x, **needs, **self.knobs)

        def objective(x: Tensor) -> Objective:
            parts = [objective_on(x, one) for one in self.attacked]
            return lambda x_adv, t: sum(part(x_adv, t) for part in parts) / len(parts)

        return objective

    def pixels(self, subjects: Sequence[Subject], callback: Callback = None) -> np.ndarray:
        """Protects portraits of one size -> (B, H, W, 3) uint8, within the budget. Raises UserError."""
        found = [subject.portrait.pixels for subject in subjects]
        sources = np.stack(found) if len(found) > 1 else found[0][None]  # (B, H, W, 3), no copy of one
        seeds = [start_seed(self.seed, subject.portrait.path.stem) for subject in subjects]
        images = to_tensor(sources).to(self.device)
        protected, mask = self.perturb(images, [subject.boxes for subject in subjects], seeds, callback)
        return to_uint8_within(protected, sources, self.run.budget, mask)

    def save(
        self,
        subjects: Sequence[Subject],
        outputs: Sequence[Path | None],
        callback: Callback = None,
        write: Callable[..., None] = save_png,
    ) -> list[Report]:
        """Protects portraits of one size, saves and measures those with an output path. Raises UserError."""
        reports = []
        for subject, output, pixels in zip(subjects, outputs, self.pixels(subjects, callback), strict=True):
            if output is not None:
                write(output, pixels, subject.portrait.alpha)
                reports.append(self.measure(subject, output))
        return reports

    def measure(self, subject: Subject, output: Path) -> Report:
        """Measures a protected file as it is on disk. Raises UserError if it exceeds the budget."""
        source, saved = subject.portrait.pixels, load_image(output).pixels
        size = linf(saved, source)
        if size > self.run.budget + 1e-9:
            raise UserError(f"{output}: differs by {size:.4f} from its source, over the budget")
        faces = self._round_trip(subject, saved) if self.reports_faces else []
        similarity = {}
        for name in self.config.panel() if self.reports_faces else ():
            pairs = [face.values[name] for face in faces if name in face.values]
            similarity[name] = tuple(np.mean(pairs, axis=0).tolist()) if pairs else None
        facts = self.name, self.run.budget, size, psnr(source, saved)
        return Report(output, *facts, similarity, not subject.boxes, faces, subject.n_found)

    def _round_trip(self, subject: Subject, saved: np.ndarray) -> list[Face]:
        """Measures faces in D(E(.)) of the source and of the protected file, by recognisers and judges."""
        import torch

        vae = self._if_there("vae", self.loaders(self.config)["vae"]) if subject.boxes else None
        if vae is None:
            return []
        load, members = self.config.load_recognizer, self.config.panel().items()
        loaded = {name: self._if_there(name, partial(load, member)) for name, member in members}
        panel = {name: recognizer for name, recognizer in loaded.items() if recognizer}
        pair = to_tensor(np.stack([subject.portrait.pixels, saved])).to(self.device)
        size = subject.portrait.size
        boxes = scale_boxes(subject.boxes, size, self.config.editor.working_size(size, self.resolution))
        with torch.no_grad():
            working = self.config.editor.to_working(pair[:1], self.resolution)
            images = torch.cat([working, vae.round_trip(pair)])
        return [face_of(self.config, panel, images, [box] * 3) for box in boxes]

    def _if_there(self, name: str, load: Callable[[], Any]) -> Any:
        """Loads a member for a report; if that fails, warns once and returns None."""
        if name in self.unavailable:
            return None
        try:
            return load()
        except UserError as error:
            self.unavailable.add(name)
            warn(f"{name} not measured: {error}")
            return None


def generator_of(seed: int) -> torch.Generator:
    """Makes the generator of one image's objective, independent of its random start."""
    import torch

    return torch.Generator().manual_seed(start_seed(seed, "objective"))
