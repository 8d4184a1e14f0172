"""models/loading.py: what is loaded from where, that nothing of it is executed, and one line if it isn't."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import CPU, F32

from models import loading
from models.clip import load_clip
from models.editors import InstructPix2Pix
from models.loading import from_hub, recorded
from models.perceptual import load_perceptual
from models.recognizers import load_recognizer
from models.vaes import WorkingVAE, load_vae
from utils import UserError


def load_any_vae(member: str) -> WorkingVAE:
    return load_vae(InstructPix2Pix, member, 64, CPU, F32)


def load_any_editor(member: str) -> InstructPix2Pix:
    settings = {**InstructPix2Pix.knobs, "resolution": 64, "scheduler": None}
    return InstructPix2Pix(member, settings, CPU, F32)


ABSENT = "facelock-tests/no-such-model"
def unreachable(*args, **kwargs):
    raise ConnectionError("the hub can't be reached")


LOADERS = {
    "vae": load_any_vae,
    "editor": load_any_editor,
    "recognizer": lambda member: load_recognizer(member, CPU, F32),
    "judge": lambda member: load_recognizer(member, CPU, F32),
    "perceptual": lambda member: load_perceptual(member, CPU, F32),
    "clip": lambda member: load_clip(member, CPU, F32),
}


@pytest.mark.parametrize(
    ("what", "member"),
    [("vae", ABSENT), ("editor", ABSENT), ("clip", ABSENT), ("judge", "vggface2"), ("perceptual", "squeeze")],
)
def test_no_network_is_one_line_at_once(what, member, monkeypatch, tmp_path, fresh_loaders):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is cached
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        LOADERS[what](member)
    text = str(caught.value)
    assert time.monotonic() - begun < 20  # no waiting for retries
    assert f"'{member}' can't be loaded (" in text and "\n" not in text
    assert "docs/models.md" in text and "--models mini" not in text
    assert len(text.split("(", 1)[1].split(")")[0]) > 10  # a reason


def hub_error(kind: type, status: int, text: str) -> Callable:
    """A function of the hub that answers with an error."""

    def refuse(*args, **kwargs):
        raise kind(text, response=SimpleNamespace(headers={}, request=None, status_code=status))

    return refuse


def test_what_the_hub_refuses_is_one_line_with_the_way_in(monkeypatch):
    """The hub's explanation comes after its first line; of a gated model it keeps the files alone."""
    hub, text = huggingface_hub.HfApi, "404: no such repository\nor a gated one"
    monkeypatch.setattr(hub, "model_info", hub_error(RepositoryNotFoundError, 404, text))
    with pytest.raises(UserError, match="404: no such repository or a gated one") as missing:
        load_any_vae(ABSENT)
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: SimpleNamespace(gated="auto"))
    monkeypatch.setattr(hub, "auth_check", hub_error(GatedRepoError, 403, "403: access is restricted"))
    with pytest.raises(UserError, match=f"https://huggingface.co/{ABSENT}.*hf auth login") as gated:
        load_any_vae(ABSENT)
    assert ABSENT in str(missing.value) and "\n" not in f"{missing.value}{gated.value}"
    monkeypatch.setattr(hub, "auth_check", lambda *_: None)
    assert from_hub(ABSENT) == (ABSENT, {})


def test_without_a_network_the_cache_is_used(monkeypatch, tmp_path):
    """As the hub's library keeps it: a directory, with what an earlier run has fetched."""
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="can't be reached, and it is not in the local cache"):
        from_hub("me/model")
    kept = tmp_path / "models--me--model"
    tiny.tiny_vae().save_pretrained(kept / "snapshots" / "abc" / "vae")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    assert from_hub("me/model") == (str(kept / "snapshots" / "abc"), {"local_files_only": True})
    assert type(load_any_vae("me/model").vae).__name__ == "AutoencoderKL"


def test_a_revision_is_asked_for_and_passed_on(monkeypatch):
    asked = []
    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "model_info", lambda self, name, **how: asked.append((name, how)))
    assert from_hub("me/model@v2") == ("me/model", {"revision": "v2"})
    assert from_hub("me/model") == ("me/model", {})
    assert asked == [("me/model", {"timeout": 10, "revision": "v2"}), ("me/model", {"timeout": 10})]


