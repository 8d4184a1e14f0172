"""The page of app.py: its layout, and what each button does. The work is backend.py's."""

# No `from __future__ import annotations`: Gradio reads the annotations of handlers.
import argparse
import contextlib
import html
import io
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

import utils
from backend import (
    AMPLIFY,
    PORTRAITS,
    SHOWN_SIDE,
    Backend,
    amplified,
    bundled,
    judged,
    left_out,
    measured,
    notes,
    shown,
    table_of,
)  # fmt: skip
from defend import face_box
from images import image_size, load_image
from loops import CHECK_EVERY
from methods import METHODS, RECOMMENDED
from models.config import editors_of
from models.loading import ROOT
from utils import LEVEL, USUAL_BUDGET, UserError, allowed_levels, edit_prompts, given
from visits import Cancelled, Picture, Visit, Visits

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = {"Face": range(10), "Accessory": range(10, 18), "Background": range(18, 25)}  # of edit_prompts

HEAD = """<h1>FaceLock</h1>
<p>Changes a portrait slightly, to keep a diffusion model's edit of it from showing the same person; then
{}, and shows what is left of the person. Everything happens on the machine that runs app.py, and
nothing is kept: your pictures are deleted when you close this page or leave it idle for an hour.</p>{}"""
STAND_IN = """<p class="note">These are the bundled mini models, made for 128x128 synthetic portraits. They
show how this page works, but say nothing about how well a real photo is protected.</p>"""
MISSING = """<div class="trouble" role="alert"><p>Nothing can be protected yet: {}</p><ul>{}</ul>
<p>Get them, then restart app.py.</p></div>"""
ABOUT_TINY = """<p class="note">Only an autoencoder is attacked: {}. {}{}</p>"""
ABOUT_EDITS = "<p>Both pictures are edited with the same instruction and the same seed.</p>"
ABOUT_TRIPS = """<p>Both pictures go through the autoencoder and back, which any edit in its latent space
includes. The editor itself is not used, and no instruction is followed.</p>"""
WORTH = """<p>This is one instruction and one seed, with one editor. Another editor, or a copy that was
resized, compressed or cleaned, can give a different result: this is a test, not a promise.</p>"""
WORTH_OF_TRIPS = """<p>This is one autoencoder, and no edit was made. An editor, or a copy that was resized,
compressed or cleaned, can give a different result: this is a test, not a promise.</p>"""
NO_FACE = '<section class="verdict nothing" role="status"><h3>No face: nothing to compare</h3></section>'
ABOUT_TABLE = """FR, without → with protection: by each recogniser, how similar the face in the {} is to the
one in your picture (cosine). An attacked recogniser is no evidence; no protection has seen the judges.
*left* is the same on a scale that all recognisers share: 1 is the same picture, 0 a stranger."""
TROUBLE = '<p class="trouble" role="alert">{}</p>'
COMPARE = """<figure class="compare">
<img src="{}" alt="Before: the source"><img src="{}" alt="After: the protected picture">
<input type="range" value="50" aria-label="Before and after: position of the divider"
oninput="this.parentElement.style.setProperty('--at', this.value + '%')">
<figcaption>Before | after: can you see it? Move the handle or use the arrow keys.</figcaption></figure>"""
CSS = (ROOT / "assets" / "page.css").read_text()
BAR = gr.Progress()  # as a default, it tells Gradio that a handler reports progress


def theme() -> Any:
    """Returns the page's theme, with system fonts, so that nothing is fetched."""
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
    hues = {"primary_hue": "teal", "neutral_hue": "stone"}
    return gr.themes.Base(radius_size="md", font=fonts, font_mono=fonts, **hues).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


