"""protection.py: what decides about pixels, and the way of a portrait."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import noise

import defend
from images import linf, load_image, save_png, to_tensor
from methods import METHODS, NEED, Method, encoder_attack
from models.editors import InstructPix2Pix
from models.loading import recorded
from models.recognizers import face_similarity_to
from protection import Protector, Settings, methods_for
from utils import UserError, start_seed

FACES = [(0, 0, 60, 62), (10, 12, 50, 64)]  # the second sticks out: the mask of both is another one


def with_faces(tool: Protector, boxes=FACES) -> Protector:
    tool.detector = lambda pixels: list(boxes)
    return tool


def protected(tool: Protector, path: Path) -> torch.Tensor:
    """Protects a portrait as `save` does, without rounding to 8 bits."""
    subject = with_faces(tool).load(path)
    seeds = [start_seed(tool.seed, path.stem)]
    return tool.perturb(to_tensor(subject.portrait.pixels), [subject.boxes], seeds)[0]


# ---------------------------------------------------------------------------------------------------------
# settings: all and only what decides about pixels

L2 = {"facelock-wide", "facelock-wash"}
OURS_ALL = {"facelock-dim"} | L2
FACELOCKS = {"facelock"} | OURS_ALL
MASKED = {*OURS_ALL, "instant"}


def test_settings_are_all_that_decides_about_pixels(protector, tiny_models):
    """As run.json has them: other names would make everybody's earlier results another run's."""
    found = protector("").settings()
    assert json.loads(json.dumps(found)) == found == {
        "seed": 0,
        "defend_method": "facelock",
        "method_version": METHODS["facelock"].version,
        "attack_budget": 0.03,
        "budget_mask": "none",
        "step_size": 0.01,
        "num_iters": 2,
        "model": "instruct-pix2pix",
        "model_id": recorded(str(tiny_models.editor)),
        "dtype": "float32",
        "resolution": 64,
        "vae": None,
        "vae_ids": None,
        "faces": "largest",
        "recognizer": recorded(str(tiny_models.recognizer)),
        "lpips": recorded(str(tiny_models.perceptual)),
    }


# tests/test_attention.py has the others
ALL = {*methods_for(InstructPix2Pix), "instant"}
ITERATED = ALL - {"noise", "instant"}
STEPPED = ITERATED - {"cw"}
CHANGES = {  # flags -> the methods whose pixels they change
    "--seed 1": ALL - {"instant"},
    "--attack_budget 0.04": ALL,
    "--step_size 0.003": STEPPED,
    "--num_iters 1": ITERATED,
    "--num_iters 0": ITERATED,
    "--targeted": {"cw"},  # the default of encoder
    "--untargeted": {"encoder", "sds", "blurguard", "dctshield"},
    "--c 0.5": {"cw"},
    "--lr 0.1": {"cw"},
    "--unrolled 2": {"photoguard"},
    "--samples 3": OURS_ALL,
    "--transforms jpeg": OURS_ALL,
    "--rms 0.01": L2,
    "--wash jpeg": L2,
    "--budget_mask none": MASKED,
    "--momentum 0.5": set(),
    "--refine 2": {"instant"},
    "--protector {network}": {"instant"},
    "--budget_mask texture": ALL,
    "--faces all": {*FACELOCKS, "instant"},
    "--recognizer {judge} --judge {recognizer}": FACELOCKS,
    "--judge dlib": set(),
    "--lpips {heads}": {"facelock"},
    "--model_id {img2img}": ITERATED,
    "--resolution 48": {*ITERATED, "instant"},
    "--dtype bf16": {*STEPPED, "instant"},  # cw keeps to float32
    "--device cpu --debug": set(),
    "--check": set(),
    "--checkpointing": set(),
    "--clamp_min 0 --clamp_max 1": set(),
}


@pytest.fixture(scope="module")
def members(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """Paths for the flags of CHANGES: other models than the fixtures' own."""
    root = tmp_path_factory.mktemp("others")
    return vars(tiny_models) | {
        "heads": tiny.write_perceptual(root / "heads", seed=5),
        "network": tiny.write_protector(root / "network", tiny_models.editor, seed=5),
        "img2img": tiny.write_img2img(root / "img2img", seed=5),
    }


@pytest.fixture(scope="module")
def unchanged() -> dict[str, torch.Tensor]:
    """What the methods make of the portrait without further flags: filled as they come up."""
    return {}


