"""app.py: the page in a real browser, and the words of its verdict."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import app
import defend
from backend import Backend, judged, left_out, table_of
from images import linf, load_image, to_tensor
from models.loading import ROOT
from utils import NO_WORDS, UserError
from verdict import Face
from visits import HOUR, MARK, MOST_WAITING, Cancelled, Picture, Visits, clear_dead, server_folder

WHY = "Gradio is not installed: requirements-app.txt"
pytestmark = pytest.mark.skipif(util.find_spec("gradio") is None, reason=WHY)

MINI = sorted((ROOT / "assets" / "portraits" / "mini").glob("*.png"))
BUDGET = 0.06
SAVED = re.compile("Saved, read back and measured")
PATIENCE = 30_000  # ms


@pytest.mark.parametrize("made", ["edit", "round trip"])
@pytest.mark.parametrize(
    ("judge", "dlib", "outcome"),
    [
        ([0.9, 0.1], [0.9, 0.2], "held"),
        ([0.9, 0.1], [0.9, 0.6], "partly"),
        ([0.9, 0.7], [0.9, 0.6], "failed"),
        ([0.9, 0.1], [0.4, 0.2], "held"),
        ([0.9, 0.8], [0.4, 0.2], "failed"),
        ([0.9, 0.1], [0.4, 0.7], "held"),
        ([0.3, 0.1], [0.4, 0.2], "nothing"),
    ],
)
def test_the_verdict_goes_by_the_judges_thresholds(judge, dlib, outcome, made):
    """What an attacked recogniser says decides nothing, and one that can't judge says only that."""
    values = {"recognizer": [0.9, 0.9], "judge": judge, "dlib": dlib}
    face = Face([True, False], values, dict.fromkeys(values, 0.5), attacked=("recognizer",))
    found = face.verdict(made)
    assert found.outcome == outcome and made in found.headline
    assert not re.search("recognizer|safe", str(found).lower())
    assert f"In the {made} of the unprotected picture the face is found" in found.reasons[0]
    for name, (before, after) in (("judge", judge), ("dlib", dlib)):
        (said,) = [line for line in found.reasons if line.startswith(name)]
        assert said.startswith(f"{name} can't judge this face") == (before < 0.5)
        assert ("did not hold" in said) == (before > 0.5 and after > 0.5)
    assert ("larger budget" in str(found)) == (outcome in ("partly", "failed"))
    assert "larger budget" not in str(face.verdict(made, advice=""))
    page = judged([found, found])
    assert f'class="verdict {outcome}"' in page and "<h3>Face 1: " in page and "<h3>Face 2: " in page


def test_without_a_threshold_the_verdict_only_says_which_way_it_moved():
    values = {"recognizer": [0.9, 0.1], "judge": [0.9, 0.95]}
    face = Face([True, True], values, {"recognizer": 0.5, "judge": None}, attacked=("recognizer",))
    found = face.verdict()
    assert "not clearly less like" in found.headline and "No verification threshold" in found.reasons[0]
    face.values["judge"] = [0.9, 0.5]
    assert "not clearly" not in face.verdict().headline and not face.has_judges


def test_the_table_has_a_line_a_recogniser_and_no_column_of_unknown_thresholds():
    """And a line above it names the faces that were left out."""
    values = {"recognizer": [0.9, 0.1], "judge": [0.8, 0.2]}
    face = Face([True, True], values, {"recognizer": None, "judge": None}, attacked=("recognizer",))
    table = table_of([face, face])
    names = [f"{name}, face {number}" for number in (1, 2) for name in ("recognizer (attacked)", "judge")]
    assert list(table.index) == names
    assert list(table.columns) == ["FR"] and table.loc["judge, face 1", "FR"] == "0.80 → 0.20"
    assert "2 faces found, 1 protected" in left_out(2, 1)
    assert left_out(2, 2) == left_out(0, 0) == ""


# ---------------------------------------------------------------------------------------------------------
# visits


@pytest.fixture
def visits(tmp_path):
    (tmp_path / "server").mkdir()
    return Visits(tmp_path / "server")