def notes_of(backend: Backend) -> str:
    """Writes the notes below the title, HTML: what the models stand in for, and what is missing."""
    config, text = backend.config, STAND_IN if backend.settings.models == "mini" else ""
    if config.vae_id or not backend.by_words:
        name, editors = Path(config.vae.partition("@")[0]).name, " and ".join(editors_of(config.vae))
        text += ABOUT_TINY.format(
            html.escape(name),
            f"It stands in for {editors}." if editors else "Which editor it stands in for is not known.",
            "" if backend.by_words else " The editor itself is not used, so there is no instruction to give.",
        )
    if backend.missing:
        first, *more = backend.missing
        first, more = ("", [first]) if not more else (first, more)
        text += MISSING.format(html.escape(first), "".join(f"<li>{html.escape(one)}</li>" for one in more))
    return text


def last_word(backend: Backend) -> str:
    """Writes how little a verdict by these models proves, HTML; empty for edits by the full models."""
    is_edit = backend.by_words and backend.settings.models == "full"
    return "" if is_edit else f'<p class="note">{html.escape(backend.config.last_word())}</p>'


class Page:
    """Holds the page's components, and a handler for each event, which returns what changes on the page.

    debug: errors also print a traceback on the terminal. `blocks` is what Gradio serves.
    """

    def __init__(self, backend: Backend, visits: Visits, debug: bool = False) -> None:
        self.backend, self.visits, self.debug = backend, visits, debug
        self.usual, self.by_words = backend.settings, backend.by_words
        self.about_edits = ABOUT_EDITS if self.by_words else ABOUT_TRIPS
        self.made = "Edit" if self.by_words else "Round trip"
        self.portraits = bundled(self.usual.models)
        usual = self.budget_of(self.usual.method)
        least, largest = min(0.01, usual), max(USUAL_BUDGET, usual)
        self.a_budget = utils.number(float, least, largest, f"a number from {least:g} to {largest:g}")
        most = max(500, *map(self.iterations_of, METHODS))
        self.a_count = utils.number(int, 0, most, f"a whole number from 0 to {most}")
        gr.set_static_paths([PORTRAITS])  # served from there, not copied
        with gr.Blocks(title="FaceLock", analytics_enabled=False) as self.blocks:
            trial = "edits it as a stranger would"
            trial = trial if self.by_words else "sends it through an autoencoder and back"
            gr.HTML(HEAD.format(trial, notes_of(backend)), elem_id="head")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self.lay_out_portrait()
                    self.lay_out_settings()
                with gr.Column(scale=3, min_width=300):
                    self.lay_out_protection()
            self.lay_out_edits()
            self.outputs = [
                self.picture, self.faces, self.which, self.panel, self.by_hand, self.start, self.stronger,
                self.stop, self.status, self.source, self.protected, self.difference, self.compare,
                self.download, *self.edits, self.verdict, self.table,
            ]  # fmt: skip
            self.connect()
        self.blocks.queue(default_concurrency_limit=1, max_size=50, api_open=False)

    def budget_of(self, name: str) -> float:
        """Returns the budget that the page first shows for a method."""
        loop = self.backend.loop
        own = METHODS[loop if METHODS[name].is_network and loop else name].run.budget
        return own if self.usual.budget is None else self.usual.budget

    def iterations_of(self, name: str) -> int:
        """Returns the number of iterations that the page first shows for a method."""
        return METHODS[name].run.num_iters if self.usual.num_iters is None else self.usual.num_iters

    # -----------------------------------------------------------------------------------------------------
    # layout

    def lay_out_portrait(self) -> None:
        """Adds the inputs for a portrait and its faces."""
        gr.HTML("<h2>1. A portrait</h2>")
        self.picture = gr.Image(
            label="Your portrait", alt_text="Your portrait", height=250, type="filepath",
            sources=["upload", "webcam", "clipboard"], buttons=["fullscreen"],
        )  # fmt: skip
        self.gallery = gr.Gallery(
            [(str(path), path.stem) for path in self.portraits], label="Or a bundled one",
            columns=6, height="auto", object_fit="cover", allow_preview=False, buttons=[], elem_id="bundled",
        )  # fmt: skip
        with gr.Accordion("Faces", open=False) as self.panel:
            self.faces = view("Faces", "Your portrait with numbered boxes around its faces")
            self.which = gr.CheckboxGroup(label="Protect", visible=False)
            self.by_hand = gr.Textbox(
                label="A box by hand: x0,y0,x1,y1", max_lines=1,
                info="in pixels, then press Enter; or click two opposite corners in the picture above",
            )  # fmt: skip

    def lay_out_settings(self) -> None:
        """Adds method, budget and iterations, as numbers: sliders silently change what is typed."""
        usual = self.usual.method
        gr.HTML("<h2>2. How to protect it</h2>")
        self.method = gr.Dropdown(self.backend.methods(), value=usual, label="Method")
        self.budget = gr.Number(self.budget_of(usual), step=0.005, label="Budget, in [-1, 1]")
        self.n_iters = gr.Number(
            self.iterations_of(usual), step=1, label="Iterations", visible=has_iterations(usual)
        )

    def lay_out_protection(self) -> None:
        """Adds the buttons and their results."""
        can_start = not self.backend.missing
        gr.HTML("<h2>3. The protected picture</h2>")
        with gr.Row():
            self.start = gr.Button("Protect", variant="primary", min_width=120, interactive=can_start)
            self.stronger = gr.Button("Make it stronger", visible=False, min_width=120)
            self.stop = gr.Button("Cancel", interactive=False, min_width=120)
        self.status = gr.HTML("Choose a portrait to begin.", elem_id="status")
        with gr.Row():
            self.source = view("Source", "The source", 200)
            self.protected = view("Protected", "The protected picture", 200)
            self.difference = view(f"Difference x{AMPLIFY}", "What has changed, shown around grey", 200)
        self.compare = gr.HTML()
        self.download = gr.DownloadButton("Download the protected PNG", interactive=False)

    def lay_out_edits(self) -> None:
        """Adds the instruction, both edits, and the verdict on them."""
        what = "What would a stranger get?" if self.by_words else "What is left after the autoencoder?"
        gr.HTML(f"<h2>4. {what}</h2>")
        grouped = [(f"{name}: {edit_prompts[i]}", edit_prompts[i]) for name in GROUPS for i in GROUPS[name]]
        wide = {"scale": 3, "min_width": 260, "visible": self.by_words}
        with gr.Row(equal_height=True):
            self.prompt = gr.Dropdown(grouped, value=grouped[0][1], label="Instruction", **wide)
            self.own = gr.Textbox(
                label="Or your own", placeholder="instead of the one chosen", max_lines=1, **wide
            )
            self.seed = gr.Number(0, label="Seed", step=1, min_width=90, visible=self.by_words)
            text = "Edit both" if self.by_words else "Through the autoencoder and back"
            can_edit = not self.backend.missing
            self.edit = gr.Button(text, variant="primary", min_width=140, interactive=can_edit)
        self.verdict = gr.HTML(self.about_edits)
        with gr.Row():
            self.edits = [
                view(f"{self.made}, unprotected", f"The {self.made.lower()} of your picture", 320),
                view(f"{self.made}, protected", f"The {self.made.lower()} of the protected picture", 320),
            ]
        self.table = gr.Markdown(elem_id="table")

    def connect(self) -> None:
        """Connects each event to its handler."""
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        queued = {"concurrency_id": "job", "api_visibility": "private"}
        choices, outputs = [self.method, self.budget], self.outputs
        self.blocks.unload(lambda: None)  # keeps a connection open; when it ends, so does the visit
        self.blocks.load(self.describe, choices, choices, **quick)
        self.method.change(self.numbers_of, self.method, [self.budget, self.n_iters], **quick)
        gr.on([self.method.change, self.budget.change], self.describe, choices, choices, **quick)
        quick["queue"] = False
        begun = self.start.click(self.begin, [*choices, self.n_iters, self.which], outputs, **quick)
        stronger = [*outputs, *choices, self.n_iters]
        again = self.stronger.click(self.strengthen, self.which, stronger, **quick)
        shown_on = {"show_progress_on": self.status}
        jobs = [one.then(self.protect, None, outputs, **shown_on, **queued) for one in (begun, again)]
        for done in jobs:
            done.then(self.end, None, outputs, **quick)
        given, shown_on = [self.prompt, self.own, self.seed], {"show_progress_on": self.verdict}
        edited = self.edit.click(self.edit_both, given, outputs, **shown_on, **queued)
        self.stop.click(self.cancel, None, outputs, cancels=jobs, **quick)
        # a picture chosen while the last one is being examined counts, too
        quick = {"trigger_mode": "multiple", "show_progress": "hidden", "api_visibility": "private"}
        running = {"cancels": [*jobs, edited]}
        self.picture.input(self.take_upload, self.picture, outputs, preprocess=False, **running, **quick)
        self.gallery.select(self.take_bundled, None, outputs, **running, **quick)
        self.by_hand.submit(self.take_box, self.by_hand, outputs, **quick)
        self.faces.select(self.take_click, None, outputs, **quick)

    # -----------------------------------------------------------------------------------------------------
    # what several handlers show

    @contextlib.contextmanager
    def telling(self, shows: dict, place: Any) -> Iterator[None]:
        """Shows an error as the line that a script would print; nothing if the visitor has moved on."""
        try:
            yield
        except Cancelled:
            shows.clear()
        except Exception as error:  # as in utils.run_command: one line, whatever it is
            if self.debug:
                traceback.print_exc()
            known = isinstance(error, (UserError, argparse.ArgumentTypeError))
            text = str(error) if known else f"{type(error).__name__}: {utils.first_line(error)}"
            text = re.sub(rf"{re.escape(str(self.visits.folder))}/\S*/", "", text)  # a visit's folder
            shows[place] = TROUBLE.format(html.escape(utils.one_line(text)))

    def idle(self) -> dict:
        """Shows that nothing is being protected."""
        can_start = not self.backend.missing
        return {self.start: gr.update(interactive=can_start), self.stop: gr.update(interactive=False)}

    def cleared(self) -> dict:
        """Shows no result."""
        shows = dict.fromkeys([self.protected, self.difference, self.compare, *self.edits, self.table])
        shows |= {self.download: gr.update(value=None, interactive=False), self.verdict: self.about_edits}
        return self.idle() | shows | {self.stronger: gr.update(visible=False)}

    def look(self, request: gr.Request, find: Callable[[Visit], Path] | None) -> dict:
        """Switches to the picture that `find` returns; None: the picture was removed."""
        shows = self.cleared() | dict.fromkeys([self.picture, self.source, self.faces])
        shows |= {self.which: gr.update(visible=False), self.status: ""}
        with self.telling(shows, self.status):
            visit = self.visits.find(request.session_hash)
            visit.expect(coming := Picture() if find else None)
            if find:
                with visit.making(lambda: visit.coming is coming):
                    coming.source = find(visit)
                    self.backend.look(coming)
                    shows |= self.seen(visit, coming)
                    visit.show(coming)
        return shows or gr.skip()

    def seen(self, visit: Visit, picture: Picture) -> dict:
        """Shows a picture and its faces."""
        pixels, n_faces = load_image(picture.source).pixels, len(picture.boxes)
        choices = [(f"face {i + 1}", i) for i in range(n_faces)]
        first = [0] if self.usual.faces == "largest" else list(range(n_faces))
        text = html.escape(utils.one_line(f"{picture.source.name}, {pixels.shape[1]}x{pixels.shape[0]}."))
        if not n_faces:
            text = TROUBLE.format("No face was found: draw a box around it, under Faces.")
        is_open = {} if n_faces == 1 else {"open": True}
        return dict.fromkeys((self.picture, self.source), shown(visit, "shown", pixels)) | {
            self.faces: shown(visit, "faces", pixels, picture.boxes),
            self.which: gr.update(choices=choices, value=first[:n_faces], visible=n_faces > 1),
            self.panel: gr.update(label=f"Faces ({n_faces})", **is_open),
            self.status: text,
        }

    # -----------------------------------------------------------------------------------------------------
    # handlers

    def take_upload(self, request: gr.Request, file: dict | None) -> dict:
        """Takes an uploaded picture by the token that the server gave it."""
        return self.look(request, file and (lambda visit: self.visits.take(visit, file["path"])))

    def take_bundled(self, request: gr.Request, event: gr.SelectData) -> dict:
        """Takes a bundled portrait."""
        index = event.index
        if not isinstance(index, int) or not 0 <= index < len(self.portraits):
            return gr.skip()  # not from the page
        return self.look(request, lambda visit: self.portraits[index])

    def take_box(self, request: gr.Request, text: str) -> dict:
        """Takes a face from the typed numbers of its box."""
        shows: dict = {}
        with self.telling(shows, self.status):
            visit = self.visits.find(request.session_hash)
            shows |= self.cleared() | self.seen(visit, self.backend.point(visit, face_box(text)))
        return shows or gr.skip()

    def take_click(self, request: gr.Request, event: gr.SelectData) -> dict:
        """Takes a clicked corner of a face's box; the second click completes the box."""
        at, shows = event.index, {}
        is_point = isinstance(at, list) and len(at) == 2
        if not is_point or not all(isinstance(one, int | float) for one in at):
            return gr.skip()  # not from the page
        with self.telling(shows, self.status):
            visit = self.visits.find(request.session_hash)
            if visit.picture is None:
                raise UserError("choose a portrait first")
            scale = max(1, max(image_size(visit.picture.source)) / SHOWN_SIDE)
            x, y = (round(min(max(0, place), SHOWN_SIDE) * scale) for place in at)
            if visit.corner is None:
                visit.corner = x, y
                return {self.status: f"One corner is at {x},{y}: now click the opposite one."}
            (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(visit.corner, (x, y), strict=True))
            box, visit.corner = (x0, y0, x1, y1), None
            shows |= self.cleared() | self.seen(visit, self.backend.point(visit, box))
            shows |= {self.by_hand: ",".join(map(str, box))}
        return shows or gr.skip()

    def numbers_of(self, name: str) -> tuple[float, Any]:
        """Shows a method's own budget and iterations."""
        n_iters = gr.update(value=self.iterations_of(name), visible=has_iterations(name))
        return self.budget_of(name), n_iters

    def describe(self, name: str, size: Any) -> tuple:
        """Describes a method, and says what a budget means in levels of 255."""
        about = RECOMMENDED.get(name) or METHODS[name].objective.__doc__.splitlines()[0].rstrip(":")
        try:
            size = given(self.a_budget, "Budget", size)
            most = allowed_levels(size)
            levels = f"{size / LEVEL:.1f}/255: a pixel moves by at most {most} of 255 levels"
        except UserError as error:
            levels = str(error)
        return gr.update(info=about), gr.update(info=levels)

    def begin(self, request: gr.Request, name: str, size: Any, total: Any, chosen: list[int]) -> dict:
        """Plans a job, which `protect` carries out."""
        shows = self.cleared() | {self.status: ""}
        with self.telling(shows, self.status):
            visit = self.visits.find(request.session_hash)
            if name not in METHODS:
                raise UserError("choose a method")
            settings = {"method": name, "budget": given(self.a_budget, "Budget", size)}
            settings["num_iters"] = given(self.a_count, "Iterations", total)
            self.backend.plan(visit, settings, chosen or [])
            shows |= {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        return shows

    def strengthen(self, request: gr.Request, chosen: list[int]) -> dict:
        """Starts over with the method whose objective the network was trained on."""
        name = self.backend.loop
        size, total = self.budget_of(name), self.iterations_of(name)
        shows = {self.method: name, self.budget: size, self.n_iters: gr.update(value=total, visible=True)}
        return self.begin(request, name, size, total, chosen) | shows

    def end(self, request: gr.Request) -> dict:
        """Shows that a job has ended, unless another has begun."""
        visit = self.visits.visits.get(request.session_hash)
        return gr.skip() if visit and visit.job else self.idle()

    def cancel(self, request: gr.Request) -> dict:
        """Ends the visit's job."""
        shows = self.idle() | {self.status: "Stopped. Nothing was saved."}
        with self.telling(shows, self.status):
            self.visits.find(request.session_hash).job = None
        return shows

    def protect(self, request: gr.Request, progress: Any = BAR) -> dict:
        """Runs the visit's job and shows the result."""
        from tqdm.std import EMA

        began, objective, shows = time.monotonic(), "", {}
        pace, last = EMA(0.1), began  # recent iterations count: some methods' first ones are cheaper

        def step(i: int, values: "Tensor") -> None:
            nonlocal objective, last
            seconds, last = pace(time.monotonic() - last), time.monotonic()
            total = job.settings["num_iters"]
            if (i + 1) % CHECK_EVERY == 0 or i + 1 == total:  # where the loop waits for the device anyway
                objective = f"objective {values.mean().item():.4g}, "
            text = f"iteration {i + 1} of {total}, {objective}"
            text += f"about {seconds * (total - i - 1):.0f} s left"
            progress((i + 1) / total, desc=text)

        with self.telling(shows, self.status), contextlib.redirect_stderr(io.StringIO()) as heard:
            visit = self.visits.find(request.session_hash)
            if (job := visit.job) is None:
                raise Cancelled
            with visit.doing(job):
                report = self.backend.protect(visit, job, step)
                text = measured(report, time.monotonic() - began)
                n_found = len(job.picture.boxes) if report.n_found else 0  # 0: the method looks at no face
                others = left_out(n_found, len(job.faces))
                before, after = (load_image(path).pixels for path in (job.picture.source, report.path))
                pair = shown(visit, "before", before), shown(visit, "after", after)
                shows |= {
                    self.protected: pair[1],
                    self.difference: shown(visit, "difference", amplified(after, before)),
                    self.compare: COMPARE.format(*(f"/gradio_api/file={path}" for path in pair)),
                    self.download: gr.update(value=str(report.path), interactive=True),
                    self.status: f"<p>{text}</p>{others}{notes(heard.getvalue())}",
                    self.stronger: gr.update(visible=METHODS[report.method].is_network),
                }
        return shows or gr.skip()

    def edit_both(self, request: gr.Request, chosen: str, written: str, number: Any) -> dict:
        """Edits the picture and its protected version in the same way, and shows the verdict."""
        shows = dict.fromkeys([*self.edits, self.table])
        with self.telling(shows, self.verdict), contextlib.redirect_stderr(io.StringIO()) as heard:
            number = given(utils.known_seed, "Seed", number)
            visit = self.visits.find(request.session_hash)
            text = (written or "").strip() or chosen if self.by_words else utils.NO_WORDS
            it = visit.picture
            if it is None or it.protected is None:
                raise UserError("protect a portrait first")
            with visit.making(lambda was=it.protected: visit.picture is it and it.protected is was):
                pair = self.backend.edit(it, text, number)
                shows |= {self.edits[i]: shown(visit, f"edit {i}", pair[i]) for i in range(2)}
                found = self.backend.compare(it, pair)
            told = judged(self.backend.verdicts(found)) or NO_FACE
            worth, last = WORTH if self.by_words else WORTH_OF_TRIPS, last_word(self.backend)
            shows[self.verdict] = "".join([told, worth, last, notes(heard.getvalue())])
            if found:
                rows = table_of(found).to_markdown(missingval="-", disable_numparse=True)
                shows[self.table] = f"{rows}\n\n{ABOUT_TABLE.format(self.made.lower())}"
        return shows or gr.skip()


def view(label: str, alt: str, height: int | None = None) -> gr.Image:
    """Adds a picture for viewing only."""
    return gr.Image(
        label=label, alt_text=alt, height=height, min_width=110, type="filepath", interactive=False,
        buttons=["fullscreen"], elem_classes="fill",
    )  # fmt: skip


def has_iterations(method: str) -> bool:
    """Returns whether a method has iterations."""
    return "num_iters" in METHODS[method].reads
