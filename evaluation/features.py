"""Defines metrics and computes the features that they need: each image goes through each network once."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.pairing import Key, Size
from images import load_image, to_tensor
from models.clip import Clip, load_clip
from models.config import ModelConfig
from models.faces import Box, FaceDetector
from models.loading import recorded
from models.recognizers import Recognizer, recorded_recognizer
from runs import digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

PIXELS = {"edits", "clean"}  # needs without a network: (B, 3, H, W) in [-1, 1]
FACE = "face:"  # needs of a recogniser: face:NAME:edits, sources, gallery, threshold, strangers


def face_need(recognizer: str, what: str) -> str:
    """Names what a metric needs of a recogniser."""
    return f"{FACE}{recognizer}:{what}"


@dataclass(frozen=True)
class Metric:
    """Describes a metric: a function of batches, what it needs, and how its values are shown.

    needs: `edits` and `clean`, the edits of the unprotected images, (B, 3, H, W) in [-1, 1]; or what
    `load_features` lists.
    """

    name: str  # of its column, and of its CSV file
    title: str  # with an arrow for the direction that a defender wants
    function: Callable[..., Any]  # of what it needs, in that order -> (B,); NaN where it can't be measured
    needs: tuple[str, ...]
    digits: int = 3
    smallest: int = 1  # px, of an image's sides
    infinite: bool = False  # for identical images, which are counted and left out of the mean
    counts: str = ""  # printed before the number of edits, for a metric that is 0 or 1
    judge: str = ""  # of faces: a recogniser, or attacked (the first of those), hardest, any

    @property
    def kind(self) -> str:
        """Returns the name without the judge's, for tables with a column for the judge."""
        return self.name.partition("_")[0] if self.judge else self.name

    @property
    def way(self) -> int:
        """Returns -1 if a defender wants it low, 1 if high, 0 if unknown."""
        return {"↓": -1, "↑": 1}.get(self.title[-1:], 0)

    @property
    def is_of_source(self) -> bool:
        """Returns whether it compares an edit with its source, so that the clean edits are a row, too."""
        return "clean" not in self.needs


class Features:
    """Computes features of edits and of their sources, which it keeps; the base class returns what it got."""

    problems: Sequence[str] = ()  # why some edits can't be measured

    def __init__(self, **given: Any) -> None:
        self.given = given

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        """Takes a source (H, W, 3) uint8 at the size of its edits."""

    def __call__(self, images: np.ndarray, keys: Sequence[Key]) -> dict[str, Any]:
        """Takes edits (B, H, W, 3) uint8 -> by name what metrics may need, (B, ...) each."""
        return self.given


def panel_of(needs: Iterable[str], config: ModelConfig | None) -> dict[str, str]:
    """Returns the recognisers that metrics need, by their names in tables."""
    wanted = {need.split(":")[1] for need in needs if need.startswith(FACE)}
    return {name: member for name, member in config.panel().items() if name in wanted} if wanted else {}


def networks(metrics: Iterable[Metric], config: ModelConfig | None) -> dict[str, str]:
    """Names the networks by which metrics measure, by their part, each with a hash of local weights."""
    needs = {need for metric in metrics for need in metric.needs}
    found: dict[str, list[str]] = {}
    for member in panel_of(needs, config).values():
        part = "judges" if member in config.judges else "attacked recognizers"
        found.setdefault(part, []).append(recorded_recognizer(member, hashed=True))
    if "clip_edits" in needs:
        found["CLIP"] = [recorded(config.clip)]
    if "perceptual" in needs:
        found["LPIPS"] = [recorded(config.perceptual)]
    return {part: ", ".join(names) for part, names in found.items()}


def people_of(gallery: dict[str, Path], references: dict[str, list[Path]]) -> dict[str, str]:
    """Names the pictures by which people are known, with a hash of those other than the sources."""
    given = {"gallery": [*gallery.values()], "other photos": [*itertools.chain(*references.values())]}
    hashes = {name: "".join(sorted(map(digest, paths))) for name, paths in given.items() if paths}
    found = [f"{name} {hashlib.sha256(all_.encode()).hexdigest()[:8]}" for name, all_ in hashes.items()]
    return {"people known by": ", ".join(found) or "the sources"}


def load_features(
    needs: set[str],
    config: ModelConfig | None,
    texts: dict[int, str],
    gallery: dict[str, Path],
    references: dict[str, list[Path]],
) -> list[Features]:
    """Loads what computes clip_edits, clip_sources, clip_texts, perceptual, undetected, own, or `face_need`s.

    gallery: portraits by stem among which a person is looked for; references: other photos of each person.
    Raises UserError.
    """
    found: list[Features] = []
    if needs & {"clip_edits", "clip_sources", "clip_texts"}:
        found.append(ClipFeatures(load_clip(config.clip, config.device, config.dtype), texts))
    if "perceptual" in needs:
        found.append(Features(perceptual=config.load_perceptual()))  # the network: it takes pairs
    if wanted := panel_of(needs, config):
        panel = {name: config.load_recognizer(member) for name, member in wanted.items()}
        detector = FaceDetector(config.device)
        found.append(FaceFeatures(panel, detector, config.device, gallery, references))
    return found