def test_a_visit_has_one_folder_that_is_never_made_again(visits):
    visit = visits.open("a session")
    assert stat.S_IMODE(visit.folder.stat().st_mode) == 0o700
    path = visit.place("shown", "shown.png")
    visit.write(path, b"data")
    visits.close(visit)
    assert list(visits.folder.iterdir()) == [] and not visits.visits
    with pytest.raises(Cancelled):
        visit.write(path, b"data")
    with pytest.raises(Cancelled):
        visit.place("shown", "shown.png")
    visit = visits.open("another session")
    path = visit.place("shown", "shown.png")
    shutil.rmtree(visit.folder)  # somebody tidies up
    with pytest.raises(UserError, match="shown.png: can't be stored"):
        visit.write(path, b"data")
    with pytest.raises(UserError, match="protected.png: can't be stored"):
        visit.place("protected", "protected.png")
    assert list(visits.folder.iterdir()) == []


def test_a_visit_that_ends_while_its_files_are_written_leaves_none(visits):
    visit = visits.open("a session")
    begun = threading.Event()

    def write():
        with contextlib.suppress(Cancelled):
            while True:
                visit.write(visit.place("shown", "shown.png"), b"data")
                begun.set()

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    begun.wait(10)
    visits.close(visit)
    for writer in writers:
        writer.join(10)
    assert list(visits.folder.iterdir()) == []


def test_a_visit_stores_one_file_of_a_kind_and_none_of_the_last_picture(visits):
    visit = visits.open("a session")
    for kind in ("source", "protected", "protected"):
        visit.write(path := visit.place(kind, "it.png"), b"data")
        assert path.read_bytes() == b"data" and visits.has(str(path))
    assert len([path for path in visit.folder.rglob("*") if path.is_file()]) == 2
    visit.expect(Picture(visit.files["source"]))  # a face given by hand
    assert list(visit.files) == ["source"]
    visit.expect(Picture())
    assert list(visit.folder.iterdir()) == []


def test_what_belongs_to_no_visit_is_swept(visits, monkeypatch):
    first, second = visits.open("first"), visits.open("second")
    (visits.folder / "stray").mkdir()
    (visits.folder / "file").write_text("stray")
    visits.wait("old.png", io.BytesIO())
    second.used -= HOUR + 1
    visits.waiting = {key: (name, file, at - 61) for key, (name, file, at) in visits.waiting.items()}
    token = visits.wait("new.png", io.BytesIO(b"data"))
    visits.sweep()
    assert list(visits.folder.iterdir()) == [first.folder] and list(visits.waiting) == [token]
    assert visits.find("first") is first
    with pytest.raises(UserError, match="reload it"):
        visits.find("second")
    visits.end()
    with pytest.raises(UserError, match="too many people"):
        visits.open("third")


def test_only_the_folders_of_dead_servers_are_deleted(tmp_path):
    """By their lock, which a killed process loses; nothing without our mark, and nothing behind a link."""
    code = (
        "from visits import *; import time\nwith server_folder() as it: print(it, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    servers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    dead, living = (Path(server.stdout.readline().strip()) for server in servers)
    for folder in (dead, living, tmp_path / "facelock-mine"):
        (folder / "tmp1").mkdir(parents=True)
        (folder / "tmp1" / "shown.png").write_text("a face")
    servers[0].kill()
    servers[0].wait()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARK).touch()
    (tmp_path / "facelock-link").symlink_to(tmp_path / "elsewhere")
    clear_dead(tmp_path)
    assert not dead.exists()
    for kept in (living, tmp_path / "facelock-mine"):
        assert (kept / "tmp1" / "shown.png").exists()
    assert (tmp_path / "elsewhere" / MARK).exists()
    servers[1].terminate()
    servers[1].wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        with server_folder() as folder:  # the next start
            assert not living.exists()
        assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------
# the work


@pytest.fixture(scope="module")
def backend(defend_flags):
    """Makes a backend with tiny models in place of the full set's, but for MTCNN."""
    return Backend(defend.settings_of(app.parse_args([*defend_flags, "--models=full", "--num_iters=1"])))


def ignore(i, values):
    pass


def labels_of(page):
    return {it.label for it in page.blocks.values() if getattr(it, "label", None) and it.visible}


@pytest.mark.parametrize("is_there", [True, False])
def test_the_recommended_methods_come_first(is_there, defend_flags, visits):
    """instant where a network for the autoencoder is there, and a line on each under the menu."""
    from page import Page

    line = [*defend_flags, "--defend_method=encoder", *([] if is_there else ["--protector=/none"])]
    assert app.first_method(app.parse_args(line)) == ("instant" if is_there else "facelock-wide")
    backend = Backend(defend.settings_of(app.parse_args(line)))
    page = Page(backend, visits).blocks
    (menu,) = [it for it in page.blocks.values() if getattr(it, "label", "") == "Method"]
    names = [name for _, name in menu.choices]
    first = ["facelock-wide", "facelock-wash", "facelock-dim", *(["instant"] if is_there else [])]
    assert names[: len(first)] == first and len({*names}) == len(names) and "veto" not in names
    assert all(label.startswith("for comparison: ") == (name not in first) for label, name in menu.choices)
    if is_there:
        visit = visits.open("a session")
        visit.expect(picture := Picture(MINI[0], [(20, 20, 110, 110)]))
        visit.show(picture)
        job = backend.plan(visit, {"method": "instant", "budget": 0.06, "num_iters": 100}, [0])
        assert 0 < backend.protect(visit, job, ignore).linf <= 0.06