@pytest.mark.parametrize("member", ["/no/such/dir", "./none", "a/b/c"])
def test_a_directory_that_is_not_there_is_not_asked_of_the_hub(member, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    for load in LOADERS.values():
        with pytest.raises(UserError, match="can.t be loaded") as caught:
            load(member)
        assert member in str(caught.value) and "director" in str(caught.value)


@pytest.mark.parametrize("member", ["recognizer", "vae", "clip"])
def test_a_pickle_that_would_run_code_is_refused(member, tmp_path, tiny_models):
    """A state dict on its own, and a directory that has pickles instead of safetensors."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    if member == "recognizer":
        path = place = tmp_path / "evil.pt"
    else:
        source, name = {
            "vae": (tiny_models.editor, "vae/diffusion_pytorch_model.bin"),
            "clip": (tiny_models.clip, "pytorch_model.bin"),
        }[member]
        place = shutil.copytree(source, tmp_path / "evil")
        path = place / name
        next(path.parent.glob("*.safetensors")).unlink()
    torch.save({"conv2d_1a.conv.weight": Evil()}, path)
    torch.load(path, weights_only=False)
    assert ran.exists()  # the bait works
    ran.unlink()
    with pytest.raises(UserError) as caught:
        LOADERS[member](str(place))
    text = str(caught.value)
    assert not ran.exists() and "\n" not in text and "evil" in text
    assert "weights_only" not in text  # torch's advice how to read it all the same


def test_code_beside_the_weights_is_not_run(tmp_path, tiny_models):
    """A recogniser's directory whose config names a module of its own."""
    place = shutil.copytree(tiny_models.recognizer, tmp_path / "evil")
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\n")
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Net"}
    (place / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        load_recognizer(str(place), CPU, F32)
    assert not (tmp_path / "ran").exists()


def test_a_local_model_is_recorded_with_its_weights_and_configs(tmp_path, monkeypatch):
    """What earlier weights made, or another config, is not this model's."""
    assert recorded("timbrooks/instruct-pix2pix") == "timbrooks/instruct-pix2pix"
    monkeypatch.setattr(loading, "ROOT", tmp_path)
    place = tmp_path / "mini"
    assert recorded(str(place)) == "mini"  # not there: whoever loads it says so
    (place / "vae").mkdir(parents=True)
    names = []
    for file, content in (
        ("vae/model.safetensors", "1"), ("vae/model.safetensors", "2"), ("vae/config.json", "{}"),
        ("tokenizer/vocab.json", "{}"), ("README.md", "words"),
        ("vae/config.json", "{1}"), ("vae/config.json", "{}"),
    ):  # fmt: skip
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(content)
        recorded.cache_clear()
        names.append(recorded(str(place)))
    recorded.cache_clear()
    assert all(name.startswith("mini ") for name in names)
    assert names[3] == names[4] == names[6] and len({*names}) == 5
    for name in ("net.onnx", "net.json"):
        (place / name).write_text(name)
    with_json = recorded(str(place / "net.onnx"))
    (place / "net.json").write_text("other")
    recorded.cache_clear()
    assert recorded(str(place / "net.onnx")) != with_json


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "nan"])
@pytest.mark.parametrize("what", LOADERS)
def test_weights_that_are_not_whole_are_one_line(what, change, tiny_models, tmp_path, fresh_loaders):
    files = {"vae": "vae/diffusion_pytorch_model.safetensors", "editor": "text_encoder/model.safetensors"}
    file = files.get(what, "model.safetensors")
    place = shutil.copytree(getattr(tiny_models, "editor" if what == "vae" else what), tmp_path / "own")
    state = load_file(place / file)
    tiny.spoil(state, change)
    save_file(state, place / file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{place}.* can't be loaded") as caught:
        LOADERS[what](str(place))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("what", "folder"), [("clip", ""), ("editor", "tokenizer")])
def test_a_tokenizer_without_words_is_one_line(what, folder, tiny_models, tmp_path, fresh_loaders):
    place = shutil.copytree(getattr(tiny_models, what), tmp_path / "own")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (place / folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="can't be loaded") as caught:
        LOADERS[what](str(place))
    assert "\n" not in str(caught.value)
