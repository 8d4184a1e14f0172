"""app.py: the page in a real browser, and the words of its verdict."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app
import defend
from images import linf, load_image, save_png
from models.loading import ROOT
from utils import UserError

MINI = sorted((ROOT / "assets" / "portraits" / "mini").glob("*.png"))
BUDGET = 0.06
FLAGS = f"--models=mini --device=cpu --attack_budget={BUDGET} --num_iters=4".split()
SAVED = re.compile("Saved, read back and measured")
PATIENCE = 30_000  # ms


# ---------------------------------------------------------------------------------------------------------
# the verdict


@pytest.mark.parametrize(
    "recognizer, judge, headline",
    [
        ([0.9, 0.1], [0.9, 0.2], "The protection held in this edit"),
        ([0.9, 0.1], [0.9, 0.6], "The protection did not hold in this edit"),
        ([0.9, 0.1], [0.4, 0.2], "The protection held in this edit"),
        ([0.3, 0.1], [0.4, 0.2], "Nothing to compare in this edit"),
    ],
)
def test_the_verdict_goes_by_both_thresholds(recognizer, judge, headline):
    values = {"recognizer": recognizer, "judge": judge}
    face = app.Face([True, False], values, {"recognizer": 0.5, "judge": 0.5})
    found, reasons = face.verdict()
    assert found == headline
    assert "In the edit of the protected picture no face is found" in reasons
    assert "safe" not in (found + reasons).lower()


def test_without_a_threshold_the_verdict_only_says_which_way_it_moved():
    values = {"recognizer": [0.9, 0.1], "judge": [0.9, 0.95]}
    face = app.Face([True, True], values, {"recognizer": 0.5, "judge": None})
    headline, reasons = face.verdict()
    assert headline == "With protection, the edited face is not clearly less like yours"
    assert "No verification threshold" in reasons


def test_the_table_has_a_line_a_recogniser_and_no_column_of_unknown_thresholds():
    values = {"recognizer": [0.9, 0.1], "judge": [0.8, 0.2]}
    face = app.Face([True, True], values, {"recognizer": None, "judge": None})
    table = app.table_of([face, face])
    assert list(table.index) == ["recogniser, face 1", "judge, face 1", "recogniser, face 2", "judge, face 2"]
    assert list(table.columns) == ["without", "with"]


# ---------------------------------------------------------------------------------------------------------
# the work


@pytest.fixture
def visit(defend_flags, tmp_path):
    """Begins a visit of a studio with tiny models in place of the full set's, but for MTCNN."""
    studio = app.Studio(app.parse_args([*defend_flags, "--models=full", "--num_iters=1"]), tmp_path)
    visit = studio.open("a session")
    yield studio, visit
    studio.close(visit)
    assert not visit.folder.exists() and not studio.visits


@pytest.mark.slow
def test_of_several_faces_those_chosen_are_protected_and_compared(visit, tmp_path):
    studio, visit = visit
    portraits = [ROOT / "assets" / "portraits" / name for name in ("astronaut.png", "grace_hopper.jpg")]
    pair = [load_image(path).pixels[:512] for path in portraits]
    save_png(tmp_path / "pair.png", np.concatenate(pair, axis=1))
    studio.look(visit, tmp_path / "pair.png")
    assert len(visit.boxes) == 2
    with pytest.raises(UserError, match="choose at least one face"):
        studio.protect(visit, {}, [], lambda i, values: None)
    studio.protect(visit, {}, [1], lambda i, values: None)
    assert visit.chosen == [visit.boxes[1]]
    edits = studio.edit(visit, "Let it be snowy", seed=0)
    assert edits.shape == (2, 512, 1024, 3)
    (face,) = studio.compare(visit, edits)
    assert set(face.values) == {"recognizer", "judge"} and len(face.found) == 2
    (same,) = studio.compare(visit, np.stack([load_image(visit.source).pixels] * 2))
    assert same.found == [True, True]
    assert np.allclose([*same.values["recognizer"], *same.values["judge"]], 1, atol=1e-5)