def test_a_page_through_an_autoencoder_asks_for_no_words(defend_flags, visits, tmp_path):
    """A picture is protected, goes through and back, and each judge is named."""
    from page import Page, notes_of

    vae = tiny.write_taef2(tmp_path / "own")
    line = [*defend_flags, "--models=full", "--model=round-trip", f"--vae={vae}", "--num_iters=1"]
    line.remove("--model_id")
    del line[line.index(next(flag for flag in line if flag.endswith("/editor")))]
    backend = Backend(defend.settings_of(app.parse_args(line)))
    page = Page(backend, visits).blocks
    assert not labels_of(page) & {"Instruction", "Or your own", "Seed"}
    said = notes_of(backend)
    assert "own. It stands in for flux2-klein" in said and "editor itself is not used" in said
    visit = visits.open("a session")
    visit.expect(picture := Picture(MINI[0], [(20, 20, 110, 110)]))
    visit.show(picture)
    backend.protect(visit, backend.plan(visit, {}, [0]), ignore)
    # the page has no method of its own: defend.py makes the same pixels
    line += [f"--input_path={MINI[0]}", "--face_box=20,20,110,110", f"--output_path={tmp_path}/other.png"]
    assert defend.main(line) == 0
    assert np.array_equal(load_image(tmp_path / "other.png").pixels, load_image(picture.protected).pixels)
    trips = backend.edit(picture, NO_WORDS, seed=0)
    source = load_image(picture.source).pixels
    vae = backend.config.load_vae().round_trip(to_tensor(source).to(backend.config.device))
    assert trips.shape == (2, 128, 128, 3) and vae.shape[-2:] == (64, 64)
    (face,) = backend.compare(picture, trips)
    (found,) = backend.verdicts([face])
    assert set(face.values) == {"recognizer", "judge"} and "round trip" in found.headline


def test_a_page_without_weights_opens_and_says_what_is_missing(visits, defend_flags, tmp_path, monkeypatch):
    from page import Page

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is cached
    line = [*defend_flags, "--models=full", "--lpips=alex", "--model_id=me/<b>", "--defend_method=facelock"]
    bare = Backend(defend.settings_of(app.parse_args(line)))
    page = Page(bare, visits).blocks
    head = next(it.value for it in page.blocks.values() if it.elem_id == "head")
    assert "LPIPS" in head and "0.2 GB, https://" in head and "hf download me/&lt;b&gt;" in head
    assert "HF_ENDPOINT" in head and "docs/models.md" in head and "<b>" not in head
    buttons = {it.value: it.interactive for it in page.blocks.values() if it.get_block_name() == "button"}
    assert buttons["Protect"] is buttons["Edit both"] is False
    visit = visits.open("a session")
    visit.expect(picture := Picture(MINI[0]))
    bare.look(picture)
    visit.show(picture)
    with pytest.raises(UserError, match="networks are missing"):
        bare.plan(visit, {}, [])


@pytest.mark.parametrize("n_iters", [1, 500])
def test_a_protection_is_for_its_own_picture(backend, visits, n_iters):
    """Not for one that is chosen in its first or last step, of whatever size, nor for a visit that ends."""

    def protect_while(happens):
        visit, steps = visits.open("a session"), []
        visit.expect(picture := Picture(MINI[0]))
        visit.show(picture)
        job = backend.plan(visit, {"method": "encoder", "num_iters": n_iters}, [])

        def step(i, values):
            steps.append(i)
            happens(visit)

        with pytest.raises(Cancelled):
            backend.protect(visit, job, step)
        assert picture.protected is None and steps == [0]
        assert not list(visits.folder.rglob("*.png"))

    protect_while(lambda visit: visit.expect(Picture(ROOT / "assets" / "portraits" / "astronaut.png")))
    protect_while(lambda visit: visit.expect(None))
    protect_while(visits.close)
    assert list(visits.folder.iterdir()) == []


