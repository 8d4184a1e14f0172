"""Does the work of the page of app.py on a visitor's pictures; nothing here depends on Gradio."""

from __future__ import annotations

import html
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import verdict
from edit import edit_portraits
from images import image_size, load_image, png_bytes
from methods import METHODS, RECOMMENDED
from models.faces import Box, clip_box
from models.loading import ROOT, Missing, load_all
from protection import Protector, Report, Settings, methods_for, output_prefix
from utils import LEVEL, UserError
from verdict import Face, Verdict
from visits import Cancelled, Job, Picture, Visit

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from models.config import ModelConfig

SHOWN_SIDE = 1600  # px; a larger picture is shown reduced
PORTRAITS = ROOT / "assets" / "portraits"
BUNDLED = {"full": "*.*", "mini": "mini/*.png"}  # patterns within PORTRAITS, by --models
AMPLIFY = 10  # factor of the difference, which is shown around grey


class Backend:
    """Does what the page asks for, with the scripts' own functions. Raises UserError, as they do.

    The networks are loaded at the start, so that problems with them show before anybody waits. `missing`
    lists those that can't be loaded; without them the backend can only find faces.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.at_work = threading.Lock()  # one job at a time; a cancelled one counts until it ends
        protector = Protector(settings)
        self.detector, self.config = protector.detector, protector.config
        self.by_words = self.config.editor.by_words
        self.loop = loop_of(self.config)  # the method that the network of `instant` was trained on
        if self.loop:
            self.config = Protector(settings, method="instant").config  # no judges seen in training
        self.config = replace(self.config, compile=False, checkpointing=False)  # these are for attacks
        self.missing: list[str] = []
        try:
            load_all([protector.preload, self.config.load_editor])
            self.editor = self.config.load_editor()
        except Missing as error:
            self.missing = error.lines

    def look(self, picture: Picture) -> None:
        """Finds the faces in a picture."""
        picture.boxes = self.detector(load_image(picture.source, self.config.resolution).pixels)

    def point(self, visit: Visit, box: Box) -> Picture:
        """Uses a face box given by hand instead of the detected ones."""
        if visit.picture is None:
            raise UserError("choose a portrait first")
        path = visit.picture.source
        height, width = image_size(path)
        if (inside := clip_box(box, (height, width))) is None:
            raise UserError(f"{path}: the face box {box} is outside the {width}x{height} image")
        visit.expect(picture := Picture(path, [inside]))
        visit.show(picture)
        return picture

    def plan(self, visit: Visit, settings: dict[str, Any], faces: Sequence[int]) -> Job:
        """Plans to protect the visit's picture. settings: replace the page's; faces: indices of boxes."""
        if self.missing:
            raise UserError("networks are missing: see the top of this page")
        if (picture := visit.picture) is None:
            raise UserError("choose a portrait first")
        boxes = picture.boxes
        chosen = boxes if len(boxes) < 2 else [box for i, box in enumerate(boxes) if i in faces]
        if boxes and not chosen:
            raise UserError("choose at least one face")
        picture.protected = None
        visit.job = Job(picture, settings, chosen)
        return visit.job

    def protect(self, visit: Visit, job: Job, callback: Callable[[int, Tensor], None]) -> Report:
        """Protects a job's picture. Raises Cancelled once the visitor no longer waits for it."""

        def step(i: int, values: Tensor) -> None:
            if visit.job is not job:
                raise Cancelled
            callback(i, values)

        def write(path: Path, *pixels: np.ndarray) -> None:
            visit.write(path, png_bytes(*pixels))

        with self.at_work, visit.making(lambda: visit.job is job):
            protector = Protector(self.settings, **job.settings)
            if protector.needs_face and not job.faces:
                raise UserError("no face was found: draw a box around it, under Faces")
            subject = protector.load(job.picture.source, job.faces)
            protector.preload()
            protector.config.warn_of([subject.portrait.size])
            prefix = output_prefix(self.settings.models)
            output = visit.place("protected", f"{prefix}_{job.picture.source.stem}.png")
            (report,) = protector.save([subject], [output], step, write)
        job.picture.protected, job.picture.chosen = output, job.faces
        return report

    def edit(self, picture: Picture, prompt: str, seed: int) -> np.ndarray:
        """Edits a picture and its protected version in the same way -> (2, H, W, 3) uint8."""
        pair = [load_image(path) for path in (picture.source, picture.protected)]
        self.config.warn_of([pair[0].size], [prompt])
        with self.at_work:
            return edit_portraits(pair, [prompt] * 2, self.editor, seed)

    def compare(self, picture: Picture, edits: np.ndarray) -> list[Face]:
        """Measures each chosen face in both edits, by recognisers and judges. Raises UserError."""
        source = load_image(picture.source).pixels
        return verdict.compare(self.config, self.detector, source, edits, picture.chosen)

    def verdicts(self, faces: Sequence[Face]) -> list[Verdict]:
        """Returns the judges' verdict on each face, with advice unless the models are stand-ins."""
        made = "edit" if self.by_words else "round trip"
        if faces and (nobody := verdict.all_attacked(self.config, made)):
            return [nobody]
        advice = "" if self.settings.models == "mini" else verdict.ADVICE
        return [face.verdict(made, advice) for face in faces]

    def methods(self) -> list[tuple[str, str]]:
        """Lists (label, method) for the menu, the recommended methods first."""
        names = {self.settings.method, *methods_for(self.config.editor)}
        names |= {name for name, one in METHODS.items() if one.is_network and self.loop}
        first = [(name, name) for name in RECOMMENDED if name in names]
        others = [name for name in METHODS if name in names and name not in RECOMMENDED]
        return first + [(f"for comparison: {name}", name) for name in others]


