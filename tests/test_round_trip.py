"""--vae and --model round-trip: autoencoders by name or folder, tiny ones, and the editor that is one."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CPU, F32, noise

import edit
import experiment
import main_edit
import models.clip
from backend import loop_of
from images import to_tensor
from models.config import ModelSettings, resolve, resolve_vaes
from models.editors import InstructPix2Pix
from models.tiny_vae import HALVES, WHOLE
from models.vaes import WorkingVAE, load_vae
from protection import Protector
from runs import read_record
from utils import NO_WORDS, UserError

REAL = Path(os.environ.get("FACELOCK_REAL", "no/such"))
FORMS = {"AutoencoderTiny": 4, "TAEF2": 32, "TAEF2 in halves": 32}  # latent channels


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vaes")
    return {
        "AutoencoderTiny": tiny.write_autoencoder(root / "taesd"),
        "TAEF2": tiny.write_taef2(root / "taef2"),
        "TAEF2 in halves": tiny.write_taef2(root / "halves", halves=True),
    }


def load(folder: Path, **how) -> WorkingVAE:
    return load_vae(InstructPix2Pix, str(folder), 64, CPU, F32, **how)


def mean(vae: WorkingVAE, images: torch.Tensor) -> torch.Tensor:
    return vae.encode(images).latent_dist.mean


@pytest.mark.parametrize("form", FORMS)
def test_a_tiny_autoencoder_is_what_an_attack_needs(form, folders):
    """Frozen, deterministic, in [-1, 1], at the working size, and differentiable, with checkpointing, too."""
    found = []
    for checkpointing in (False, True):
        vae, x = load(folders[form], checkpointing=checkpointing), noise(1, 3, 130, 100).requires_grad_()
        z = mean(vae, x)
        y = vae.decode(z).sample
        assert z.shape == (1, FORMS[form], 8, 7) and y.shape == (1, 3, 64, 56)
        assert torch.equal(z, mean(vae, x)) and not any(one.requires_grad for one in vae.vae.parameters())
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert found[0].isfinite().all() and (found[0] != 0).float().mean() > 0.9
    torch.testing.assert_close(found[1], found[0])


def test_both_forms_of_taef2_are_one_network(folders):
    x = noise(1, 3, 64, 64)
    whole, halves = (load(folders[form]) for form in ("TAEF2", "TAEF2 in halves"))
    assert torch.equal(whole.round_trip(x), halves.round_trip(x))
    state = torch.load(folders["TAEF2 in halves"] / HALVES[1], weights_only=True)
    assert "1.weight" in state and "3.pool.0.weight" in state and "0.weight" not in state  # as in taesd.py


def test_an_autoencoder_of_diffusers_is_its_own_class(folders, tmp_path):
    x, folder = noise(1, 3, 64, 64), folders["AutoencoderTiny"]
    own = AutoencoderTiny.from_pretrained(folder)
    expected = own.decode(own.encode(x).latents).sample.detach().clamp(-1, 1)
    torch.testing.assert_close(load(folder).round_trip(x), expected)
    full = tiny.tiny_vae()
    full.save_pretrained(tmp_path)
    torch.testing.assert_close(mean(load(tmp_path), x), full.encode(x).latent_dist.mean)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "nan", "pickle", "gone", "layers"])
@pytest.mark.parametrize("form", FORMS)
def test_one_that_is_not_whole_is_one_line(form, change, folders, tmp_path, fresh_loaders):
    place = shutil.copytree(folders[form], tmp_path / "own")
    names = {"AutoencoderTiny": "diffusion_pytorch_model.safetensors", "TAEF2": WHOLE}
    file = place / names.get(form, HALVES[1])
    is_safe = file.suffix == ".safetensors"
    state = load_file(file) if is_safe else torch.load(file, weights_only=True)
    tiny.spoil(state, change)
    if change == "layers" and form == "AutoencoderTiny":
        config = place / "config.json"
        config.write_text(config.read_text().replace("    3,\n    3,", "    3,\n    1000000,", 1))
    if change == "gone":
        file.unlink()
    elif change in ("pickle", "layers") and form != "AutoencoderTiny":
        torch.save({"0.weight": Path.touch}, file)
    elif change == "pickle":
        file.write_bytes(b"no tensors")
    else:
        (save_file if is_safe else torch.save)(state, file)
    with pytest.raises(UserError, match=f"{place}.* can't be loaded") as caught:
        load(place)
    assert "\n" not in str(caught.value)


def test_an_autoencoder_is_named_by_kind_or_id():
    names = ["flux2-klein", "flux-kontext=me/ed", "me/vae", "a=b/c", "tiny"]
    klein, kontext, own, odd, distilled = resolve_vaes(ModelSettings(vae=names))
    assert (klein.kind, klein.vae) == ("flux2-klein", "black-forest-labs/FLUX.2-klein-4B")
    assert (kontext.kind, kontext.vae, kontext.resolution) == ("flux-kontext", "me/ed", 1024)
    assert (own.kind, own.vae, own.resolution) == ("instruct-pix2pix", "me/vae", 512)
    assert (odd.kind, odd.vae) == ("instruct-pix2pix", "a=b/c")
    assert distilled.vae == "madebyollin/taesd"
    with pytest.raises(UserError, match="--vae tiny: there is none for qwen-image-edit"):
        resolve_vaes(ModelSettings(model="qwen-image-edit", vae=["tiny"]))
    for kind, name in (("sdxl-instruct-pix2pix", "sdxl"), ("flux-kontext", "f1"), ("flux2-klein", "f2")):
        (own,) = resolve_vaes(ModelSettings(model=kind, vae=["tiny"]))
        assert (own.kind, own.vae) == (kind, f"madebyollin/tae{name}")
    (plain,) = resolve_vaes(ModelSettings())
    assert plain.vae == plain.model_id == "timbrooks/instruct-pix2pix"


def test_a_round_trip_goes_through_the_first(folders):
    """Or through --model_id, and what is attacked may be another one."""
    trip = {"model": "round-trip", "vae": ["flux2-klein", "me/tiny"]}
    assert resolve(**trip).model_id == "black-forest-labs/FLUX.2-klein-4B"
    first, second = resolve_vaes(ModelSettings(**trip))
    assert first.kind == second.kind == "round-trip" and second.vae == "me/tiny"
    assert resolve(**trip, model_id="me/full").model_id == "me/full"
    for own in ({"model": "round-trip"}, {"model": "round-trip", "vae": "round-trip"}, {"vae": "round-trip"}):
        with pytest.raises(UserError, match="--model round-trip needs an autoencoder: --vae"):
            resolve_vaes(ModelSettings(**own))


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("photoguard", "--vae tiny"),
        ("photoguard", "--model round-trip --vae me/vae"),
        ("decontext", ""),
        ("decontext", "--model sdxl-instruct-pix2pix --model_id nobody/nothing"),
        ("decontext", "--model qwen-image-edit --model_id nobody/nothing"),
    ],
)
def test_a_method_whose_denoiser_is_not_there_is_refused_before_anything_is_loaded(method, flags, protector):
    with pytest.raises(UserError, match="needs the denoiser of .*, which .* does not have") as caught:
        protector(f"--defend_method {method} {flags}")
    assert "\n" not in str(caught.value)


def test_an_edit_is_the_round_trip_alone(folders, tmp_path, capsys):
    """Whatever the seed, and without words, of which a note tells."""
    (path,) = tiny.write_portraits(tmp_path / "in", n=1, size=(70, 90))
    flags = ["--model=round-trip", f"--vae={folders['TAEF2']}", "--device=cpu"]
    line = [f"--src_dir={path.parent}", f"--edit_dir={tmp_path / 'edits'}", *flags]
    assert main_edit.main([*line, "--prompts=3,4"]) == 0
    assert "--prompts and --prompt_file are ignored: round-trip takes no words" in capsys.readouterr().err
    made = tmp_path / "edits" / "seed0" / "prompt0" / path.name
    record = read_record(tmp_path / "edits" / "seed0")
    assert record["prompts"] == {"0": NO_WORDS} and record["arguments"]["model"] == "round-trip"
    vae = load_vae(resolve(model="round-trip", vae=["x"]).editor, str(folders["TAEF2"]), 512, CPU, F32)
    expected = vae.round_trip(to_tensor(np.array(Image.open(path))))[..., :70, :90]
    found = to_tensor(np.array(Image.open(made)))
    assert (found - expected).abs().max() <= 1 / 255 + 1e-6
    for name, words in (("one", []), ("two", ["--prompt=Let it be snowy"])):
        output = tmp_path / f"{name}.png"
        assert edit.main([f"--input_path={path}", f"--output_path={output}", *flags, *words]) == 0
        assert np.array_equal(np.array(Image.open(output)), np.array(Image.open(made)))
    assert "--prompt is ignored" in capsys.readouterr().err


def test_an_experiment_needs_neither_editor_nor_clip(
    folders, tiny_models, tmp_path, whole_images, monkeypatch, capsys
):
    """With --models full, of which nothing can be had here, and other photos of the people."""
    monkeypatch.setattr(models.clip, "load_clip", lambda *_: pytest.fail("CLIP was loaded"))
    faces = tiny.write_portraits(tmp_path / "in", n=2)
    for number, path in enumerate(faces):
        (tmp_path / "others" / path.stem).mkdir(parents=True)
        Image.fromarray(tiny.portrait(64, seed=number + 7)).save(tmp_path / "others" / path.stem / "b.png")
    line = [f"--image_dir={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}", "--model=round-trip"]
    line += [f"--vae={folders['AutoencoderTiny']}", f"--recognizer={tiny_models.recognizer}", "--device=cpu"]
    line += [f"--judge={tiny_models.judge}", f"--lpips={tiny_models.perceptual}", "--num_iters=1"]
    line += ["--methods", "encoder", "facelock", "--purify", "vae", f"--reference_dir={tmp_path / 'others'}"]
    (board := tmp_path / "board.md").write_text("# Ours\n\n")
    assert experiment.main([*line, f"--leaderboard={board}"]) == 1  # before anything is made
    assert "board.md: has no leaderboard" in capsys.readouterr().err and not (tmp_path / "out").exists()
    board.write_text("")
    line.append(f"--leaderboard={board}")
    assert experiment.main(line) == 0
    text = (tmp_path / "out" / "all_metric.md").read_text()
    assert "no edit by words was made" in text and "1 prompts" in text and "other photos" in text
    table = pd.read_csv(tmp_path / "out" / "all_metric.csv")
    assert len(table) == 3 and not [name for name in table if name.startswith("clip")]
    assert table[["left", "facial", "lpips"]].iloc[1:].notna().all(axis=None)
    row = board.read_text().splitlines()[-1].split(" | ")
    assert row[:2] == ["| facelock", "0.03"] and row[6] == "-" and row[-1].startswith("`python ")
    worst = pd.read_csv(tmp_path / "out" / "purified.csv")["worst"].iloc[-1]
    assert float(row[5]) == pytest.approx(worst, abs=0.006)
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "purified.csv").exists()
    capsys.readouterr()
    (tmp_path / "others" / "face1" / "b.png").unlink()
    assert experiment.main(line) == 1  # before anything is made
    assert "no other photo of face1" in capsys.readouterr().err


def test_the_bundled_network_for_taef2_is_taken_by_the_autoencoders_name(folders, whole_images, tmp_path):
    """It sees the face in a frame, at any size of the picture; whom it was trained against is no judge."""
    portrait = tmp_path / "face.png"
    Image.fromarray(tiny.portrait((200, 160), seed=3)).save(portrait)
    given = {"method": "instant", "model": "round-trip", "device": "cpu"}
    given |= {"recognizer": ["casia-webface"], "judge": ["dlib", "vggface2"]}
    tool = Protector(vae=[str(folders["TAEF2"])], **given)  # a folder called taef2
    assert (loop_of(tool.config), tool.config.judges) == ("facelock-wide", ("vggface2",))
    protected = np.asarray(tool.protect(portrait, [(60, 70, 100, 120)]), float)
    change = protected - tiny.portrait((200, 160), seed=3)
    assert 5 < np.abs(change).max() <= 25 and not change[:40].any() and not change[:, 140:].any()
    assert Protector(vae=[str(folders["TAEF2"])], budget_mask="none", **given).needs_face
    with pytest.raises(UserError, match="needs a network that was trained for this autoencoder"):
        Protector(vae=[str(folders["TAEF2 in halves"])], **given)


def test_an_experiment_is_not_judged_by_whom_a_network_was_trained_against(folders, tmp_path, capsys):
    tiny.write_portraits(tmp_path / "in", n=2)
    line = [f"--image_dir={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}", "--model=round-trip"]
    line += [f"--vae={folders['TAEF2']}", "--judge", "dlib", "--methods", "instant", "--device=cpu"]
    assert experiment.main(line) == 1
    assert "instant/budget_0.2: its network was trained against dlib" in capsys.readouterr().err


@pytest.mark.skipif(not (REAL / "taef2").is_dir(), reason="FACELOCK_REAL names no folder with real weights")
def test_real_weights_bring_real_photos_back():
    vae, values = load_vae(InstructPix2Pix, str(REAL / "taef2"), 256, CPU, F32), []
    for path in sorted((REAL / "photos").glob("*_a.jpg"))[:3]:
        x = to_tensor(np.array(Image.open(path).convert("RGB").resize((256, 256))))
        values.append(-10 * ((vae.round_trip(x) - x) / 2).square().mean().log10().item())
    assert min(values) > 24, values  # dB
