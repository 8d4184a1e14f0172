"""`instant`: networks that answer at once, within the budget; their training; and their folders."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import CPU
from torch import nn

import train_protector
from models.faces import Face
from models.norms import quicken
from models.protector import KINDS, frame_of, load_protector
from utils import UserError

SIZES = [(64, 64), (50, 37), (128, 96)]


@pytest.fixture(scope="module")
def universal(tmp_path_factory, tiny_models):
    """A mixture of two stored patterns, trained after another method."""
    directory = tmp_path_factory.mktemp("networks") / "universal"
    return tiny.write_protector(directory, tiny_models.editor, method="encoder", kind="universal")


def image(height, width, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_gives_shares_of_the_budget_at_any_size(size, kind, tiny_models, universal):
    folder = tiny_models.protector if kind == "unet" else universal
    network, images = load_protector(str(folder), CPU, torch.float32), image(*size)
    budget = torch.full((2, 1, *size), 0.06)
    shares = network(images, budget)
    assert shares.shape == images.shape
    assert 0.01 < shares.abs().max() <= 1
    torch.testing.assert_close(network(images[1:], budget[1:]), shares[1:], rtol=0, atol=2e-3)


@pytest.mark.parametrize("budget", [0.03, 0.06, 0.3])
def test_any_budget_is_kept_and_used(budget, protector, portrait):
    tool = protector(f"--defend_method instant --attack_budget {budget}")
    tool.detector = tiny.WholeImage(CPU)
    change = np.abs(np.asarray(tool.protect(portrait), float) - np.asarray(Image.open(portrait), float))
    assert 0.5 * budget < change.max() / 127.5 <= budget


def test_a_network_keeps_to_the_root_mean_square_of_its_method(protector, portrait, tmp_path, tiny_models):
    folder = tiny.write_protector(tmp_path / "wide", tiny_models.editor, "facelock-wide", rms=0.03)
    for refine in (0, 2):
        line = f"--defend_method instant --attack_budget 0.2 --budget_mask none --protector {folder}"
        tool = protector(f"{line} --refine {refine} --rms 0.03" if refine else line)
        tool.detector = tiny.WholeImage(CPU)
        change = np.asarray(tool.protect(portrait), float) - np.asarray(Image.open(portrait), float)
        assert 0.02 < np.sqrt((change**2).mean()) / 127.5 < 0.032


def framed(folder, frame=32):
    """Makes a folder's network one that sees faces in a frame."""
    said = json.loads((folder / "config.json").read_text()) | {"frame": frame}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("size", [(80, 60), (400, 300)])
def test_a_network_with_a_frame_changes_the_face_alone_wherever_it_is(size, tmp_path, tiny_models):
    """And the same there, whatever surrounds it: each of two faces, within a share of the budget."""
    folder = framed(tiny.write_protector(tmp_path / "framed", tiny_models.editor))
    network, images = load_protector(str(folder), CPU, torch.float32), image(*size, count=1)
    side, budget = size[1] // 5, torch.full((1, 1, *size), 0.06)
    faces = [Face((x, y, x + side, y + side)) for x, y in ((side, side), (3 * side, 4 * side))]
    shares = network(images, budget, [faces])
    assert 0.01 < shares.abs().max() <= 1
    changed = (shares != 0).any(dim=1)[0].nonzero()
    reach = 1.5 * side  # from the middle of a face
    for down, right in changed.tolist():
        assert any(abs(right - x - side / 2) < reach > abs(down - y - side / 2) for x, y, *_ in faces)
    alone = network(images, budget, [faces[:1]])
    x0, y0, x1, y1 = faces[0]
    torch.testing.assert_close(alone[..., y0:y1, x0:x1], shares[..., y0:y1, x0:x1])
    assert not alone[..., 3 * side + y0 : 3 * side + y1, 2 * side + x0 : 2 * side + x1].any()
    assert not network(images, budget, [[]]).any()


@pytest.mark.parametrize("side", [64, 400])  # smaller than the face, and larger
def test_a_crop_goes_back_to_where_it_was_cut(side):
    smooth = nn.functional.interpolate(image(9, 9, count=1), (300, 260), mode="bicubic").clamp(-1, 1)
    face = Face((90, 80, 190, 200))
    crop = frame_of(side)
    crop.back(crop(smooth, face), face, there := torch.zeros_like(smooth))
    x0, y0, x1, y1 = face
    assert (there - smooth)[..., y0:y1, x0:x1].abs().mean() < 0.02
    assert crop.place(face).points[2] == pytest.approx(crop.template[2], abs=side / 10)


def test_refine_goes_on_with_the_loop_that_the_network_was_trained_after(protector, universal):
    at_once = protector(f"--defend_method instant --protector {universal}")
    assert at_once.needs == [] and at_once.is_at_once
    tool = protector(f"--defend_method instant --protector {universal} --refine 3 --untargeted")
    assert (tool.run.num_iters, tool.needs, tool.knobs) == (3, ["vae"], {"targeted": False})
    assert tool.mask == "face" and tool.name == "instant"