def test_faces_are_chosen_by_their_numbers(backend, visits):
    visit = visits.open("a session")
    visit.expect(picture := Picture(MINI[0], [(0, 0, 50, 50), (50, 50, 90, 90)]))
    visit.show(picture)
    for wrong in ([], [2], [-1], ["0"]):
        with pytest.raises(UserError, match="choose at least one face"):
            backend.plan(visit, {}, wrong)
    assert backend.plan(visit, {}, [1]).faces == [picture.boxes[1]]


# ---------------------------------------------------------------------------------------------------------
# requests, of which nothing is believed


PORT = 7860
HERE = f"http://127.0.0.1:{PORT}"
API = "/gradio_api"


@pytest.fixture(scope="module")
def served(backend, tmp_path_factory):
    """Serves the page in this process."""
    from page import Page

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("served")
        patch.setattr("tempfile.tempdir", str(root))
        (root / "server").mkdir()
        patch.setenv("GRADIO_TEMP_DIR", str(root / "server"))
        from starlette.testclient import TestClient

        import server

        visits = Visits(root / "server")
        page = Page(backend, visits).blocks
        served = server.guarded(page, visits, PORT, {str(path) for path in MINI})
        with TestClient(served, HERE, raise_server_exceptions=False) as client:
            client.visits, client.page = visits, page
            yield client


@pytest.fixture
def client(served):
    """Asks the page's server; client.visits has its visits, of which none is left at the end."""
    yield served
    served.visits.waiting.clear()
    for visit in list(served.visits.visits.values()):
        served.visits.close(visit)


def number_of(client, name):
    """The event's number by its handler."""
    return next(number for number, event in client.page.fns.items() if event.name == name)


def ask(client, session, name, data=(), index=None):
    """Sends an event as the page does -> what it answers, as text."""
    event = {"index": index, "value": None, "selected": True}
    call = {"fn_index": number_of(client, name), "session_hash": session, "data": data, "event_data": event}
    route = "queue/join" if client.page.fns[call["fn_index"]].queue else "run/predict"
    headers = {"content-type": "application/json"}
    answer = client.post(f"{API}/{route}", content=json.dumps(call), headers=headers)
    if route == "run/predict" or answer.status_code != 200:
        return answer.text
    return client.get(f"{API}/queue/data?session_hash={session}").text


def upload_file(client, data, name="me.png", **headers):
    return client.post(f"{API}/upload", files={"files": (name, data)}, headers=headers)


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = [
    {"host": "evil.example"},
    {"host": f"127.0.0.1.evil.example:{PORT}"},
    {"host": "localhost:8000"},
    {"host": ""},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"origin": f"http://localhost:{PORT}"},  # who listens there may be somebody else
    {"origin": f"https://127.0.0.1:{PORT}"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]
ROUTES = [
    "/", "/config", "/assets/x", "/nothing", f"{API}/upload", f"{API}/queue/join", f"{API}/run/predict",
    f"{API}/queue/data?session_hash=x", f"{API}/heartbeat/x", f"{API}/file={MINI[0]}",
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: " ".join(*headers.items()))
def test_other_hosts_and_origins_get_nothing(client, headers):
    """A page elsewhere, and one whose name was made to lead here (DNS rebinding)."""
    for route in ROUTES:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            answer = client.request(method, route, headers=headers)
            assert answer.status_code == 403, (method, route)
            assert "access-control-allow-origin" not in answer.headers
    assert upload_file(client, b"data", **headers).status_code == 403
    assert not client.visits.waiting and not client.visits.visits


def test_the_page_itself_is_served(client):
    for host in ("127.0.0.1", "localhost", "[::1]"):
        address = f"{host}:{PORT}"
        own = {"host": address, "origin": f"http://{address}", "sec-fetch-site": "same-origin"}
        assert "FaceLock" in client.get("/", headers=own).text
    from_a_link = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert client.get("/", headers=from_a_link).status_code == 200
    assert client.get("/config", headers=from_a_link).status_code == 403
    assert client.get(f"{API}/file={MINI[0]}").content == MINI[0].read_bytes()


