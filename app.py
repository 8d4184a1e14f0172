"""Protects a portrait on a local page, and shows what a stranger's edit would make of it.

    python app.py
    python app.py --models=mini --attack_budget=0.06

Listens on 127.0.0.1 alone and keeps nothing: pictures are gone with the page that they were for.
Needs Gradio (pip install -r requirements-app.txt). The other flags are those of defend.py; method, budget and
iterations are what the page begins with. docs/app.md has more.
"""

# No `from __future__ import annotations`: Gradio reads the annotations of the functions inside `build`.
import argparse
import contextlib
import html
import io
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from backend import (
    AMPLIFY,
    SHOWN_SIDE,
    Backend,
    amplified,
    judged,
    left_out,
    loop_of,
    measured,
    notes,
    shown,
    table_of,
)  # fmt: skip
from defend import add_defense_arguments, face_box, settings_of
from images import image_size, load_image
from loops import CHECK_EVERY
from methods import METHODS, RECOMMENDED
from models.config import ModelSettings, editors_of, resolve
from models.loading import ROOT
from utils import LEVEL, USUAL_BUDGET, UserError, allowed_levels, edit_prompts, given
from visits import Cancelled, Picture, Visit, Visits

if TYPE_CHECKING:
    from torch import Tensor

PORTRAITS = ROOT / "assets" / "portraits"
BUNDLED = {"full": "*.*", "mini": "mini/*.png"}  # of PORTRAITS, by --models
GROUPS = {"Face": range(10), "Accessory": range(10, 18), "Background": range(18, 25)}  # of edit_prompts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    port = utils.number(int, 1, 65535, "a port")
    parser.add_argument("--port", type=port, default=7860, help="of 127.0.0.1")
    add_defense_arguments(parser)
    parser.set_defaults(method=None)  # the page's own first choice
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    """Serves the page until a signal ends it."""
    if util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -r requirements-app.txt")
    from server import serve

    args.seed = utils.draw_seed(args.seed)
    args.method = args.method or first_method(args)
    own = set(map(str, bundled(args.models)))

    def page(visits: Visits) -> tuple[Any, dict]:
        backend = Backend(settings_of(args))
        backend.config.warn_of_cpu(args.device)
        for line in backend.missing:
            utils.warn(line)
        return build(backend, visits, args.debug), {"theme": theme(), "css": CSS}

    serve(page, args.port, own)
    return 0


def first_method(args: argparse.Namespace) -> str:
    """Names what the page begins with: a network's answer at once, if there is one for what is attacked."""
    return "instant" if loop_of(resolve(ModelSettings.of(args))) else next(iter(RECOMMENDED))


# ---------------------------------------------------------------------------------------------------------
# the page

HEAD = """<h1>FaceLock</h1>
<p>Changes a portrait a little, so that a diffusion model's edit of it no longer shows the same person; then
{}, and says what is left. Everything happens on the machine that runs app.py, and
nothing is kept: your pictures are deleted when you close this page, or leave it idle for an hour.</p>{}"""
STAND_IN = """<p class="note">These are the bundled mini models, made for 128x128 synthetic portraits. They
show how the thing works, and say nothing about how well a real photo is protected.</p>"""
MISSING = """<div class="trouble" role="alert"><p>Nothing can be protected yet: {}</p><ul>{}</ul>
<p>Get them, then start app.py again.</p></div>"""
ABOUT_TINY = """<p class="note">What is attacked is an autoencoder alone, {}. {}{}</p>"""
ABOUT_EDITS = "<p>Both pictures are edited by the same instruction, with the same seed.</p>"
ABOUT_TRIPS = """<p>Both pictures go through the autoencoder and back, as an edit in its latent space has them
go at the least. The editor itself is not asked, and no instruction is followed.</p>"""
WORTH = """<p>This is one instruction and one seed, with one editor. Another editor, or a copy that was
resized, compressed or cleaned, can give another result: this is a test, not a promise.</p>"""
WORTH_OF_TRIPS = """<p>This is one autoencoder, and no edit was made. An editor, or a copy that was resized,
compressed or cleaned, can give another result: this is a test, not a promise.</p>"""
NO_FACE = '<section class="verdict nothing" role="status"><h3>No face, nothing to compare</h3></section>'
ABOUT_TABLE = """FR, without → with protection: the cosine similarity of the face in the {} to the one in
your picture, by each recogniser. One that was attacked is no evidence; no protection has seen the judges.
*left* is the same on a scale that recognisers share: 1 the same picture, 0 a stranger."""
TROUBLE = '<p class="trouble" role="alert">{}</p>'
COMPARE = """<figure class="compare">
<img src="{}" alt="Before: the source"><img src="{}" alt="After: the protected picture">
<input type="range" value="50" aria-label="Before and after: where one becomes the other"
oninput="this.parentElement.style.setProperty('--at', this.value + '%')">
<figcaption>Before | after: can you see it? Move the handle, or use the arrow keys.</figcaption></figure>"""
CSS = (ROOT / "assets" / "page.css").read_text()


