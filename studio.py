"""What the page of app.py does with a visitor's pictures, of which Gradio knows nothing."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit import edit_portraits
from images import load_image, load_portrait, save_png, to_tensor
from models.faces import Box, scale_box
from protection import Protector, Report
from utils import LEVEL, UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

EDITS = ("your picture", "the protected picture")
MOST_PIXELS = 32_000_000  # a loop keeps some ten float tensors of a picture's size
SHOWN_SIDE = 1600  # px; a larger picture is shown reduced
AMPLIFY = 10  # of the difference, which is shown around grey


class Cancelled(Exception):
    """The visitor wants the loop to stop."""


@dataclass
class Visit:
    """What one open page has; its folder is deleted with it."""

    folder: Path
    uploads: list[Path] = field(default_factory=list)  # Gradio's copies; other visits may have the same
    source: Path | None = None
    boxes: list[Box] = field(default_factory=list)  # of faces, in the source's pixels
    chosen: list[Box] = field(default_factory=list)  # those that the protected picture was made for
    protected: Path | None = None
    corner: tuple[int, int] | None = None  # the first of two clicks
    cancelled: bool = False

    def new_folder(self) -> Path:
        """Makes a place for a file of a known name; browsers keep what an address once showed."""
        return Path(tempfile.mkdtemp(dir=self.folder))


@dataclass
class Face:
    """What is left of one face in the edit of the source and in that of the protected picture."""

    found: list[bool]  # whether the detector finds it there
    values: dict[str, list[float]] = field(default_factory=dict)  # FR, by judges and attacked recognisers
    thresholds: dict[str, float | None] = field(default_factory=dict)  # above: taken for the same person
    attacked: tuple[str, ...] = ()  # those of them that the protection has seen, which are no judges

    def verdict(self) -> tuple[str, str]:
        """Says what this means by the judges -> a headline and the reasons."""
        judges = [name for name in self.values if name not in self.attacked]
        unknown = [name for name in judges if self.thresholds[name] is None]
        judges = [name for name in judges if name not in unknown]
        if not judges:
            less = unknown and all(self.values[name][1] < self.values[name][0] for name in unknown)
            return f"With protection, the edited face is {'' if less else 'not clearly '}less like yours", (
                "That is which way the similarity moved. No verification threshold is published for these "
                "recognisers, so whether the face still passes for the same person is not known."
            )
        told, takers = [], []
        for i, edit in enumerate(EDITS):
            who = [name for name in judges if self.values[name][i] > self.thresholds[name]]
            takes = f"{' and '.join(who)} take{'s' if len(who) == 1 else ''}" if who else "no judge takes"
            face = "the face is found" if self.found[i] else "no face is found"
            told.append(f"In the edit of {edit} {face}, and {takes} it for the same person.")
            takers.append(who)
        if not takers[0]:
            told.append("This edit hides the person even without protection: try another, or another seed.")
            return "Nothing to compare in this edit", " ".join(told)
        if blind := [name for name in judges if name not in takers[0]]:
            told.append(f"{' and '.join(blind)} can't judge this face, even your own edit isn't you to it.")
        if takers[1]:
            told.append("Try a larger budget, more iterations or another method.")
            return "The protection did not hold in this edit", " ".join(told)
        return "The protection held in this edit", " ".join(told)


class Studio:
    """Does what the page asks for, by the scripts' own functions. Raises UserError, as they do.

    The networks are loaded at once, so that what is wrong with them is said before anybody waits.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.visits: dict[str, Visit] = {}  # by Gradio's name of a session
        protector = Protector(args)
        protector.preload()
        self.detector, self.chosen = protector.detector, protector.chosen
        self.editor = self.chosen.load_editor()

    def open(self, session: str) -> Visit:
        """Begins a visit."""
        visit = self.visits[session] = Visit(Path(tempfile.mkdtemp(dir=self.folder)))
        return visit

    def close(self, visit: Visit | None) -> None:
        """Ends a visit and deletes its pictures."""
        if visit is not None:
            visit.cancelled = True
            self.visits = {session: other for session, other in self.visits.items() if other is not visit}
            shutil.rmtree(visit.folder, ignore_errors=True)
            for path in set(visit.uploads).difference(*(other.uploads for other in self.visits.values())):
                path.unlink(missing_ok=True)

    def look(self, visit: Visit, path: Path) -> None:
        """Takes a picture and finds the faces in it."""
        if path.is_relative_to(self.folder):
            visit.uploads.append(path)
            path = Path(shutil.copy(path, visit.new_folder()))
        portrait = load_portrait(path, self.chosen.resolution)
        height, width = portrait.size
        if height * width > MOST_PIXELS:
            most = f"the {MOST_PIXELS / 1e6:.0f} megapixels that this page takes"
            raise UserError(f"{path}: {width}x{height} is more than {most}; reduce it, or use defend.py")
        visit.source, visit.boxes = path, self.detector(portrait.pixels)

    def point(self, visit: Visit, box: Box) -> None:
        """Takes a face given by hand instead of those that were found."""
        if visit.source is None:
            raise UserError("choose a portrait first")
        visit.boxes, visit.protected, visit.corner = [box], None, None

    def protect(
        self,
        visit: Visit,
        settings: dict[str, Any],
        faces: Sequence[int],
        callback: Callable[[int, Tensor], None],
    ) -> Report:
        """Protects the visit's picture. settings: instead of the flags; faces: numbers of boxes."""
        if visit.source is None:
            raise UserError("choose a portrait first")
        visit.chosen = [visit.boxes[i] for i in faces] if len(visit.boxes) > 1 else visit.boxes
        if visit.boxes and not visit.chosen:
            raise UserError("choose at least one face")
        protector = Protector(argparse.Namespace(**vars(self.args) | settings))
        subject = protector.load(visit.source, next(iter(visit.chosen), None))
        size = subject.portrait.size
        working = protector.chosen.editor.working_size(size, protector.resolution)
        if visit.chosen:
            subject.boxes = [inside for box in visit.chosen if (inside := scale_box(box, size, working))]
        protector.preload()
        protector.chosen.warn_of([size])
        output = visit.new_folder() / f"protected_{visit.source.stem}.png"
        (report,) = protector.save([subject], [output], callback)
        visit.protected = output
        return report

    def edit(self, visit: Visit, prompt: str, seed: int) -> np.ndarray:
        """Edits the source and the protected picture alike -> (2, H, W, 3) uint8."""
        if visit.source is None or visit.protected is None:
            raise UserError("protect a portrait first")
        pair = [load_image(path) for path in (visit.source, visit.protected)]
        self.chosen.warn_of([pair[0].size], [prompt])
        return edit_portraits(pair, [prompt] * 2, self.editor, seed)

    def compare(self, visit: Visit, edits: np.ndarray) -> list[Face]:
        """Measures FR of both edits by recognisers and judges, for each face that was chosen.

        As in evaluation/, the detector looks at the edits, too; where it finds none, the source's box counts.
        """
        import numpy as np
        import torch

        images = to_tensor(np.stack([load_image(visit.source).pixels, *edits])).to(self.chosen.device)
        detected = [self.detector(edit) for edit in edits]
        faces = []
        for box in visit.chosen:
            overlapping = [[other for other in boxes if shared(box, other)] for boxes in detected]
            nearest = [max(boxes, key=lambda other: shared(box, other), default=box) for boxes in overlapping]
            panel = self.chosen.panel()
            attacked = tuple(name for name, member in panel.items() if member in self.chosen.recognizers)
            face = Face([bool(boxes) for boxes in overlapping], attacked=attacked)
            for name, member in panel.items():
                recognizer = self.chosen.load_recognizer(member, torch.float32)
                with torch.no_grad():
                    source, *of_edits = recognizer.embed(images, [[one] for one in (box, *nearest)])
                face.values[name] = [float(source @ one) for one in of_edits]
                face.thresholds[name] = recognizer.threshold
            faces.append(face)
        return faces