class ClipFeatures(Features):
    """Computes CLIP's embeddings of edits, sources and instructions, (B, D), not normalised."""

    def __init__(self, clip: Clip, texts: dict[int, str]) -> None:
        self.clip = clip
        self.texts = dict(zip(texts, clip.embed_texts(list(texts.values())), strict=True))
        self.sources: dict[tuple[str, Size], Tensor] = {}

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        """Embeds a source."""
        (self.sources[name, pixels.shape[:2]],) = self.clip.embed_images(pixels[None])

    def __call__(self, images: np.ndarray, keys: Sequence[Key]) -> dict[str, Any]:
        """Embeds edits."""
        import torch

        return {
            "clip_edits": self.clip.embed_images(images),
            "clip_sources": torch.stack([self.sources[key.name, images.shape[1:3]] for key in keys]),
            "clip_texts": torch.stack([self.texts[key.prompt] for key in keys]),
        }


class FaceFeatures(Features):
    """Computes embeddings of the largest face of edits, (B, D) of unit length, and of the people in them.

    A person is the source or, with `references`, the other photos: the mean of their embeddings, so that its
    product with an edit's embedding is the mean cosine. Faces are detected once for all recognisers. Where an
    edit shows none, its source's box is used, and `undetected` is 1 instead of 0. If no face of a person is
    found, `problems` names the person, and everything about the edits is NaN. A face is looked for among the
    people and `gallery`; `own` says which of them have an edit's stem.
    """

    def __init__(
        self,
        recognizers: dict[str, Recognizer],
        detector: FaceDetector,
        device: torch.device,
        gallery: dict[str, Path] | None = None,
        references: dict[str, list[Path]] | None = None,
    ) -> None:
        self.recognizers = recognizers
        self.detector = detector
        self.device = device
        self.boxes: dict[tuple[str, Size], Box | None] = {}  # of the sources
        self.people: dict[tuple[str, str, Size | None], Tensor] = {}
        self.stems: list[str] = []  # of the gallery
        self.gallery: dict[str, list[Tensor]] = {name: [] for name in recognizers}
        self.references, self.faceless = references or {}, []
        for name, paths in self.references.items():
            self._add_person(name, None, [load_image(path).pixels for path in paths])
        for stem, path in (gallery or {}).items():
            self._add_person(stem, None, [load_image(path).pixels])

    @property
    def problems(self) -> list[str]:
        """Names the people without a face."""
        names = {name for (name, _), box in self.boxes.items() if box is None}
        where = {"the source": names, "the other photos": {*self.references} & {*self.faceless}}
        lines = {place: ", ".join(sorted(people)) for place, people in where.items() if people}
        return [f"no face found in {place}, FR not measured: {people}" for place, people in lines.items()]

    def add_source(self, name: str, pixels: np.ndarray) -> None:
        """Finds a source's face and, unless there are other photos of the person, embeds it."""
        size = pixels.shape[:2]
        if self.references:
            self.boxes[name, size] = next(iter(self.detector(pixels)), None)
        else:
            self.boxes[name, size] = self._add_person(name, size, [pixels])

    def _add_person(self, name: str, size: Size | None, pictures: Sequence[np.ndarray]) -> Box | None:
        """Adds a person to the gallery -> the box of the last face; None if no picture shows one."""
        found = [(pixels, faces[0]) for pixels in pictures if (faces := self.detector(pixels))]
        if not found:
            self.faceless.append(name)
            return None
        self.stems.append(name)
        of_pictures = [self._embed(pixels[None], [box]) for pixels, box in found]
        for recognizer, portraits in self.gallery.items():
            portraits.append(sum(one[recognizer][0] for one in of_pictures) / len(of_pictures))
            self.people[recognizer, name, size] = portraits[-1]
        return found[-1][1]

    def __call__(self, images: np.ndarray, keys: Sequence[Key]) -> dict[str, Any]:
        """Finds the edits' faces and embeds them."""
        import torch

        size = images.shape[1:3]
        of_sources = [self.boxes[key.name, size] for key in keys]
        found = [next(iter(boxes), None) for boxes in self.detector.find(images)]
        whole = (0, 0, size[1], size[0])  # where there is no box, and nothing is measured
        boxes = [box or source or whole for box, source in zip(found, of_sources, strict=True)]
        measured = torch.tensor([source is not None for source in of_sources])
        undetected = torch.tensor([float(box is None) for box in found])
        stems = self.stems or [""]  # if nobody has a face, nothing is measured
        own = torch.tensor([[stem == key.name for stem in stems] for key in keys])  # (B, G)
        features = {"undetected": torch.where(measured, undetected, torch.nan), "own": own}
        of_people = None if self.references else size
        for name, embeddings in self._embed(images, boxes).items():
            unknown = torch.full_like(embeddings[0], torch.nan)
            people = [self.people.get((name, key.name, of_people), unknown) for key in keys]
            people = [one if there else unknown for one, there in zip(people, measured, strict=True)]
            recognizer = self.recognizers[name]
            features |= {
                face_need(name, "edits"): embeddings,
                face_need(name, "sources"): torch.stack(people),
                face_need(name, "gallery"): torch.stack(self.gallery[name] or [unknown]),  # (G, D)
                face_need(name, "threshold"): recognizer.threshold,
                face_need(name, "strangers"): recognizer.strangers_mean,
            }
        return features

    def _embed(self, images: np.ndarray, boxes: Sequence[Box]) -> dict[str, Tensor]:
        """Embeds one face of each image, by each recogniser."""
        import torch

        tensor = to_tensor(images).to(self.device)
        with torch.no_grad():
            return {
                name: recognizer.embed(tensor, [[box] for box in boxes]).cpu()
                for name, recognizer in self.recognizers.items()
            }