@pytest.mark.parametrize("flags", CHANGES)
def test_settings_differ_where_pixels_do(flags, protector, portrait, members, unchanged):
    """Pixels of some methods, and of those for which there is a flag."""
    plain, changed = protector("").wanted, protector(flags.format(**members)).wanted
    for method in [*methods_for(InstructPix2Pix), "instant"]:
        first, other = (Protector(settings, method=method) for settings in (plain, changed))
        is_changed = method in CHANGES[flags]
        assert (other.settings() != first.settings()) == is_changed, method
        few = is_changed and len(CHANGES[flags]) <= 4
        if few or method == "facelock" or (is_changed and method in ("noise", "cw")):
            if method not in unchanged:
                unchanged[method] = protected(first, portrait)
            assert torch.equal(protected(other, portrait), unchanged[method]) == (not is_changed), method


@pytest.mark.parametrize("flag", ["--models full", "--compile"])
def test_what_makes_the_same_files_is_no_setting(flag, protector):
    """Another set with the same members and resolution, and networks that give the same up to rounding."""
    for method in methods_for(InstructPix2Pix):
        plain, other = (protector(f"--defend_method {method} {more}") for more in ("", flag))
        assert other.settings() == plain.settings()


def test_every_knob_is_a_flag():
    defaults = [item for method in METHODS.values() for item in method.parameters.items()]
    assert {name for name, default in defaults if default is not NEED} <= {*defend.KNOBS, "targeted"}


@pytest.mark.parametrize(
    ("budget", "says"),
    [("0.3", ""), ("0.31", "0.31 in [-1, 1] is 39.52/255"), ("2", "2 in [-1, 1] is 255/255")],
)
def test_a_budget_that_may_be_meant_in_levels_is_warned_of(budget, says, protector, capsys):
    protector(f"--attack_budget {budget}")
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == bool(says)


# ---------------------------------------------------------------------------------------------------------
# as a library


MINI = Path(defend.__file__).parent / "assets/portraits/mini/portrait_1000003.png"


def test_a_path_an_image_and_an_array_are_protected_alike(tmp_path, capsys):
    """As defend.py would, whose start depends on the file's stem."""
    path = tmp_path / "image.png"
    Image.open(MINI).convert("RGB").save(path)
    line = f"--models=mini --device=cpu --num_iters=1 --input_path={path} --output_path={tmp_path}/out.png"
    assert defend.main([*line.split(), "--attack_budget=0.06"]) == 0
    saved = load_image(tmp_path / "out.png").pixels
    tool = Protector(method="facelock", budget=0.06, num_iters=1, models="mini", device="cpu")
    for image in (path, str(path), Image.open(path), load_image(path).pixels):
        found = tool.protect(image)
        assert found.mode == "RGB" and np.array_equal(found, saved)
    assert 0 < linf(saved, load_image(path).pixels) <= 0.06


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    root = Path(defend.__file__).parent
    (code,) = re.findall("```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "assets").symlink_to(root / "assets")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("budget=0.06", "budget=0.06, num_iters=1"), {})  # noqa: S102
    assert Image.open("protected.png").size == (128, 128)


def test_a_files_alpha_is_kept_and_an_array_is_a_picture(tmp_path):
    image = Image.open(MINI).convert("RGBA")
    image.putalpha(200)
    image.save(tmp_path / "in.png")
    found = Protector(method="noise", models="mini", device="cpu").protect(tmp_path / "in.png")
    assert found.mode == "RGBA" and found.getchannel("A").getextrema() == (200, 200)
    for array in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)):
        with pytest.raises(UserError, match=r"an image is \(H, W, 3\) uint8, not"):
            Protector(method="noise", models="mini", device="cpu").protect(array)


def test_settings_of_a_call_replace_those_of_a_dataclass():
    settings = Settings(method="cw", models="mini", device="cpu", knobs={"c": 0.5})
    plain, other = Protector(settings), Protector(settings, budget=0.06, seed=3)
    assert plain.knobs == {"c": 0.5, "targeted": False} and plain.run.budget == 0.03
    assert other.settings() == plain.settings() | {"attack_budget": 0.06, "seed": 3}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "facelok"}, "'facelok' is not a method; there are noise, encoder"),
        ({"budget": 0.007}, "budget: 0.007 is below 2/255"),
        ({"budget": 8}, "budget: 8 is above 2, the whole range.*for 8/255 give 0.0627"),
        ({"budget": -0.03}, "budget: '-0.03' is not a number above 0"),
        ({"budget": float("nan")}, "budget: 'nan' is not a number above 0"),
        ({"knobs": {"cc": 1}}, "no method has a knob 'cc'"),
    ],
)
def test_what_argparse_would_refuse_is_refused(given, error):
    with pytest.raises(UserError, match=error):
        Protector(models="mini", device="cpu", **given)