def shared(box: Box, other: Box) -> int:
    """Counts the pixels that two boxes share."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    return max(0, across) * max(0, down)


# ---------------------------------------------------------------------------------------------------------
# words and pictures


def measured(report: Report, seconds: float) -> str:
    """Says what a saved file measures."""
    pairs = [f"{name} {two[0]:.2f} → {two[1]:.2f}" for name, two in report.similarity.items() if two]
    return (
        "Saved, read back and measured: no colour of a pixel differs from your picture by more than "
        f"**{round(report.linf / LEVEL)} of 255 levels** (L-infinity {report.linf:.4f} in [-1, 1], "
        f"allowed {report.budget:g}); **PSNR {report.psnr:.1f} dB**. It took {seconds:.1f} s."
        + (f" Face similarity after the editor's autoencoder alone: {', '.join(pairs)}." if pairs else "")
    )


def table_of(faces: Sequence[Face]) -> pd.DataFrame:
    """Puts FR of all faces into a table."""
    import pandas as pd

    rows = {}
    for number, face in enumerate(faces, 1):
        for name, both in face.values.items():
            who = f"{name} (attacked)" if name in face.attacked else name
            rows[f"{who}, face {number}" if len(faces) > 1 else who] = [*both, face.thresholds[name]]
    columns = ["without", "with", "same person above"]
    table = pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("FR by")
    return table.dropna(axis=1, how="all")


def shown(visit: Visit, pixels: np.ndarray, boxes: Sequence[Box] = ()) -> str:
    """Writes what the browser shows of (H, W, 3) uint8: reduced if it is large, with numbered boxes."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    side, scale = max(image.size), image.width / pixels.shape[1]
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, side // 14))
    line = max(1, side // 150)
    for number, box in enumerate(boxes, 1):
        corners = [place * scale for place in box]
        draw.rectangle(corners, outline="white", width=line)
        draw.text(corners[:2], f" {number}", "white", font, stroke_width=line, stroke_fill="black")
    path = visit.new_folder() / "shown.png"
    save_png(path, np.asarray(image))
    return str(path)


def amplified(pixels: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Shows the difference of two uint8 images around grey."""
    import numpy as np

    return np.clip(128 + AMPLIFY * (pixels.astype(np.int16) - source), 0, 255).astype(np.uint8)