def test_what_the_page_does_not_ask_for_is_not_there(client):
    """Of what Gradio offers, and files that are not the page's, however they are spelled; no websocket."""
    from starlette.testclient import WebSocketDisconnect

    asked = (
        "proxy=http://127.0.0.1:80/", "component_server", "process_recording", "vibe-edit", "api/protect",
        "call/protect", "stream/x", "stream/x/y/1/playlist-file", "file//etc/hostname", "file=/etc/hostname",
        "file=http://127.0.0.1/", f"file={ROOT}/app.py", f"file={MINI[0].parent}/../../../app.py",
        f"file={MINI[0].parent}/%2E/{MINI[0].name}", "info", "deep_link?session_hash=x",
    )  # fmt: skip
    for route in [f"{API}/{name}" for name in asked] + ["/docs", "/login", "/monitoring", "/logout"]:
        for method in ("GET", "POST"):
            assert client.request(method, route).status_code == 404, route
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(f"{API}/queue/join"):
        pass


def test_an_upload_has_no_name_until_a_visit_takes_it(client):
    """So a broken one, or one of a page that was closed, leaves nothing behind."""
    visit = client.visits.open("uploads")
    root = client.visits.folder.parent
    data = MINI[0].read_bytes()
    before = files_in(root)
    (token,) = upload_file(client, data + bytes(3_000_000), "../../a b#c?.png").json()  # on disk by its size
    assert files_in(root) == before
    assert client.get(f"{API}/file={token}").headers["content-type"] == "image/gif"
    broken = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(3_000_000)
    for body in (part, b"", b"--x--"):
        assert client.post(f"{API}/upload", content=body, headers=broken).status_code == 400
    assert client.post(f"{API}/upload", content=b"x").status_code == 400
    assert files_in(root) == before and list(client.visits.waiting) == [token]
    assert "a b#c?.png, 128x128" in ask(client, "uploads", "take_upload", [{"path": token}])
    assert [path.name for path in visit.files.values()] == ["a b#c?.png", "shown.png", "shown.png"]
    client.visits.close(visit)
    assert files_in(root) == before


def test_uploads_have_limits(client, monkeypatch):
    monkeypatch.setattr("server.LARGEST_UPLOAD", 1000)
    answer = upload_file(client, bytes(2000))
    assert answer.status_code == 413 and answer.text == "larger than the 100 MB that this page takes"
    for _ in range(MOST_WAITING):
        assert upload_file(client, b"data").status_code == 200
    assert upload_file(client, b"data").status_code == 503
    assert not files_in(client.visits.folder)
    client.visits.waiting.clear()
    from server import safe_name

    assert safe_name("../..") == "portrait" and safe_name("a\n\0b.png") == "ab.png"
    assert len(safe_name(f"{'ü' * 300}.png").encode()) <= 204


def test_no_path_of_a_request_is_used(client, tmp_path):
    """In whatever input of whatever event: no file is read, copied or deleted that a request names."""
    visit, other = client.visits.open("thief"), client.visits.open("victim")
    (token,) = upload_file(client, MINI[1].read_bytes(), "victim.png").json()
    kept = client.visits.take(other, token)
    private = tmp_path / "private.png"
    shutil.copy(MINI[2], private)
    (tmp_path / "link.png").symlink_to(private)
    outside = client.visits.folder.parent / "outside.png"
    shutil.copy(MINI[2], outside)
    named = (
        private, tmp_path / "link.png", outside, visit.folder / ".." / ".." / outside.name, kept, token,
        "/dev/zero", "http://127.0.0.1:9/x.png", f"upload/../../../../../../../..{private}", MINI[0],
    )  # fmt: skip
    before = files_in(client.visits.folder) | files_in(tmp_path)
    file = {"meta": {"_type": "gradio.FileData"}}
    for path in map(str, named):
        for said in ({"path": path}, {"path": path, "url": path} | file):
            assert "choose the file again" in ask(client, "thief", "take_upload", [said])
    for name in ("take_box", "describe", "numbers_of", "edit_both", "begin", "cancel", "end"):
        for said in ({"path": str(private)} | file, [{"path": token} | file]):
            assert "file=" not in ask(client, "thief", name, [said] * 4, index=said)
    assert files_in(client.visits.folder) | files_in(tmp_path) == before
    client.visits.close(other)
    client.visits.close(visit)
    assert private.read_bytes() == outside.read_bytes() == MINI[2].read_bytes()