def theme() -> Any:
    """Gives the page's look; its fonts are the system's, so that nothing is fetched."""
    from gradio import themes

    fonts = [themes.Font("system-ui"), themes.Font("sans-serif")]
    look = themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="md", font=fonts, font_mono=fonts)
    return look.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


def notes_of(backend: Backend) -> str:
    """Says what the page can't do, and whom it asks."""
    config, text = backend.config, STAND_IN if backend.settings.models == "mini" else ""
    if config.vae_id or not backend.by_words:
        name, editors = Path(config.vae.partition("@")[0]).name, " and ".join(editors_of(config.vae))
        text += ABOUT_TINY.format(
            html.escape(name),
            f"It stands for {editors}." if editors else "Which editor it stands for is not known here.",
            "" if backend.by_words else " The editor itself is not asked: there is no instruction to give.",
        )
    if backend.missing:
        first, *more = backend.missing
        first, more = ("", [first]) if not more else (first, more)
        text += MISSING.format(html.escape(first), "".join(f"<li>{html.escape(one)}</li>" for one in more))
    return text


def last_word(backend: Backend) -> str:
    """Says what a verdict is worth by this page's models."""
    is_edit = backend.by_words and backend.settings.models == "full"
    return "" if is_edit else f'<p class="note">{html.escape(backend.config.last_word())}</p>'


def bundled(models: str) -> list[Path]:
    """Lists the portraits that come with a set of models."""
    return sorted(path for path in PORTRAITS.glob(BUNDLED[models]) if path.is_file())