NOTHING = "--recognizer /none --judge /nobody --lpips /none"


@pytest.mark.parametrize(
    ("method", "flags", "missing"),
    [
        ("noise", f"{NOTHING} --model_id /none", None),
        ("encoder", NOTHING, None),
        ("facelock-dim", "--judge /none --lpips /none", None),
        ("sds", NOTHING, None),
        ("sds", "--model_id /none", "the VAE of '/none'"),
        ("facelock", "--recognizer /none", "the face recogniser '/none'"),
        ("facelock", "--lpips /none", "LPIPS '/none'"),
    ],
)
def test_preload_loads_what_the_method_needs(method, flags, missing, protector):
    tool = protector(f"--defend_method {method} {flags}")
    with pytest.raises(UserError, match=missing) if missing else contextlib.nullcontext():
        tool.preload()


@pytest.mark.parametrize(
    ("method", "other"),
    [
        ("diffusionguard", "stable-diffusion"),  # which has a denoiser of its own
        ("encoder", "flux-kontext"),
        ("facelock", "flux-kontext"),  # which works in another form
        ("facelock", "taef2"),
        ("pid", "taef2"),
    ],
)
def test_several_networks_are_attacked_by_the_mean_of_their_objectives(
    method, other, protector, tiny_models, directory, tmp_path, monkeypatch
):
    """Editors and tiny autoencoders; all are loaded before anything is written, and recorded."""
    monkeypatch.setattr("methods.FACE_FROM", 0)  # all terms from the first iteration on
    monkeypatch.setattr("methods.PERCEPTUAL_FROM", -1)
    own = ("instruct-pix2pix", tiny_models.editor)
    taef2 = ("instruct-pix2pix", tiny.write_taef2(tmp_path / "taef2"))
    both = [own, taef2 if other == "taef2" else (other, directory(other))]
    x, values = noise(1, 3, 150, 100), []
    for some in (both, both[:1], both[1:]):
        names = " ".join(f"{kind}={path}" for kind, path in some)
        tool = protector(f"--defend_method {method} --num_iters 1 --vae {names}")
        tool.preload()
        kept = tool.attacked if "editor" in tool.needs else []
        assert all(one.load_denoiser() is one.load_denoiser() for one in kept)
        assert tool.settings()["vae"] == [f"{kind}={recorded(str(path))}, 64 px" for kind, path in some]
        tool.perturb(x, [[(25, 38, 75, 112)]], [3], lambda _, value: values.append(value))
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)
    assert not torch.equal(values[1], values[2])


@pytest.mark.parametrize("method", ["facelock", "facelock-wash", "advdm"])
def test_a_batch_is_one_by_one(method, tmp_path, protector):
    """Also with different numbers of faces."""
    paths = tiny.write_portraits(tmp_path, 3)
    tool = protector(f"--faces all --defend_method {method} --num_iters 1")
    subjects = []
    for path, count in zip(paths, (1, 2, 1), strict=True):
        subjects.append(with_faces(tool, FACES[:count]).load(path))
    together, alone = ([tmp_path / f"{name}{i}.png" for i in range(3)] for name in ("together", "alone"))
    reports = tool.save(subjects, together)
    for subject, output in zip(subjects, alone, strict=True):
        tool.save([subject], [output])
    assert [report.path for report in reports] == together
    for one, other in zip(together, alone, strict=True):
        levels = np.abs(load_image(one).pixels.astype(int) - load_image(other).pixels)
        assert (levels > 0).mean() < 1e-3  # a gradient near 0 may have another sign


def test_what_has_no_output_is_not_saved(tmp_path, protector):
    subjects = [protector("--defend_method noise").load(path) for path in tiny.write_portraits(tmp_path, 2)]
    (report,) = protector("--defend_method noise").save(subjects, [None, tmp_path / "out.png"])
    assert report.path == tmp_path / "out.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face0.png", "face1.png", "out.png"]