def test_numbers_of_requests_are_checked(client):
    """Those that the page itself would not send, too: a sentence, and no exception's words."""
    visit = client.visits.open("numbers")
    for index in (-1, 2, 10**30, 1.5, "0", None, [0], {}):
        ask(client, "numbers", "take_bundled", index=index)
        assert visit.picture is None and visit.coming is None
    assert "grace_hopper.jpg, 512x600" in ask(client, "numbers", "take_bundled", index=1)
    for index in (3, [1], [1, 2, 3], ["a", "b"], [None, None], {}):
        ask(client, "numbers", "take_click", index=index)
        assert visit.corner is None
    assert "One corner is at 0,128" in ask(client, "numbers", "take_click", index=[-5, 128])
    budgets = (5, None, "x", [1], -1, 0.301, 1e999)
    rows = [(budget, 4, "Budget: ") for budget in budgets]
    rows += [(0.03, total, "Iterations: ") for total in (-1, 501, 10**12, 4.5, None, "x")]
    for budget, total, said in rows:
        assert said in ask(client, "numbers", "begin", ["encoder", budget, total, []])
        assert visit.job is None
    assert "Budget: nothing is given" in ask(client, "numbers", "begin", ["encoder", None, 4, []])
    assert "from 0.01 to 0.3" in ask(client, "numbers", "describe", ["encoder", 5])
    for seed in (None, -1, 1.5, 2**63, "x"):
        assert "Seed: " in ask(client, "numbers", "edit_both", ["Let it be snowy", "", seed])
    for box in ("1,2", "0,0,0,0", "nan,1,2,3", "600,600,700,700"):
        assert re.search("is not|outside the 512x600 image", ask(client, "numbers", "take_box", [box]))
    assert "choose a method" in ask(client, "numbers", "begin", [None, 0.03, 4, []])
    ask(client, "numbers", "begin", ["no method", 0.03, 4, []])
    assert visit.job is None


def test_a_face_that_is_not_found_can_be_given_by_numbers_and_by_clicks(client, backend):
    """Without one, nothing but a method that needs one is refused, and in the page's own words."""
    visit, file = client.visits.open("faces"), io.BytesIO()
    Image.new("RGB", (128, 128), "grey").save(file, "PNG")
    (token,) = upload_file(client, file.getvalue()).json()
    said = "No face was found: draw a box around it, under Faces."
    assert said in ask(client, "faces", "take_upload", [{"path": token}])
    with pytest.raises(UserError, match=said[1:-1]):
        backend.protect(visit, backend.plan(visit, {"method": "facelock"}, []), ignore)
    assert "me.png, 128x128" in ask(client, "faces", "take_box", ["30,20,100,110"])
    assert visit.picture.boxes == [(30, 20, 100, 110)]
    for corner in ([90, 100], [32, 26]):
        answer = ask(client, "faces", "take_click", index=corner)
    assert visit.picture.boxes == [(32, 26, 90, 100)] and "32,26,90,100" in answer


def test_a_call_is_small_and_well_formed_and_jobs_go_through_the_queue(client):
    for content in (b"", b"[]", b"{}", b"[" * 100_000, b'{"data": 5}', b"1" * 10_000, b" " * 2_000_000):
        assert client.post(f"{API}/queue/join", content=content).status_code == 400
    call = {"fn_index": number_of(client, "protect"), "session_hash": "x", "data": []}
    assert client.post(f"{API}/run/predict", json=call).status_code == 404


def test_a_bad_file_is_a_sentence(client):
    client.visits.open("bad")
    answers = [ask(client, "bad", "begin", ["encoder", 0.03, 4, []])]
    for data in (b"no picture", tiny.bomb(30_000, 30_000), tiny.bomb(12_000, 12_000)):
        (token,) = upload_file(client, data).json()
        answers.append(ask(client, "bad", "take_upload", [{"path": token}]))
    answers.append(ask(client, "bad", "edit_both", ["Let it be snowy", "", 0]))
    said = ["choose a portrait first", "me.png: not a readable image"]
    said += ["me.png: .* could be decompression bomb", "me.png: 12000x12000 is more than the 24.5 megapixels"]
    said += ["protect a portrait first"]
    for answer, text in zip(answers, said, strict=True):
        assert re.search(text, answer) and not re.search("Traceback|/facelock-", answer), answer


def test_names_are_not_markup(client):
    client.visits.open("names")
    name = "_a_ **b** $c$ <img src=x onerror=alert(1)>.png"
    (token,) = upload_file(client, MINI[0].read_bytes(), name).json()
    answer = ask(client, "names", "take_upload", [{"path": token}])
    assert "&lt;img src=x onerror=alert(1)&gt;.png, 128x128" in answer and "<img src=x" not in answer
    (status,) = (it for it in client.page.blocks.values() if it.elem_id == "status")
    assert status.get_block_name() == "html"  # and not Markdown


# ---------------------------------------------------------------------------------------------------------
# the page