def test_refining_raises_the_objective(protector, portrait):
    found = []
    tool = protector("--defend_method instant --refine 4 --samples 1 --transforms none")
    tool.detector = tiny.WholeImage(CPU)
    tool.protect(portrait, callback=lambda i, values: found.append(float(values)))
    assert len(found) == 4 and found[-1] > found[0]


def test_nothing_but_the_network_is_loaded_at_once(protector, tiny_models):
    protector("--defend_method instant --recognizer /none --lpips /none").preload()
    with pytest.raises(UserError, match="the face recogniser '/none'"):
        protector("--defend_method instant --recognizer /none --refine 1").preload()


def test_another_autoencoders_network_is_warned_of(protector, tiny_models, capsys):
    _ = protector("--defend_method instant").network
    assert capsys.readouterr().err == ""
    _ = protector(f"--defend_method instant --model_id {tiny_models.img2img}").network
    assert "was not trained for the autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "can't be loaded"),
        ("config.json", '{"network": {"kind": "unet"}}', "can't be loaded"),
        ("config.json", '{"network": {"kind": "os.system"}, "trained": {}}', "no kind among"),
        ("config.json", {"network": {"channels": [8, 10**7]}}, "can't be loaded"),  # not the weights'
        ("config.json", {"network": {"channels": [8, 24]}}, "can't be loaded"),
        ("config.json", {"network": {"wings": 2}}, "can't be loaded"),
        ("config.json", None, "can't be loaded"),
        ("config.json", {"frame": 8}, "its frame is no whole number from 32 to 1024"),
        ("config.json", {"frame": [64]}, "its frame is no whole number"),
        ("model.safetensors", "", "can't be loaded"),
        ("model.safetensors", None, "can't be loaded"),
    ],
)
def test_a_broken_folder_is_one_line(name, content, says, tmp_path, tiny_models, protector):
    folder = tiny.write_protector(tmp_path / "network", tiny_models.editor)
    if isinstance(content, dict):
        said = json.loads((folder / name).read_text())
        network = said["network"] | content.get("network", {})
        content = json.dumps(said | content | {"network": network})
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=says):
        protector(f"--defend_method instant --protector {folder}").preload()


def test_who_has_no_network_is_told_where_one_comes_from(protector):
    with pytest.raises(UserError, match="isn't there; .*train_protector.py makes one"):
        protector("--defend_method instant --protector /none").preload()


def test_the_quick_gradient_of_a_group_norm_is_the_gradient():
    norm = nn.GroupNorm(4, 16).double()
    for values in norm.parameters():
        nn.init.normal_(values)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    there = torch.randn_like(x)
    wanted = torch.autograd.grad((norm(x) * there).sum(), [x, *norm.parameters()])
    quicken(norm)
    found = torch.autograd.grad((norm(x) * there).sum(), [x, *norm.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def training(tmp_path, tiny_models, monkeypatch):
    """Gives a function that trains on blobs for a moment -> its folder, and what it printed."""
    monkeypatch.setattr("protection.FaceDetector", tiny.WholeImage)
    for number in range(3):
        (tmp_path / "people").mkdir(exist_ok=True)
        Image.fromarray(tiny.portrait(32, seed=number)).save(tmp_path / "people" / f"{number}.png")

    def train(flags: str = "", steps: int = 2) -> int:
        line = (
            f"--models mini --model_id {tiny_models.editor} --recognizer {tiny_models.recognizer} "
            f"--judge {tiny_models.judge} --resolution 32 --device cpu --image_dir {tmp_path}/people "
            f"--validation_dir {tmp_path}/people --output_dir {tmp_path}/out --batch_size 2 "
            f"--channels 8 8 --depths 1 1 --samples 1 --steps {steps} --rate 0.01 {flags}"
        )
        return train_protector.main(line.split())

    return train


FRAMES = "--frame 32 --sides 32 48 --augment light+noise,blur --pairs 2 --warm_steps 1"


@pytest.mark.parametrize(
    "flags",
    ["", "--network universal", "--network mixture --patterns 2", "--pairs 2 --warm_steps 1", FRAMES],
)
def test_training_makes_a_network_that_is_used_and_gone_on_with(flags, training, tmp_path, protector, capsys):
    method = "--defend_method facelock-dim --num_iters 2"
    assert training(f"{method} {flags}") == 0
    folder = tmp_path / "out" / "network"
    first = json.loads((folder / "config.json").read_text())["trained"]
    assert first["method"] == "facelock-dim" and first["steps"] == 2
    assert training(f"{method} {flags}", steps=3) == 0
    assert json.loads((folder / "config.json").read_text())["trained"]["steps"] == 3
    assert "from step 2" in capsys.readouterr().out
    protector(f"--defend_method instant --protector {folder} --refine 1").preload()


def test_training_learns(training, tmp_path):
    """What it maximises is higher at the end than at the beginning."""
    assert training("--defend_method vae --save_minutes 0.00001", steps=12) == 0
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


def test_what_can_not_be_learnt_or_gone_on_with_is_refused(training, capsys):
    assert training("--defend_method encoder") == 0
    for method, why in (("vae", "is of another network, method or model"), ("noise", "has no objective")):
        assert training(f"--defend_method {method}") == 1
        assert why in capsys.readouterr().err