def test_the_report_measures_the_file(protector, portrait, tmp_path):
    """Against the definitions, with networks that are asked once for both images."""
    tool = with_faces(protector("--faces all"))
    subject = tool.load(portrait)
    assert subject.boxes == FACES
    (report,) = tool.save([subject], [tmp_path / "out.png"])
    source, saved = (load_image(path).pixels for path in (portrait, tmp_path / "out.png"))
    change = saved.astype(int) - source
    assert report.linf == pytest.approx(np.abs(change).max() * 2 / 255)
    assert report.psnr == pytest.approx(10 * np.log10(255**2 / (change**2).mean()))
    assert (report.method, report.budget, report.faceless) == ("facelock", 0.03, False)
    vae = tool.config.load_vae().vae
    for name, member in tool.config.panel().items():
        similarity = face_similarity_to([tool.config.load_recognizer(member)], to_tensor(source), [FACES])
        for pixels, found in zip((source, saved), report.similarity[name], strict=True):
            with torch.no_grad():
                y = vae.decode(vae.encode(to_tensor(pixels)).latent_dist.mean).sample.clamp(-1, 1)
                assert found == pytest.approx(similarity(y).item(), abs=1e-5)


def test_a_report_without_faces_or_networks(protector, portrait, tmp_path, capsys):
    """A method that needs no face runs all the same; networks that can't be loaded are reported once."""
    tool = with_faces(protector("--defend_method noise --check"), [])
    (report,) = tool.save([tool.load(portrait)], [tmp_path / "out.png"])
    assert report.faceless and "judge not measured (no face found)" in str(report)
    tool = with_faces(protector("--defend_method noise --check --judge /some/judge"))
    subject = tool.load(portrait)
    capsys.readouterr()
    reports = tool.save([subject, subject], [tmp_path / "a.png", tmp_path / "b.png"])
    assert all(report.similarity["judge"] is None and report.similarity["recognizer"] for report in reports)
    assert capsys.readouterr().err.count("judge not measured") == 1


@pytest.mark.parametrize(
    ("method", "kind"), [("noise", "face"), ("vae", "texture"), ("cw", "face+texture"), ("dctshield", "face")]
)
def test_the_saved_file_keeps_to_the_mask(kind, method, protector, tmp_path):
    """At an image's own size, which is not the working size."""
    (path,) = tiny.write_portraits(tmp_path, 1, (128, 96))
    flags = f"--defend_method {method} --budget_mask {kind} --attack_budget 0.1"
    tool = with_faces(protector(flags), [(20, 30, 60, 80)])
    subject = tool.load(path)
    assert subject.boxes == [(20, 30, 60, 80)] if "face" in kind else not subject.boxes
    tool.save([subject], [tmp_path / "out.png"])
    source, saved = (load_image(place).pixels.astype(int) for place in (path, tmp_path / "out.png"))
    _, mask = tool.perturb(to_tensor(subject.portrait.pixels), [subject.boxes], [0])
    mask = mask[0, 0].numpy()
    change = np.abs(saved - source).max(axis=2) * 2 / 255
    assert (change <= 0.1 * mask + 1e-6).all() and change.max() > 0.05
    if "face" in kind:
        assert (mask[40:70, 30:50] > 0).mean() > 0.9 and (mask[:, 75:] == 0).all()  # eyes are flat


def test_facelock_and_a_face_mask_need_a_face_and_a_texture_mask_none(protector, portrait):
    for flags in ("", "--defend_method vae --budget_mask face"):
        with pytest.raises(UserError, match="face0.png: no face found; say where it is .* --face_box"):
            with_faces(protector(flags), []).load(portrait)
    tool = with_faces(protector("--defend_method vae --budget_mask texture"), [])
    assert tool.load(portrait).boxes == []


def test_a_file_over_the_budget_is_an_error(protector, portrait, tmp_path):
    tool = protector("--defend_method noise")
    subject = tool.load(portrait)
    save_png(tmp_path / "out.png", np.clip(subject.portrait.pixels.astype(int) + 4, 0, 255).astype(np.uint8))
    with pytest.raises(UserError, match="differs by 0.0314 from its source, over the budget"):
        tool.measure(subject, tmp_path / "out.png")


def test_a_gradient_that_is_no_number_is_one_line(protector, portrait, monkeypatch):
    def broken(x, vae):
        objective = encoder_attack(x, vae)
        return lambda x_adv, t: objective(x_adv, t) * float("nan")

    monkeypatch.setitem(METHODS, "encoder", Method(broken))
    for dtype, hint in (("fp32", "in float32"), ("bf16", "in bfloat16; try --dtype fp32")):
        with pytest.raises(UserError) as caught:
            protected(protector(f"--defend_method encoder --dtype {dtype}"), portrait)
        assert str(caught.value).endswith(f", with the networks {hint}")