@pytest.mark.slow
def test_without_a_face_the_message_is_the_scripts_and_a_box_helps(visit, tmp_path):
    studio, visit = visit
    with pytest.raises(UserError, match="choose a portrait first"):
        studio.point(visit, (0, 0, 50, 50))
    save_png(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    studio.look(visit, tmp_path / "grey.png")
    assert visit.boxes == []
    with pytest.raises(UserError, match="no face found; say where it is with defend.py --face_box"):
        studio.protect(visit, {}, [], lambda i, values: None)
    studio.protect(visit, {"defend_method": "noise"}, [], lambda i, values: None)
    assert studio.compare(visit, studio.edit(visit, "Let it be snowy", seed=0)) == []
    studio.point(visit, (10, 10, 50, 50))
    studio.protect(visit, {}, [], lambda i, values: None)
    (face,) = studio.compare(visit, studio.edit(visit, "Let it be snowy", seed=0))
    assert face.found == [False, False]


def test_an_upload_that_two_visits_have_is_deleted_with_the_second(visit, tmp_path):
    studio, first = visit
    second = studio.open("another session")
    upload = tmp_path / "upload" / MINI[0].name
    upload.parent.mkdir()
    shutil.copy(MINI[0], upload)
    for one in (first, second):
        studio.look(one, upload)
    studio.close(second)
    assert upload.exists() and first.source.exists() and not second.source.exists()
    studio.close(first)
    assert not upload.exists()


# ---------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="Gradio is not installed: requirements-app.txt")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """Starts app.py -> its address and the folder of its temporary files; at its end that is empty."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), f"--port={port}", *FLAGS]
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", folder
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert not list(folder.glob("facelock-*"))


@pytest.fixture
def open_page(browser, server):
    """Opens pages of visitors; at the end none had an error in its console or asked another host."""
    contexts, trouble = [], []

    def watch_request(request):
        if not request.url.startswith((server[0], "data:", "blob:")):
            trouble.append(f"asked {request.url}")

    def open_one(width=1280, known=""):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: said.type == "error" and not known and trouble.append(said.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", watch_request)
        page.goto(server[0])
        page.get_by_text("7.6/255: a pixel moves by at most 7 of 255").wait_for()  # the visit has begun
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not trouble


def upload(page, path, shows=None):
    page.get_by_text("Click to Upload").wait_for()  # the last picture is gone
    page.locator("input[type=file]").first.set_input_files(path)
    page.locator("#status").get_by_text(shows or Path(path).name).wait_for()


def protect(page, n_iters=4):
    page.get_by_label("number input for Iterations").fill(str(n_iters))
    page.get_by_role("button", name="Protect", exact=True).click()


def download(page, folder):
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


@pytest.mark.browser
def test_from_upload_to_verdict(open_page, tmp_path):
    page = open_page()
    upload(page, MINI[2])
    protect(page)
    page.get_by_text(SAVED).wait_for()
    saved = download(page, tmp_path)
    assert saved.name == f"protected_{MINI[2].stem}.png"
    source, protected = load_image(MINI[2]).pixels, load_image(saved).pixels
    assert 0 < linf(protected, source) <= BUDGET
    levels = int(np.abs(protected.astype(int) - source).max())
    assert page.get_by_text(f"{levels} of 255 levels", exact=True).count() == 1

    page.get_by_label("Or your own").fill("Turn the person's hair pink")
    page.get_by_role("button", name="Edit both").click()
    page.locator("section.verdict h3").wait_for()
    assert "a test, not a promise" in page.locator("section.verdict").inner_text()
    rows = page.locator("#table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["recogniser", "judge"]
    for alt in ("The source", "The protected picture", "What has changed, around grey"):
        assert page.locator(f"img[alt='{alt}']").first.evaluate("image => image.naturalWidth") == 128

    # the page has no method of its own: defend.py makes the same pixels
    other = tmp_path / "other.png"
    assert defend.main([f"--input_path={MINI[2]}", f"--output_path={other}", *FLAGS]) == 0
    np.testing.assert_array_equal(load_image(other).pixels, protected)


@pytest.mark.slow
@pytest.mark.browser
def test_everything_is_within_reach_of_the_keyboard(open_page):
    page = open_page(width=390)
    page.get_by_label("Thumbnail 4 of 12").press("Enter")
    page.locator("#status").get_by_text(MINI[3].name).wait_for()
    page.get_by_role("button", name="Protect", exact=True).press("Enter")
    page.get_by_text(SAVED).wait_for()
    page.get_by_label("Before and after").press("ArrowLeft")
    assert page.locator(".compare").evaluate("it => it.style.getPropertyValue('--at')") == "49%"
    page.get_by_role("button", name="Edit both").press("Enter")
    page.locator("section.verdict h3").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.browser
def test_cancel_stops_the_loop_and_leaves_nothing(open_page):
    page = open_page()
    upload(page, MINI[0])
    protect(page, n_iters=500)
    page.get_by_text(re.compile(r"iteration \d+ of 500, .*s left")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Stopped. Nothing was saved.").wait_for()
    assert page.get_by_role("button", name="Download").is_disabled()
    protect(page)
    page.get_by_text(SAVED).wait_for()


@pytest.mark.slow
@pytest.mark.browser
def test_a_bad_file_is_a_sentence(open_page, tmp_path):
    page = open_page()
    protect(page)
    page.get_by_text("choose a portrait first").wait_for()
    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png", shows="text.png: not a readable image")
    (tmp_path / "bomb.png").write_bytes(huge_png(30_000, 30_000))
    upload(page, tmp_path / "bomb.png", shows=re.compile("bomb.png: .* could be decompression bomb"))
    Image.new("RGB", (8_000, 6_000)).save(tmp_path / "large.png")
    upload(page, tmp_path / "large.png", shows="large.png: 8000x6000 is more than the 32 megapixels")
    page.get_by_role("button", name="Edit both").click()
    page.get_by_text("protect a portrait first").wait_for()
    assert page.get_by_text("Traceback").count() == 0 and page.get_by_text("/facelock-").count() == 0


def huge_png(width, height):
    """A PNG that promises more pixels than it has."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": size, b"IDAT": zlib.compress(b""), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.slow
@pytest.mark.browser
def test_a_face_can_be_given_by_numbers_and_by_clicks(open_page):
    page = open_page()
    upload(page, MINI[1])
    page.get_by_role("button", name=re.compile(r"Faces \(\d\)")).click()
    by_hand = page.get_by_label(re.compile("A box by hand"))
    by_hand.fill("10,20")
    by_hand.press("Enter")
    page.get_by_text("'10,20' is not four whole numbers").wait_for()
    by_hand.fill("30,20,100,110")
    by_hand.press("Enter")
    page.locator("#status").get_by_text(MINI[1].name).wait_for()
    picture = page.get_by_alt_text("Your portrait with numbered boxes around its faces")
    box = picture.bounding_box()
    for x, y in ((0.25, 0.2), (0.75, 0.85)):
        picture.click(position={"x": x * box["width"], "y": y * box["height"]})
        page.wait_for_timeout(500)
    assert re.fullmatch(r"3\d,2\d,9\d,10\d", by_hand.input_value())
    protect(page)
    page.get_by_text(SAVED).wait_for()


@pytest.mark.slow
@pytest.mark.browser
def test_two_visitors_wait_for_each_other_and_see_only_their_own(open_page, server, tmp_path):
    first, second = open_page(), open_page()
    upload(first, MINI[4])
    upload(second, MINI[5])
    protect(first, n_iters=500)
    first.get_by_text(re.compile("iteration .* of 500")).wait_for()
    protect(second)
    second.get_by_text(re.compile("queue: 1/1")).wait_for()
    first.get_by_role("button", name="Cancel").click()
    second.get_by_text(SAVED).wait_for()
    protect(first)
    first.get_by_text(SAVED).wait_for()
    for page, own, other in ((first, MINI[4], MINI[5]), (second, MINI[5], MINI[4])):
        saved = download(page, tmp_path)
        assert saved.name == f"protected_{own.stem}.png"
        assert linf(load_image(saved).pixels, load_image(own).pixels) <= BUDGET
        assert f"protected_{other.stem}" not in page.content()
    first.context.close()
    wait_until(lambda: not [path for path in server[1].rglob("*.png") if MINI[4].stem in path.name])
    assert list(server[1].rglob(f"protected_{MINI[5].stem}.png"))
    second.context.close()
    wait_until(lambda: not list(server[1].rglob("*.png")))


def wait_until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.browser
def test_the_camera_gives_a_portrait(open_page):
    page = open_page(known="Gradio asks for the progress of an upload that has not begun")
    page.get_by_role("button", name="Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.currentTime > 0")
    page.wait_for_timeout(1000)  # opening the camera clears the picture, with an event of its own
    page.get_by_role("button", name="capture photo").click()
    page.locator("#status").get_by_text(re.compile(r"image.png, \d+x\d+|No face was found")).wait_for()


@pytest.mark.slow
@pytest.mark.browser
def test_a_photo_of_24_megapixels_works(open_page, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.open(MINI[0]).convert("RGB").resize((6000, 4000)).save(photo, quality=80)
    page = open_page()
    upload(page, photo)
    protect(page, n_iters=1)
    page.get_by_text(SAVED).wait_for(timeout=60_000)
    assert load_image(download(page, tmp_path)).size == (4000, 6000)