@contextlib.contextmanager
def running(folder, defend_flags):
    """Starts app.py on the tiny models with the paper's method -> the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*defend_flags, f"--port={port}", "--defend_method=facelock", f"--attack_budget={BUDGET}"]
    command = [sys.executable, str(ROOT / "app.py"), *flags]
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(browser, defend_flags, tmp_path_factory):
    """Starts app.py -> its address and the folder of its temporary files; ended in a job, it leaves none."""
    folder = tmp_path_factory.mktemp("server")
    with running(folder, defend_flags) as (process, address):
        yield address, folder
        page = browser.new_page()
        page.goto(address)
        begin_a_long_job(page, MINI[0])
        process.terminate()
        assert process.wait(timeout=20) == 143
        page.close()
    assert not list(folder.glob("facelock-*"))


def begin_a_long_job(page, path):
    upload(page, path)
    protect(page, n_iters=500)
    page.get_by_text(re.compile(r"iteration \d+ of 500, .*s left")).wait_for()


@pytest.fixture
def open_page(browser, server):
    """Opens pages of visitors; at the end none had an error in its console or asked another host."""
    contexts, trouble = [], []

    def tell(said):
        return f"{said.text} {said.location['url']}"

    def watch_request(request):
        if not request.url.startswith((server[0], "data:", "blob:")):
            trouble.append(f"asked {request.url}")

    def open_one(width=1280, known=""):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: said.type == "error" and not known and trouble.append(tell(said)))
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
    page.get_by_label("Iterations").fill(str(n_iters))
    page.get_by_role("button", name="Protect", exact=True).press("Enter")


def download(page, folder):
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def protect_anew(page, click):
    """Protects once more: what was saved goes, and comes again."""
    click()
    page.get_by_text(SAVED).wait_for(state="detached")
    page.get_by_text(SAVED).wait_for()


@pytest.mark.browser
def test_from_upload_to_verdict_and_to_another(open_page, tmp_path):
    """On a narrow screen, by the keyboard, of a file whose name no markup takes for its own."""
    name = "_a_ *b* $c$ ${1+1} {{2}} <b>d<b> %41#?.png"
    photo = shutil.copy(MINI[2], tmp_path / name)
    page = open_page(width=390)
    upload(page, photo)
    assert page.locator("#status").inner_text() == f"{name}, 128x128."
    protect(page, n_iters=12)
    page.get_by_text(SAVED).wait_for()
    saved = download(page, tmp_path)
    assert saved.name == "protected_mini_" + re.sub("[*<>?]", "_", name)  # as the browser writes it
    source, protected = load_image(MINI[2]).pixels, load_image(saved).pixels
    assert 0 < linf(protected, source) <= BUDGET
    levels = int(np.abs(protected.astype(int) - source).max())
    assert page.get_by_text(f"{levels} of 255 levels", exact=True).count() == 1
    page.get_by_label("Before and after").press("ArrowLeft")
    assert page.locator(".compare").evaluate("it => it.style.getPropertyValue('--at')") == "49%"

    page.get_by_label("Or your own").fill("Let it be snowy")
    page.get_by_role("button", name="Edit both").press("Enter")
    page.locator("section.verdict").wait_for()
    assert page.get_by_text("a test, not a promise").count() == 1
    assert page.get_by_text("nothing about how well a real photo is protected").count() == 2
    rows = page.locator("#table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["recognizer", "judge"]
    for alt in ("The source", "The protected picture", "What has changed, shown around grey"):
        assert page.locator(f"img[alt='{alt}']").first.evaluate("image => image.naturalWidth") == 128
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    colours = page.locator("section.verdict").evaluate(
        """it => ["held", "partly", "failed", "nothing"].map(outcome => {
            it.className = "verdict " + outcome
            return getComputedStyle(it).borderLeftColor
        })"""
    )
    assert len({*colours}) == 4


@pytest.mark.browser
def test_a_networks_answer_comes_at_once_and_can_be_made_stronger(open_page, tmp_path):
    """By the bundled network; then by the loop that it was trained after."""
    page = open_page()
    page.get_by_label("Thumbnail 3 of 12").press("Enter")
    page.locator("#status").get_by_text(MINI[2].name).wait_for()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="instant").click()
    page.get_by_label("Iterations").wait_for(state="detached")
    stronger = page.get_by_role("button", name="Make it stronger")
    assert stronger.count() == 0
    page.get_by_role("button", name="Protect", exact=True).click()
    page.get_by_text(SAVED).wait_for()
    at_once = load_image(download(page, tmp_path)).pixels
    protect_anew(page, stronger.click)
    assert page.get_by_label("Method").input_value() == "facelock-dim" and stronger.count() == 0
    assert (load_image(download(page, tmp_path)).pixels != at_once).any()


@pytest.mark.slow
@pytest.mark.browser
def test_two_visitors_wait_for_each_other_and_see_only_their_own(open_page, server, tmp_path):
    first, second = open_page(), open_page()
    upload(second, MINI[5])
    begin_a_long_job(first, MINI[4])
    protect(second)
    second.get_by_text(re.compile("queue: 1/1")).wait_for()
    second.get_by_role("button", name="Cancel").click()
    second.get_by_text("Stopped. Nothing was saved.").wait_for()
    assert second.get_by_role("button", name="Download").is_disabled()
    assert first.get_by_text(re.compile("iteration .* of 500")).count()
    protect(second)
    second.get_by_text(re.compile("queue: 1/1")).wait_for()
    first.get_by_role("button", name="Cancel").click()
    second.get_by_text(SAVED).wait_for()
    protect(first)
    first.get_by_text(SAVED).wait_for()
    for page, own, other in ((first, MINI[4], MINI[5]), (second, MINI[5], MINI[4])):
        saved = download(page, tmp_path)
        assert saved.name == f"protected_mini_{own.stem}.png"
        assert linf(load_image(saved).pixels, load_image(own).pixels) <= BUDGET
        assert f"protected_mini_{other.stem}" not in page.content()
    first.context.close()
    wait_until(lambda: not [path for path in server[1].rglob("*.png") if MINI[4].stem in path.name])
    assert list(server[1].rglob(f"protected_mini_{MINI[5].stem}.png"))
    second.context.close()
    wait_until(lambda: not list(server[1].rglob("*.png")))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("end", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_however_the_server_ends_in_a_job_nothing_is_left(browser, defend_flags, tmp_path, end):
    """After a kill: once the next one starts."""
    context = browser.new_context()
    with running(tmp_path, defend_flags) as (process, address):
        page = context.new_page()
        page.goto(address)
        begin_a_long_job(page, MINI[0])
        assert list(tmp_path.rglob(MINI[0].name))
        process.send_signal(end)
        assert process.wait(timeout=20) == (-end if end == signal.SIGKILL else 128 + end)
    context.close()
    if end == signal.SIGKILL:
        assert list(tmp_path.rglob(MINI[0].name))
        with running(tmp_path, defend_flags):
            assert not list(tmp_path.rglob("*.png"))
    else:
        assert not list(tmp_path.glob("facelock-*"))


@pytest.mark.slow
@pytest.mark.browser
def test_a_photo_of_24_megapixels_works_and_leaves_nothing_with_a_tab_closed_just_after(
    open_page, server, tmp_path
):
    photo = tmp_path / "photo.jpg"
    Image.open(MINI[0]).convert("RGB").resize((6000, 4000)).save(photo, quality=80)
    for after in (100, 1500):  # ms
        page = open_page()
        page.locator("input[type=file]").first.set_input_files(photo)
        page.wait_for_timeout(after)
        page.context.close()
    time.sleep(10)
    assert not list(server[1].rglob("*.png")) and not list(server[1].rglob("photo.jpg"))
    page = open_page()
    upload(page, photo)
    protect(page, n_iters=1)
    page.get_by_text(SAVED).wait_for(timeout=60_000)
    assert load_image(download(page, tmp_path)).size == (4000, 6000)


@pytest.mark.slow
@pytest.mark.browser
def test_another_picture_ends_the_job_of_the_last(open_page):
    page = open_page(known="what is replaced at once is deleted before the browser has loaded it")
    begin_a_long_job(page, MINI[0])
    for number in (6, 5, 4):  # at once
        page.get_by_label(f"Thumbnail {number} of 12").click()
    page.locator("#status").get_by_text(MINI[3].name).wait_for()
    page.wait_for_timeout(2000)
    assert page.locator("#status").inner_text().startswith(MINI[3].name)
    assert page.get_by_alt_text("The protected picture").count() == 0
    assert page.get_by_role("button", name="Cancel").is_disabled()
    protect(page)
    page.get_by_text(SAVED).wait_for()
    page.get_by_role("button", name="Edit both").click()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text("Click to Upload").wait_for()
    page.wait_for_timeout(5000)
    assert page.locator("section.verdict").count() == 0 and page.get_by_text(SAVED).count() == 0


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
