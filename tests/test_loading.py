"""models/loading.py: what is loaded from where, that nothing of it is executed, and one line if it isn't."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from models import loading
from models.clip import load_clip
from models.editors import InstructPix2Pix
from models.loading import ROOT, from_hub, recorded, shown
from models.perceptual import load_perceptual
from models.recognizers import load_recognizer
from models.vaes import WorkingVAE, load_vae
from utils import UserError

CPU = torch.device("cpu")
F32 = torch.float32


def load_any_vae(member: str) -> WorkingVAE:
    return load_vae(InstructPix2Pix, member, 64, CPU, F32)


def load_any_editor(member: str) -> InstructPix2Pix:
    settings = {**InstructPix2Pix.knobs, "resolution": 64, "scheduler": None}
    return InstructPix2Pix(member, settings, CPU, F32)


# ---------------------------------------------------------------------------------------------------------
# weights that can't be had


ABSENT = "facelock-tests/no-such-model"
LOADS = {
    "vae": (ABSENT, lambda: load_any_vae(ABSENT)),
    "editor": (ABSENT, lambda: load_any_editor(ABSENT)),
    "vggface2": ("vggface2", lambda: load_recognizer("vggface2", CPU, F32)),
    "lpips": ("squeeze", lambda: load_perceptual("squeeze", CPU, F32)),
    "clip": (ABSENT, lambda: load_clip(ABSENT, CPU, F32)),
}


@pytest.mark.parametrize("what", LOADS)
def test_no_network_is_one_line_at_once(what, monkeypatch, tmp_path, fresh_loaders):
    def unreachable(*args, **kwargs):
        raise ConnectionError("the hub can't be reached")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is cached
    member, load = LOADS[what]
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert time.monotonic() - begun < 20  # no waiting for retries
    assert f"'{member}' can't be loaded (" in text and "\n" not in text
    assert "docs/models.md" in text and "--models mini" not in text
    assert len(text.split("(", 1)[1].split(")")[0]) > 10  # a reason


def test_a_model_that_the_hub_does_not_know(monkeypatch):
    """The hub's explanation comes after its first line."""

    def missing(*args, **kwargs):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404: no such repository\nor a gated one", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UserError, match="404: no such repository or a gated one") as caught:
        load_any_vae(ABSENT)
    assert ABSENT in str(caught.value) and "\n" not in str(caught.value)


def test_a_gated_model_says_how_to_get_in(monkeypatch):
    """The hub tells anybody about it, and refuses the files."""

    def refuse(self, name):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError(f"403: access to {name} is restricted", response=response)

    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: SimpleNamespace(gated="auto"))
    monkeypatch.setattr(hub, "auth_check", refuse)
    with pytest.raises(UserError) as caught:
        load_any_vae(ABSENT)
    text = str(caught.value)
    assert f"https://huggingface.co/{ABSENT}" in text and "hf auth login" in text and "\n" not in text
    monkeypatch.setattr(hub, "auth_check", lambda *_: None)
    assert from_hub(ABSENT) == (ABSENT, {})


def test_without_a_network_the_cache_is_used(monkeypatch, tmp_path):
    """As the hub's library keeps it: a directory, with what an earlier run has fetched."""

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="no route, and it is not in the local cache"):
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
    for load in (
        lambda: load_any_vae(member),
        lambda: load_recognizer(member, CPU, F32),
        lambda: load_perceptual(member, CPU, F32),
        lambda: load_clip(member, CPU, F32),
    ):
        with pytest.raises(UserError, match="can.t be loaded") as caught:
            load()
        assert member in str(caught.value) and "director" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# nothing is executed


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
    load = {
        "recognizer": load_recognizer,
        "vae": lambda member, *_: load_any_vae(member),
        "clip": load_clip,
    }[member]
    with pytest.raises(UserError) as caught:
        load(str(place), CPU, F32)
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


def test_a_vae_that_is_there_in_float16_alone_is_loaded_as_float32(tmp_path):
    tiny.tiny_vae(torch.float16).save_pretrained(tmp_path / "vae", variant="fp16")
    loaded = load_any_vae(str(tmp_path)).vae
    assert {parameter.dtype for parameter in loaded.parameters()} == {F32}


# ---------------------------------------------------------------------------------------------------------
# once, and by name


def test_a_bundled_member_is_shown_from_the_repository_on(tmp_path):
    assert shown(str(ROOT / "assets" / "mini" / "vae")) == "assets/mini/vae"
    assert shown("timbrooks/instruct-pix2pix") == "timbrooks/instruct-pix2pix"
    assert shown(str(tmp_path)) == str(tmp_path)


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


# ---------------------------------------------------------------------------------------------------------
# files that are not whole: the libraries would fill them at random


FOLDERS = {  # a folder of tiny_models -> where its weights are, and how it is loaded
    "recognizer": ("model.safetensors", lambda path: load_recognizer(path, CPU, F32)),
    "judge": ("model.safetensors", lambda path: load_recognizer(path, CPU, F32)),
    "clip": ("model.safetensors", lambda path: load_clip(path, CPU, F32)),
    "editor": ("text_encoder/model.safetensors", load_any_editor),
    "perceptual": ("model.safetensors", lambda path: load_perceptual(path, CPU, F32)),
}


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "nan"])
@pytest.mark.parametrize("what", [*FOLDERS, "vae"])
def test_weights_that_are_not_whole_are_one_line(what, change, tiny_models, tmp_path, fresh_loaders):
    file, load = FOLDERS.get(what, ("vae/diffusion_pytorch_model.safetensors", load_any_vae))
    place = shutil.copytree(getattr(tiny_models, "editor" if what == "vae" else what), tmp_path / "own")
    state = load_file(place / file)
    tiny.spoil(state, change)
    save_file(state, place / file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{place}.* can't be loaded") as caught:
        load(str(place))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("what", "folder"), [("clip", ""), ("editor", "tokenizer")])
def test_a_tokenizer_without_words_is_one_line(what, folder, tiny_models, tmp_path, fresh_loaders):
    place = shutil.copytree(getattr(tiny_models, what), tmp_path / "own")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (place / folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="can't be loaded") as caught:
        FOLDERS[what][1](str(place))
    assert "\n" not in str(caught.value)
