"""models/config.py: the sets, and what the flags of a script come to."""

import dataclasses

import pytest
import torch

import defend
import edit
import experiment
from models.config import MODEL_SETS, ModelConfig, ModelSettings, resolve
from models.loading import recorded
from protection import Protector
from utils import UserError

EDITING = "--input_path a --prompt x --device cpu"


def config(flags: str, script=edit) -> ModelConfig:
    line = f"{EDITING} {flags}" if script is edit else f"--input_path a --device cpu {flags}"
    return resolve(ModelSettings.of(script.parse_args(line.split())))


FULL, MINIS = (resolve(models=models, device="cpu") for models in ("full", "mini"))


@pytest.mark.parametrize("script", [edit, defend])
@pytest.mark.parametrize("expected", [FULL, MINIS], ids=["full", "mini"])
def test_without_flags_the_set_is_as_it_stands(expected, script):
    found, stands = config(f"--models {expected.models}", script), MODEL_SETS[expected.models]
    assert found == expected and found.model_id == stands.editors[found.kind]
    members = found.perceptual, found.clip, found.protector, found.judges, *found.recognizers
    assert members == (stands.perceptual, stands.clip, stands.protector, stands.judges, stands.recognizer)


ALL = {  # kind -> id, steps, guidance, long side or side of the area
    "instruct-pix2pix": ("timbrooks/instruct-pix2pix", 100, 7.5, 512),
    "stable-diffusion": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 100, 7.5, 512),
    "sdxl-instruct-pix2pix": ("diffusers/sdxl-instructpix2pix-768", 100, 5.0, 768),
    "flux-kontext": ("black-forest-labs/FLUX.1-Kontext-dev", 28, 2.5, 1024),
    "flux2-klein": ("black-forest-labs/FLUX.2-klein-4B", 4, 1.0, 1024),
    "qwen-image-edit": ("Qwen/Qwen-Image-Edit-2509", 50, 4.0, 1024),
}


@pytest.mark.parametrize("kind", ALL)
def test_full_has_every_editor_with_its_own_settings(kind):
    found = config(f"--model {kind}")
    named = [found.settings[name] for name in ("num_inference_steps", "guidance_scale", "resolution")]
    assert (found.model_id, *named) == ALL[kind]
    assert config(f"--model {kind}", defend).model_id == found.model_id
    # those of Stable Diffusion's own solver; the others come with the one they were trained for
    first = kind in ("instruct-pix2pix", "stable-diffusion")
    assert found.settings["scheduler"] == ("EulerAncestralDiscreteScheduler" if first else None)


def test_flags_replace_members_and_values():
    members = "--models mini --model_id me/ed --recognizer r s --judge j k --lpips p --resolution 96"
    assert config(members, defend) == dataclasses.replace(
        MINIS, model_id="me/ed", recognizers=("r", "s"), judges=("j", "k"), perceptual="p",
        settings=MINIS.settings | {"resolution": 96},
    )  # fmt: skip
    values = {"num_inference_steps": 7, "guidance_scale": 0.0, "image_guidance_scale": 2.0}
    given = config(" ".join(f"--{name} {value}" for name, value in values.items()) + " --dtype bf16")
    assert given == dataclasses.replace(FULL, settings=FULL.settings | values, dtype=torch.bfloat16)


@pytest.mark.parametrize("script", [edit, defend])
@pytest.mark.parametrize("flag", ["--model", "--target_model"])
def test_mini_has_no_stable_diffusion(flag, script):
    given = f"--models mini {flag} stable-diffusion"
    with pytest.raises(UserError, match="mini models have no stable-diffusion editor") as caught:
        config(given, script)
    assert "\n" not in str(caught.value)
    assert config(f"{given} --model_id me/sd", script).model_id == "me/sd"


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("instruct-pix2pix", "--strength 0.7"),
        ("stable-diffusion", "--image_guidance_scale 2"),
        ("flux-kontext", "--image_guidance_scale 2"),
        ("qwen-image-edit", "--strength 0.7"),
    ],
)
def test_a_knob_that_the_editor_has_not_is_ignored_with_a_warning(kind, flag, capsys):
    plain = config(f"--model {kind}")
    assert capsys.readouterr().err == ""
    assert config(f"--model {kind} {flag}") == plain
    assert capsys.readouterr().err == f"warning: {flag.split()[0]} is ignored: {kind} has no such knob\n"


def test_the_knobs_of_whoever_edits_are_nothing_to_what_is_attacked(capsys):
    line = "--image_dir=a --output_dir=b --device=cpu --strength=0.7 --image_guidance_scale=2"
    for kind, flags in (("instruct-pix2pix", ""), ("flux-kontext", "--vae flux-kontext")):
        args = experiment.parse_args(f"{line} {flags}".split())
        (found,) = Protector(defend.settings_of(args), seed=0).attacked
        assert found == config(f"--model {kind}", defend)
    assert capsys.readouterr().err == ""


def test_edit_settings_are_what_decides_about_an_edit():
    assert config("--models mini --num_inference_steps 3").edit_settings() == {
        "model": "instruct-pix2pix",
        "model_id": recorded(MINIS.model_id),
        "dtype": "float32",
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "resolution": 128,
        "scheduler": None,
    }


def test_warning_for_what_a_set_was_not_made_for(capsys):
    sizes = [(128, 128), None, (128, 127), (128, 127), (64, 96)]
    MINIS.warn_of(sizes, ["Let it be snowy", "Make it rain"])
    *wrong, unknown = capsys.readouterr().err.splitlines()
    assert len(wrong) == 2 and all("mini" in line and "real photo" in line for line in wrong)
    assert "96x64 image" in wrong[0] and "127x128 image" in wrong[1]
    assert "'Make it rain'" in unknown and "snowy" not in unknown
    MINIS.warn_of([(128, 128)])
    FULL.warn_of(sizes, ["Make it rain"])
    assert capsys.readouterr().err == ""


def test_one_name_is_as_good_as_a_tuple_of_it():
    """From Python somebody writes recognizer="dlib", and means no d, l, i and b."""
    found = resolve(models="mini", recognizer="dlib", judge="vggface2", device="cpu")
    assert (found.recognizers, found.judges) == (("dlib",), ("vggface2",))