def loop_of(config: ModelConfig) -> str | None:
    """Names the method that the network of `instant` was trained on; None if it is for other autoencoders."""
    from models.protector import is_for, read_config

    try:
        trained = read_config(config.protector)["trained"] if config.protector else {"vae": []}
    except UserError:
        return None
    return trained["method"] if is_for(trained, config.vae) else None


def bundled(models: str) -> list[Path]:
    """Lists the portraits that come with a set of models."""
    return sorted(path for path in PORTRAITS.glob(BUNDLED[models]) if path.is_file())


# ---------------------------------------------------------------------------------------------------------
# words and pictures


def judged(verdicts: Sequence[Verdict]) -> str:
    """Writes the verdict on each face, HTML, styled by its outcome."""
    parts = []
    for number, one in zip(verdict.numbered(verdicts), verdicts, strict=True):
        reasons = "".join(f"<p>{html.escape(reason)}</p>" for reason in one.reasons)
        heading = f"<h3>{number}{html.escape(one.headline)}</h3>"
        parts.append(f'<section class="verdict {one.outcome}" role="status">{heading}{reasons}</section>')
    return "".join(parts)


def left_out(n_found: int, n_chosen: int) -> str:
    """Writes a note, HTML, if only some of the faces found were protected."""
    text = f'<p class="note">{n_found} faces found, {n_chosen} protected: tick the others under Faces.</p>'
    return text if n_found > n_chosen else ""


def measured(report: Report, seconds: float) -> str:
    """Writes the measurements of a saved file, HTML."""
    pairs = [f"{name} {two[0]:.2f} → {two[1]:.2f}" for name, two in report.similarity.items() if two]
    return (
        "Saved, read back and measured: no colour value differs from your picture by more than "
        f"<b>{round(report.linf / LEVEL)} of 255 levels</b> (L-infinity {report.linf:.4f} in [-1, 1], "
        f"allowed {report.budget:g}); <b>PSNR {report.psnr:.1f} dB</b>. It took {seconds:.1f} s."
        + (f" Face similarity after the editor's autoencoder alone: {', '.join(pairs)}." if pairs else "")
    )


def notes(stderr: str) -> str:
    """Writes the warnings among the printed lines, HTML."""
    lines = re.findall("^warning: (.*)", stderr, re.MULTILINE)
    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def table_of(faces: Sequence[Face]) -> pd.DataFrame:
    """Tabulates FR of all faces as text, without → with protection, narrow enough for a phone."""
    import pandas as pd

    rows = {}
    for number, face in enumerate(faces, 1):
        for name, both in face.values.items():
            who = f"{name} (attacked)" if name in face.attacked else name
            who += " (trained here)" if name in face.trained_here else ""
            above, left = face.thresholds[name], face.left.get(name, [math.nan])
            texts = ["{:.2f} → {:.2f}".format(*both), None if above is None else f"{above:.2f}"]
            texts.append(None if math.isnan(left[0]) else "{:.2f} → {:.2f}".format(*left))
            rows[f"{who}, face {number}" if len(faces) > 1 else who] = texts
    columns = ["FR", "same above", "left"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).dropna(axis=1, how="all").rename_axis("by")


def shown(visit: Visit, kind: str, pixels: np.ndarray, boxes: Sequence[Box] = ()) -> str:
    """Writes (H, W, 3) uint8 for the browser, reduced if it is large, with numbered boxes -> the path."""
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
    path = visit.place(kind, "shown.png")
    visit.write(path, png_bytes(np.asarray(image)))
    return str(path)


def amplified(pixels: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Amplifies the difference of two uint8 images, around grey."""
    import numpy as np

    return np.clip(128 + AMPLIFY * (pixels.astype(np.int16) - source), 0, 255).astype(np.uint8)