def build(backend: Backend, visits: Visits, debug: bool = False) -> Any:
    """Lays the page out and connects it to the backend -> gradio.Blocks. debug: errors show a traceback."""
    import gradio as gr

    usual, by_words = backend.settings, backend.by_words
    about_edits = ABOUT_EDITS if by_words else ABOUT_TRIPS
    made = "Edit" if by_words else "Round trip"
    trial = "edits it as a stranger would" if by_words else "sends it through an autoencoder and back"
    portraits = bundled(usual.models)

    def view(label: str, alt: str, height: int | None = None) -> gr.Image:
        return gr.Image(
            label=label, alt_text=alt, height=height, min_width=110, type="filepath", interactive=False,
            buttons=["fullscreen"], elem_classes="fill",
        )  # fmt: skip

    def budget_of(name: str) -> float:
        own = METHODS[backend.loop if METHODS[name].is_network and backend.loop else name].run.budget
        return own if usual.budget is None else usual.budget

    def iterations_of(name: str) -> int:
        return METHODS[name].run.num_iters if usual.num_iters is None else usual.num_iters

    def numbers_of(name: str) -> tuple[float, Any]:
        has_iterations = "num_iters" in METHODS[name].reads
        return budget_of(name), gr.update(value=iterations_of(name), visible=has_iterations)

    least, largest = min(0.01, budget_of(usual.method)), max(USUAL_BUDGET, budget_of(usual.method))
    a_budget = utils.number(float, least, largest, f"a number from {least:g} to {largest:g}")
    most = max(500, *map(iterations_of, METHODS))
    a_count = utils.number(int, 0, most, f"a whole number from 0 to {most}")

    gr.set_static_paths([PORTRAITS])  # served from there, not copied
    with gr.Blocks(title="FaceLock", analytics_enabled=False) as page:
        gr.HTML(HEAD.format(trial, notes_of(backend)), elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.HTML("<h2>1. A portrait</h2>")
                picture = gr.Image(
                    label="Your portrait", alt_text="Your portrait", height=250, type="filepath",
                    sources=["upload", "webcam", "clipboard"], buttons=["fullscreen"],
                )  # fmt: skip
                gallery = gr.Gallery(
                    [(str(path), path.stem) for path in portraits], label="Or a bundled one",
                    columns=6, height="auto", object_fit="cover", allow_preview=False, buttons=[],
                    elem_id="bundled",
                )  # fmt: skip
                with gr.Accordion("Faces", open=False) as panel:
                    faces = view("Faces", "Your portrait with numbered boxes around its faces")
                    which = gr.CheckboxGroup(label="Protect", visible=False)
                    by_hand = gr.Textbox(
                        label="A box by hand: x0,y0,x1,y1", max_lines=1,
                        info="in pixels, then Enter; or click on two opposite corners in the picture above",
                    )  # fmt: skip
                gr.HTML("<h2>2. Its protection</h2>")
                method = gr.Dropdown(backend.methods(), value=usual.method, label="Method")
                # numbers, not sliders, which silently change what is typed
                budget = gr.Number(budget_of(usual.method), step=0.005, label="Budget, in [-1, 1]")
                n_iters = gr.Number(
                    iterations_of(usual.method), step=1, label="Iterations",
                    visible="num_iters" in METHODS[usual.method].reads,
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                gr.HTML("<h2>3. The protected picture</h2>")
                with gr.Row():
                    start = gr.Button(
                        "Protect", variant="primary", min_width=120, interactive=not backend.missing
                    )  # fmt: skip
                    stronger = gr.Button("Make it stronger", visible=False, min_width=120)
                    stop = gr.Button("Cancel", interactive=False, min_width=120)
                status = gr.HTML("Choose a portrait to begin with.", elem_id="status")
                with gr.Row():
                    source = view("Source", "The source", 200)
                    protected = view("Protected", "The protected picture", 200)
                    difference = view(f"Difference x{AMPLIFY}", "What has changed, around grey", 200)
                compare = gr.HTML()
                download = gr.DownloadButton("Download the protected PNG", interactive=False)
        what = "What would a stranger get?" if by_words else "What is left after the autoencoder?"
        gr.HTML(f"<h2>4. {what}</h2>")
        with gr.Row(equal_height=True):
            grouped = [
                (f"{group}: {edit_prompts[i]}", edit_prompts[i]) for group in GROUPS for i in GROUPS[group]
            ]
            prompt = gr.Dropdown(
                grouped, value=grouped[0][1], label="Instruction", scale=3, min_width=260, visible=by_words
            )  # fmt: skip
            own = gr.Textbox(
                label="Or your own", placeholder="instead of the one chosen", max_lines=1, scale=3,
                min_width=260, visible=by_words,
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", step=1, min_width=90, visible=by_words)
            text = "Edit both" if by_words else "Through the autoencoder and back"
            edit = gr.Button(text, variant="primary", min_width=140, interactive=not backend.missing)
        verdict = gr.HTML(about_edits)
        with gr.Row():
            edits = [
                view(f"{made}, unprotected", f"The {made.lower()} of your picture", 320),
                view(f"{made}, protected", f"The {made.lower()} of the protected picture", 320),
            ]
        table = gr.Markdown(elem_id="table")

        # what happens: a handler gives what changes on the page

        @contextlib.contextmanager
        def telling(shows: dict, place: Any) -> Iterator[None]:
            """Shows an error as the sentence that a script would print; says nothing where nobody waits."""
            try:
                yield
            except Cancelled:
                shows.clear()
            except Exception as error:  # as in utils.run_command: one line, whatever it is
                if debug:
                    traceback.print_exc()
                known = isinstance(error, (UserError, argparse.ArgumentTypeError))
                text = str(error) if known else f"{type(error).__name__}: {utils.first_line(error)}"
                text = re.sub(rf"{re.escape(str(visits.folder))}/\S*/", "", text)  # a visit's folder
                shows[place] = TROUBLE.format(html.escape(utils.one_line(text)))

        idle = {start: gr.update(interactive=not backend.missing), stop: gr.update(interactive=False)}
        alone = {stronger: gr.update(visible=False)}  # no answer of a network is shown

        def cleared() -> dict:
            nothing = dict.fromkeys([protected, difference, compare, *edits, table])
            nothing |= {download: gr.update(value=None, interactive=False), verdict: about_edits}
            return idle | alone | nothing

        def look(request: gr.Request, find: Callable[[Visit], Path] | None) -> dict:
            nothing = {picture: None, source: None, faces: None, which: gr.update(visible=False), status: ""}
            shows = cleared() | nothing
            with telling(shows, status):
                visit = visits.find(request.session_hash)
                visit.expect(coming := Picture() if find else None)
                if find:
                    with visit.making(lambda: visit.coming is coming):
                        coming.source = find(visit)
                        backend.look(coming)
                        shows |= seen(visit, coming)
                        visit.show(coming)
            return shows or gr.skip()

        def seen(visit: Visit, it: Picture) -> dict:
            pixels, n_faces = load_image(it.source).pixels, len(it.boxes)
            choices = [(f"face {i + 1}", i) for i in range(n_faces)]
            first = [0] if usual.faces == "largest" else list(range(n_faces))
            text = html.escape(utils.one_line(f"{it.source.name}, {pixels.shape[1]}x{pixels.shape[0]}."))
            if not n_faces:
                text = TROUBLE.format("No face was found: draw a box around it, under Faces.")
            return dict.fromkeys((picture, source), shown(visit, "shown", pixels)) | {
                faces: shown(visit, "faces", pixels, it.boxes),
                which: gr.update(choices=choices, value=first[:n_faces], visible=n_faces > 1),
                panel: gr.update(label=f"Faces ({n_faces})", **({} if n_faces == 1 else {"open": True})),
                status: text,
            }

        def take_upload(request: gr.Request, file: dict | None) -> dict:
            return look(request, file and (lambda visit: visits.take(visit, file["path"])))

        def take_bundled(request: gr.Request, event: gr.SelectData) -> dict:
            index = event.index
            if not isinstance(index, int) or not 0 <= index < len(portraits):
                return gr.skip()  # not the page's
            return look(request, lambda visit: portraits[index])

        def take_box(request: gr.Request, text: str) -> dict:
            shows: dict = {}
            with telling(shows, status):
                visit = visits.find(request.session_hash)
                shows |= cleared() | seen(visit, backend.point(visit, face_box(text)))
            return shows or gr.skip()

        def take_click(request: gr.Request, event: gr.SelectData) -> dict:
            at, shows = event.index, {}
            if (
                not isinstance(at, list)
                or len(at) != 2
                or not all(isinstance(one, int | float) for one in at)
            ):
                return gr.skip()  # not the page's
            with telling(shows, status):
                visit = visits.find(request.session_hash)
                if visit.picture is None:
                    raise UserError("choose a portrait first")
                scale = max(1, max(image_size(visit.picture.source)) / SHOWN_SIDE)
                x, y = (round(min(max(0, place), SHOWN_SIDE) * scale) for place in at)
                if visit.corner is None:
                    visit.corner = x, y
                    return {status: f"One corner is at {x},{y}: click on the opposite one."}
                (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(visit.corner, (x, y), strict=True))
                box, visit.corner = (x0, y0, x1, y1), None
                shows |= (
                    cleared() | seen(visit, backend.point(visit, box)) | {by_hand: ",".join(map(str, box))}
                )
            return shows or gr.skip()

        def describe(name: str, size: Any) -> tuple:
            about = RECOMMENDED.get(name) or METHODS[name].objective.__doc__.splitlines()[0].rstrip(":")
            try:
                size = given(a_budget, "Budget", size)
                most = allowed_levels(size)
                levels = f"{size / LEVEL:.1f}/255: a pixel moves by at most {most} of 255 levels"
            except UserError as error:
                levels = str(error)
            return gr.update(info=about), gr.update(info=levels)

        def begin(request: gr.Request, name: str, size: Any, total: Any, chosen: list[int]) -> dict:
            shows = cleared() | {status: ""}
            with telling(shows, status):
                visit = visits.find(request.session_hash)
                if name not in METHODS:
                    raise UserError("choose a method")
                settings = {"method": name, "budget": given(a_budget, "Budget", size)}
                settings["num_iters"] = given(a_count, "Iterations", total)
                backend.plan(visit, settings, chosen or [])
                shows |= {start: gr.update(interactive=False), stop: gr.update(interactive=True)}
            return shows

        def strengthen(request: gr.Request, chosen: list[int]) -> dict:
            name = backend.loop
            size, total = budget_of(name), iterations_of(name)
            shows = {method: name, budget: size, n_iters: gr.update(value=total, visible=True)}
            return begin(request, name, size, total, chosen) | shows

        def end(request: gr.Request) -> dict:
            visit = visits.visits.get(request.session_hash)
            return gr.skip() if visit and visit.job else idle

        def cancel(request: gr.Request) -> dict:
            shows = idle | {status: "Stopped. Nothing was saved."}
            with telling(shows, status):
                visits.find(request.session_hash).job = None
            return shows

        bar = gr.Progress()

        def protect(request: gr.Request, progress: Any = bar) -> dict:
            from tqdm.std import EMA

            began, objective, shows = time.monotonic(), "", {}
            pace, last = EMA(0.1), began  # of late: the first iterations of some methods are cheaper

            def step(i: int, values: "Tensor") -> None:
                nonlocal objective, last
                seconds, last = pace(time.monotonic() - last), time.monotonic()
                total = job.settings["num_iters"]
                if (i + 1) % CHECK_EVERY == 0 or i + 1 == total:  # where the loop waits for the device anyway
                    objective = f"objective {values.mean().item():.4g}, "
                text = f"iteration {i + 1} of {total}, {objective}"
                text += f"about {seconds * (total - i - 1):.0f} s left"
                progress((i + 1) / total, desc=text)

            with telling(shows, status), contextlib.redirect_stderr(io.StringIO()) as heard:
                visit = visits.find(request.session_hash)
                if (job := visit.job) is None:
                    raise Cancelled
                with visit.doing(job):
                    report = backend.protect(visit, job, step)
                    text = measured(report, time.monotonic() - began)
                    n_found = len(job.picture.boxes) if report.n_found else 0  # else the method sees no face
                    others = left_out(n_found, len(job.faces))
                    before, after = (load_image(path).pixels for path in (job.picture.source, report.path))
                    pair = shown(visit, "before", before), shown(visit, "after", after)
                    shows |= {
                        protected: pair[1],
                        difference: shown(visit, "difference", amplified(after, before)),
                        compare: COMPARE.format(*(f"/gradio_api/file={path}" for path in pair)),
                        download: gr.update(value=str(report.path), interactive=True),
                        status: f"<p>{text}</p>{others}{notes(heard.getvalue())}",
                        stronger: gr.update(visible=METHODS[report.method].is_network),
                    }
            return shows or gr.skip()

        def edit_both(request: gr.Request, chosen: str, written: str, number: Any) -> dict:
            shows = dict.fromkeys([*edits, table])
            with telling(shows, verdict), contextlib.redirect_stderr(io.StringIO()) as heard:
                number = given(utils.known_seed, "Seed", number)
                visit = visits.find(request.session_hash)
                text = (written or "").strip() or chosen if by_words else utils.NO_WORDS
                it = visit.picture
                if it is None or it.protected is None:
                    raise UserError("protect a portrait first")
                with visit.making(lambda was=it.protected: visit.picture is it and it.protected is was):
                    pair = backend.edit(it, text, number)
                    shows |= {edits[i]: shown(visit, f"edit {i}", pair[i]) for i in range(2)}
                    found = backend.compare(it, pair)
                told = judged(backend.verdicts(found)) or NO_FACE
                worth, last = WORTH if by_words else WORTH_OF_TRIPS, last_word(backend)
                shows[verdict] = "".join([told, worth, last, notes(heard.getvalue())])
                if found:
                    rows = table_of(found).to_markdown(missingval="-", disable_numparse=True)
                    shows[table] = f"{rows}\n\n{ABOUT_TABLE.format(made.lower())}"
            return shows or gr.skip()

        outputs = [
            picture, faces, which, panel, by_hand, start, stronger, stop, status, source, protected,
            difference, compare, download, *edits, verdict, table,
        ]  # fmt: skip
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        queued = {"concurrency_id": "job", "api_visibility": "private"}
        choices = [method, budget]
        page.unload(lambda: None)  # so that the page keeps a connection open, whose end ends its visit
        page.load(describe, choices, choices, **quick)
        method.change(numbers_of, method, [budget, n_iters], **quick)
        gr.on([method.change, budget.change], describe, choices, choices, **quick)
        begun = start.click(begin, [*choices, n_iters, which], outputs, queue=False, **quick)
        again = stronger.click(strengthen, which, [*outputs, *choices, n_iters], queue=False, **quick)
        jobs = [one.then(protect, None, outputs, show_progress_on=status, **queued) for one in (begun, again)]
        for done in jobs:
            done.then(end, None, outputs, queue=False, **quick)
        edited = edit.click(edit_both, [prompt, own, seed], outputs, show_progress_on=verdict, **queued)
        stop.click(cancel, None, outputs, queue=False, cancels=jobs, **quick)
        quick["trigger_mode"] = "multiple"  # what is chosen while the last one is looked at counts, too
        running = [*jobs, edited]
        picture.input(take_upload, picture, outputs, preprocess=False, cancels=running, **quick)
        gallery.select(take_bundled, None, outputs, cancels=running, **quick)
        by_hand.submit(take_box, by_hand, outputs, **quick)
        faces.select(take_click, None, outputs, **quick)
    return page.queue(default_concurrency_limit=1, max_size=50, api_open=False)


if __name__ == "__main__":
    sys.exit(main())
