"""Protects a portrait on a local page, and shows what a stranger's edit would make of it.

    python app.py
    python app.py --models=mini --attack_budget=0.06

Listens on 127.0.0.1 alone and keeps nothing: pictures are gone when their page is closed, or after an hour.
Needs Gradio (pip install -r requirements-app.txt). The other flags are those of defend.py; method, budget and
iterations are what the page begins with. docs/app.md has more.
"""

# No `from __future__ import annotations`: Gradio reads the annotations of the functions inside `build`.
import argparse
import contextlib
import html
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from defend import add_defense_arguments, face_box
from images import load_image
from loops import CHECK_EVERY
from methods import METHODS
from models.loading import ROOT
from studio import (
    AMPLIFY,
    SHOWN_SIDE,
    Cancelled,
    Face,
    Studio,
    Visit,
    amplified,
    measured,
    shown,
    table_of,
)
from utils import LEVEL, USUAL_BUDGET, UserError, allowed_levels, edit_prompts

if TYPE_CHECKING:
    from torch import Tensor

PORTRAITS = ROOT / "assets" / "portraits"
BUNDLED = {"full": "*.*", "mini": "mini/*.png"}  # of PORTRAITS, by --models
GROUPS = {"Face": range(10), "Accessory": range(10, 18), "Background": range(18, 25)}  # of edit_prompts
HOUR = 3600  # s, after which a page's pictures are deleted


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    port = utils.number(int, 1, 65535, "a port")
    parser.add_argument("--port", type=port, default=7860, help="of 127.0.0.1")
    add_defense_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C -> exit status."""
    if util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -r requirements-app.txt")
    args.seed = utils.draw_seed(args.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is deleted then, too
    with tempfile.TemporaryDirectory(prefix="facelock-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        for name in ("no_proxy", "NO_PROXY"):  # Gradio asks itself whether it is up
            os.environ[name] = f"{os.environ.get(name, '')},127.0.0.1"
        page = build(Studio(args, Path(folder))).queue(default_concurrency_limit=1, max_size=50)
        try:
            page.launch(
                server_name="127.0.0.1", server_port=args.port, share=False, max_file_size="100mb",
                theme=theme(), css=CSS, footer_links=[], run_history=False, ssr_mode=False,
                quiet=True, prevent_thread_lock=True,
            )  # fmt: skip
        except OSError:
            raise UserError(f"--port {args.port} is taken, or needs other rights") from None
        print(f"http://127.0.0.1:{args.port} (Ctrl-C ends it and deletes what it has)", flush=True)
        page.block_thread()
    return 0


# ---------------------------------------------------------------------------------------------------------
# the page

HEAD = """<h1>FaceLock</h1>
<p>Changes a portrait a little, so that a diffusion model's edit of it no longer shows the same person; then
edits it as a stranger would, and says what is left. Everything happens on the machine that runs app.py, and
nothing is kept: your pictures are deleted when you close this page, or after an hour.</p>{}"""
STAND_IN = """<p class="note">These are the bundled mini models, made for 128x128 synthetic portraits. They
show how the thing works, and say nothing about how well a real photo is protected.</p>"""
ABOUT_EDITS = "<p>Both pictures are edited by the same instruction, with the same seed.</p>"
WORTH = """<p>This is one instruction and one seed, with one editor. Another editor, or a copy that was
resized, compressed or cleaned, can give another result: this is a test, not a promise.{}</p>"""
ABOUT_TABLE = """FR, without and with protection: the cosine similarity of the face in the edit to the one in
your picture, by each recogniser. One that was attacked is no evidence; no protection has seen the judges."""
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
    look = themes.Base(
        primary_hue="teal", neutral_hue="stone", radius_size="md", font=fonts, font_mono=fonts
    )
    return look.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


def build(studio: Studio) -> Any:
    """Lays the page out and connects it to the studio -> gradio.Blocks."""
    import gradio as gr

    args = studio.args
    portraits = sorted(path for path in PORTRAITS.glob(BUNDLED[args.models]) if path.is_file())

    def view(label: str, alt: str, height: int | None = None) -> gr.Image:
        return gr.Image(
            label=label, alt_text=alt, height=height, min_width=110, type="filepath", interactive=False,
            buttons=["fullscreen"], elem_classes="fill",
        )  # fmt: skip

    def iterations_of(name: str) -> int:
        return METHODS[name].run.num_iters if args.num_iters is None else args.num_iters

    gr.set_static_paths([PORTRAITS])  # served from there, not copied
    with gr.Blocks(title="FaceLock", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        state = gr.State(time_to_live=HOUR, delete_callback=studio.close)
        gr.HTML(HEAD.format(STAND_IN if args.models == "mini" else ""), elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.HTML("<h2>1. A portrait</h2>")
                picture = gr.Image(
                    label="Your portrait", alt_text="Your portrait", height=250, type="filepath",
                    sources=["upload", "webcam", "clipboard"], buttons=["fullscreen"],
                )  # fmt: skip
                bundled = gr.Gallery(
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
                method = gr.Dropdown(list(METHODS), value=args.defend_method, label="Method")
                ends = min(0.01, args.attack_budget), max(USUAL_BUDGET, args.attack_budget)
                budget = gr.Slider(*ends, args.attack_budget, step=0.005, label="Budget, in [-1, 1]")
                given = iterations_of(args.defend_method)
                n_iters = gr.Slider(0, max(500, given), given, step=1, label="Iterations")
            with gr.Column(scale=3, min_width=300):
                gr.HTML("<h2>3. The protected picture</h2>")
                with gr.Row():
                    start = gr.Button("Protect", variant="primary", min_width=120)
                    stop = gr.Button("Cancel", interactive=False, min_width=120)
                status = gr.Markdown("Choose a portrait to begin with.", elem_id="status")
                with gr.Row():
                    source = view("Source", "The source", 200)
                    protected = view("Protected", "The protected picture", 200)
                    difference = view(f"Difference x{AMPLIFY}", "What has changed, around grey", 200)
                compare = gr.HTML()
                download = gr.DownloadButton("Download the protected PNG", interactive=False)
        gr.HTML("<h2>4. What would a stranger get?</h2>")
        with gr.Row(equal_height=True):
            grouped = [
                (f"{group}: {edit_prompts[i]}", edit_prompts[i]) for group in GROUPS for i in GROUPS[group]
            ]
            prompt = gr.Dropdown(grouped, value=grouped[0][1], label="Instruction", scale=3, min_width=260)
            own = gr.Textbox(
                label="Or your own", placeholder="instead of the one chosen", max_lines=1, scale=3,
                min_width=260,
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=90)
            edit = gr.Button("Edit both", variant="primary", min_width=140)
        verdict = gr.HTML(ABOUT_EDITS)
        with gr.Row():
            edits = [
                view("Edit, unprotected", "The edit of your picture", 320),
                view("Edit, protected", "The edit of the protected picture", 320),
            ]
        table = gr.Markdown(elem_id="table")

        # what happens: a handler gives what changes on the page

        @contextlib.contextmanager
        def telling(visit: Visit | None, shows: dict, place: Any) -> Iterator[None]:
            """Shows an error as the sentence that a script would print."""
            try:
                shows[state] = visit  # another hour
                yield
            except Cancelled:
                shows[place] = "Stopped. Nothing was saved."
            except Exception as error:  # as in utils.run_command: one line, whatever it is
                if args.debug:
                    traceback.print_exc()
                known = isinstance(error, (UserError, argparse.ArgumentTypeError))
                text = str(error) if known else f"{type(error).__name__}: {utils.first_line(error)}"
                text = re.sub(rf"{re.escape(str(studio.folder))}/\S*/", "", text)  # the folders of uploads
                shows[place] = TROUBLE.format(html.escape(utils.one_line(text)))

        def check(visit: Visit | None) -> None:
            if visit is None or not visit.folder.exists():
                raise UserError("this page was idle for an hour, its pictures are deleted: load it again")

        def cleared() -> dict:
            nothing = dict.fromkeys([protected, difference, compare, *edits, table])
            return nothing | {download: gr.update(value=None, interactive=False), verdict: ABOUT_EDITS}

        def look(visit: Visit | None, path: str | None) -> dict:
            nothing = {picture: None, source: None, faces: None, which: gr.update(visible=False), status: ""}
            shows = cleared() | nothing
            with telling(visit, shows, status):
                check(visit)
                visit.source = visit.protected = visit.corner = None
                if path:
                    studio.look(visit, Path(path))
                    shows |= seen(visit)
            return shows

        def seen(visit: Visit) -> dict:
            pixels, n_faces = load_image(visit.source).pixels, len(visit.boxes)
            choices = [(f"face {i + 1}", i) for i in range(n_faces)]
            first = [0] if args.faces == "largest" else list(range(n_faces))
            text = f"{visit.source.name}, {pixels.shape[1]}x{pixels.shape[0]}."
            if not n_faces:
                text = TROUBLE.format("No face was found: say where it is, under Faces.")
            return dict.fromkeys((picture, source), shown(visit, pixels)) | {
                faces: shown(visit, pixels, visit.boxes),
                which: gr.update(choices=choices, value=first[:n_faces], visible=n_faces > 1),
                panel: gr.update(label=f"Faces ({n_faces})", **({} if n_faces == 1 else {"open": True})),
                status: text,
            }

        def take_upload(visit: Visit | None, file: dict | None) -> dict:
            return look(visit, file and file["path"])

        def take_bundled(visit: Visit | None, event: gr.SelectData) -> dict:
            return look(visit, str(portraits[event.index]))

        def take_box(visit: Visit | None, text: str) -> dict:
            shows = cleared()
            with telling(visit, shows, status):
                check(visit)
                studio.point(visit, face_box(text))
                shows |= seen(visit)
            return shows

        def take_click(visit: Visit | None, event: gr.SelectData) -> dict:
            shows: dict = {}
            with telling(visit, shows, status):
                check(visit)
                scale = max(1, max(load_image(visit.source).size) / SHOWN_SIDE)
                x, y = (round(place * scale) for place in event.index)
                if visit.corner is None:
                    visit.corner = x, y
                    return {status: f"One corner is at {x},{y}: click on the opposite one."}
                (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(visit.corner, (x, y), strict=True))
                shows |= {by_hand: f"{x0},{y0},{x1},{y1}"} | take_box(visit, f"{x0},{y0},{x1},{y1}")
            return shows

        def describe(name: str, size: float) -> tuple:
            about = METHODS[name].objective.__doc__.splitlines()[0].rstrip(":")
            levels = f"{size / LEVEL:.1f}/255: a pixel moves by at most {allowed_levels(size)} of 255 levels"
            return gr.update(info=about), gr.update(info=levels)

        def begin(visit: Visit | None) -> dict:
            if visit is not None:
                visit.cancelled = False
            buttons = {start: gr.update(interactive=False), stop: gr.update(interactive=True)}
            return cleared() | buttons | {status: ""}

        def end() -> dict:
            return {start: gr.update(interactive=True), stop: gr.update(interactive=False)}

        def cancel(visit: Visit | None) -> None:
            if visit is not None:
                visit.cancelled = True

        bar = gr.Progress()

        def protect(
            visit: Visit | None, name: str, size: float, total: int, chosen: list[int], progress: Any = bar
        ) -> dict:
            began, objective = time.monotonic(), ""

            def step(i: int, values: "Tensor") -> None:
                nonlocal objective
                if visit.cancelled:
                    raise Cancelled
                if (i + 1) % CHECK_EVERY == 0 or i + 1 == total:  # where the loop waits for the device anyway
                    objective = f"objective {values.mean().item():.4g}, "
                left = (time.monotonic() - began) / (i + 1) * (total - i - 1)
                text = f"iteration {i + 1} of {total}, {objective}about {left:.0f} s left"
                progress((i + 1) / total, desc=text)

            shows: dict = {}
            with telling(visit, shows, status), contextlib.redirect_stderr(io.StringIO()) as heard:
                check(visit)
                settings = {"defend_method": name, "attack_budget": size, "num_iters": int(total)}
                report = studio.protect(visit, settings, chosen, step)
                text = measured(report, time.monotonic() - began)
                before, after = (load_image(path).pixels for path in (visit.source, report.path))
                pair = shown(visit, before), shown(visit, after)
                shows |= {
                    protected: pair[1],
                    difference: shown(visit, amplified(after, before)),
                    compare: COMPARE.format(*(f"/gradio_api/file={path}" for path in pair)),
                    download: gr.update(value=str(report.path), interactive=True),
                    status: f"{text}\n\n{notes(heard)}",
                }
            return shows

        def edit_both(visit: Visit | None, chosen: str, written: str, number: int) -> dict:
            shows = dict.fromkeys([*edits, table])
            with telling(visit, shows, verdict), contextlib.redirect_stderr(io.StringIO()) as heard:
                check(visit)
                pair = studio.edit(visit, written.strip() or chosen, int(number))
                shows |= {it: shown(visit, pixels) for it, pixels in zip(edits, pair, strict=True)}
                found = studio.compare(visit, pair)
                parts = [f"<h3>{headline}</h3><p>{why}</p>" for headline, why in map(Face.verdict, found)]
                worth = WORTH.format(" And the models are stand-ins." if args.models == "mini" else "")
                parts = [*(parts or ["<h3>No face, nothing to compare</h3>"]), worth, notes(heard)]
                shows[verdict] = f'<section class="verdict" role="status">{"".join(parts)}</section>'
                if found:
                    rows = table_of(found).to_markdown(floatfmt=".2f", missingval="-")
                    shows[table] = f"{rows}\n\n{ABOUT_TABLE}"
            return shows

        def notes(heard: io.StringIO) -> str:
            lines = re.findall("^warning: (.*)", heard.getvalue(), re.MULTILINE)
            return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)

        def open_visit(request: gr.Request) -> Visit:
            return studio.open(request.session_hash)

        def close_visit(request: gr.Request) -> None:
            studio.close(studio.visits.get(request.session_hash))

        outputs = [
            state, picture, faces, which, panel, by_hand, start, stop, status, source, protected, difference,
            compare, download, *edits, verdict, table,
        ]  # fmt: skip
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        job = {"concurrency_id": "job", "api_visibility": "private"}
        opened = page.load(open_visit, None, state, **quick)
        page.unload(close_visit)
        picture.input(take_upload, [state, picture], outputs, preprocess=False, **quick)
        bundled.select(take_bundled, state, outputs, **quick)
        by_hand.submit(take_box, [state, by_hand], outputs, **quick)
        faces.select(take_click, state, outputs, **quick)
        choices = [method, budget]
        opened.then(describe, choices, choices, **quick)
        method.change(iterations_of, method, n_iters, **quick)
        gr.on([method.change, budget.change], describe, choices, choices, **quick)
        asked = [state, method, budget, n_iters, which]
        begun = start.click(begin, state, outputs, queue=False, **quick)
        done = begun.then(protect, asked, outputs, show_progress_on=status, **job)
        done.then(end, None, outputs, queue=False, **quick)
        stop.click(cancel, state, None, queue=False, **quick)
        edit.click(edit_both, [state, prompt, own, seed], outputs, show_progress_on=verdict, **job)
    return page


if __name__ == "__main__":
    sys.exit(main())
