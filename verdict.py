"""Asks the judges about a protection: do they take a face for the same person, without it and with it?

defend.py asks about the round trip through the attacked autoencoder, edit.py and the page about edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from images import to_tensor
from models.config import TRAINED_HERE, ModelConfig, identity
from models.faces import Box
from utils import UserError, warn

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from models.faces import FaceDetector
    from models.recognizers import Recognizer

HEADLINES = {  # by outcome; {}: edit or round trip
    "held": "The protection held in this {}",
    "partly": "The protection held only partly in this {}",
    "failed": "The protection did not hold in this {}",
    "nothing": "Nothing to compare in this {}",
    "unknown": "With protection, the face in this {} is less like the source's",
    "unmoved": "With protection, the face in this {} is not clearly less like the source's",
}
UNKNOWN = (
    "This only says which way the similarity moved. No verification threshold is known for these "
    "recognisers, so whether the face still passes for the same person is not known."
)
HIDDEN = {
    "edit": "This edit hides the person even without protection: try another instruction or seed.",
    "round trip": "Even without protection, no judge sees the same person after the round trip.",
}
ALL_ATTACKED = (
    "No verdict on this {}: the protection attacked every recogniser that is named ({}). "
    "Name a judge of another family with --judge (docs/models.md)."
)
ADVICE = "Try a larger budget, more iterations or another method."


class Verdict(NamedTuple):
    """Holds what the judges say about one face."""

    outcome: str  # of HEADLINES
    headline: str
    reasons: list[str]  # one per judge, and what to do about it

    def __str__(self) -> str:
        return "\n  ".join([self.headline, *self.reasons])


@dataclass
class Face:
    """Holds how much of one face is left in two pictures: the edits of the source and of its protection."""

    found: list[bool] = field(default_factory=list)  # whether the detector finds it in each; empty: not asked
    values: dict[str, list[float]] = field(default_factory=dict)  # FR, by judges and attacked recognisers
    thresholds: dict[str, float | None] = field(default_factory=dict)  # above: taken for the same person
    left: dict[str, list[float]] = field(default_factory=dict)  # FR on the scale that recognisers share
    attacked: tuple[str, ...] = ()  # those that the protection has seen: no judges
    trained_here: tuple[str, ...] = ()  # judges that were trained like the attacked recogniser

    @property
    def has_judges(self) -> bool:
        """Returns whether any judge, unseen by the protection, has a threshold."""
        return any(self.thresholds[name] is not None for name in self.values if name not in self.attacked)

    def verdict(self, made: str = "edit", advice: str = ADVICE) -> Verdict:
        """Returns the judges' verdict. made: what both pictures are, a key of HIDDEN."""
        judges = [name for name in self.values if name not in self.attacked]
        known = [name for name in judges if self.thresholds[name] is not None]
        if not known:
            less = judges and all(self.values[name][1] < self.values[name][0] for name in judges)
            outcome = "unknown" if less else "unmoved"
            return Verdict(outcome, HEADLINES[outcome].format(made), [UNKNOWN])
        told, held = [], []
        if self.found:
            there = ["the face is found" if found else "no face is found" for found in self.found]
            first = f"In the {made} of the unprotected picture {there[0]}"
            told.append(f"{first}, in that of the protected one {there[1]}.")
        for name in known:
            (before, after), threshold = self.values[name], self.thresholds[name]
            if before <= threshold:
                told.append(f"{name} can't judge this face: no match even without protection.")
                continue
            held.append(after <= threshold)
            says = "held: no longer the same person" if held[-1] else "did not hold: still the same person"
            told.append(f"{name}: {says} ({before:.2f} → {after:.2f}, the same above {threshold:.2f}).")
        outcome = ("held" if all(held) else "partly" if any(held) else "failed") if held else "nothing"
        more = {"nothing": HIDDEN[made], "partly": advice, "failed": advice}.get(outcome)
        return Verdict(outcome, HEADLINES[outcome].format(made), [*told, more] if more else told)


def face_of(
    config: ModelConfig, panel: Mapping[str, Recognizer], images: Tensor, boxes: Sequence[Box]
) -> Face:
    """Measures one face in (3, 3, H, W): the source, the edit of it, and the edit of its protected version.

    panel: recognisers by their names in `config.panel()`; boxes: the face's box in each image.
    """
    import torch

    members = config.panel()
    attacked = tuple(name for name in panel if members[name] in config.recognizers)
    siblings = tuple(name for name in panel if identity(members[name]) in TRAINED_HERE)
    face = Face(attacked=attacked, trained_here=siblings)
    for name, recognizer in panel.items():
        with torch.no_grad():
            source, *others = recognizer.embed(images, [[box] for box in boxes])
        face.values[name] = [float(source @ other) for other in others]
        face.thresholds[name] = recognizer.threshold
        face.left[name] = recognizer.left(torch.tensor(face.values[name])).tolist()
    return face


def all_attacked(config: ModelConfig, made: str) -> Verdict | None:
    """Returns a verdict if the protection attacked every recogniser, so that none can judge; else None."""
    if config.judges:
        return None
    return Verdict("nothing", ALL_ATTACKED.format(made, ", ".join(config.panel())), [])


def compare(
    config: ModelConfig,
    detector: FaceDetector,
    source: np.ndarray,
    edits: Sequence[np.ndarray],
    boxes: Sequence[Box],
    judges_alone: bool = False,
) -> list[Face]:
    """Measures each face of a source in the edits of it and of its protected version, (H, W, 3) uint8 each.

    As in evaluation/, faces are detected in the edits, too; where none is found, the source's box is used.
    Warns of recognisers that can't be loaded. Raises UserError if there are judges but none can be loaded.
    """
    import numpy as np
    import torch

    panel = {}
    for name, member in config.panel().items():
        if judges_alone and member in config.recognizers:
            continue
        try:
            panel[name] = config.load_recognizer(member, torch.float32)
        except UserError as error:
            warn(f"{name} left out: {error}")
    attacked = {name for name, member in config.panel().items() if member in config.recognizers}
    if config.judges and not set(panel) - attacked:
        raise UserError("no judge can be loaded; name another with --judge")
    images = to_tensor(np.stack([source, *edits])).to(config.device)
    detected = [detector(edit) for edit in edits]
    faces = []
    for box in boxes:
        overlapping = [[other for other in found if shared(box, other)] for found in detected]
        nearest = [max(found, key=lambda other: shared(box, other), default=box) for found in overlapping]
        face = face_of(config, panel, images, [box, *nearest])
        face.found = [bool(found) for found in overlapping]
        faces.append(face)
    return faces


def shared(box: Box, other: Box) -> int:
    """Counts the pixels that two boxes share."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    return max(0, across) * max(0, down)


def numbered(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns a prefix for each verdict: `Face 1: ` and so on, empty if there is only one."""
    return [f"Face {number}: " if len(verdicts) > 1 else "" for number in range(1, len(verdicts) + 1)]
