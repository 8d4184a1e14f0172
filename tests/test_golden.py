"""What every method makes of one bundled portrait, held to numbers: who changes pixels raises a version."""

from pathlib import Path

import numpy as np
import pytest

import defend
from protection import Protector

PORTRAIT = Path(defend.__file__).parent / "assets/portraits/mini/portrait_1000003.png"
TOLERANCE = 0.005  # levels; one thread or two, by which a few signs of a gradient change: 0.0005

# defend.py's flags -> its change in levels of 255, the mean over each quarter of red, green and blue
GOLDEN = {
    "noise": [.048, .020, .008, -.033, -.010, .000, .025, .046, .025, .017, -.049, -.061],
    "encoder": [.063, -.023, .069, -.020, .171, .111, .056, .004, .008, .068, -.068, -.031],
    "vae": [-.101, -.481, -.234, -.545, .581, .052, .334, -.188, .294, .254, .322, .110],
    "cw": [-.047, .045, -.029, -.014, .029, -.080, .061, -.056, -.025, .004, -.054, .048],
    "facelock": [.036, .064, -.031, -.065, -.033, -.092, .078, .029, .036, .050, -.045, -.058],
    "facelock-dim": [-.008, -.025, .063, .025, -.048, .014, .001, .071, .009, .004, .001, .017],
    "facelock-wide": [-.064, -.027, .034, .025, -.073, -.021, .017, .044, -.043, -.018, -.007, .024],
    "facelock-wash": [-.041, -.050, .001, .012, -.039, -.037, .003, .023, .007, -.030, .010, .010],
    "photoguard": [-.072, -.298, -.109, -.371, .366, .027, .122, -.135, .272, .206, .282, .111],
    "advdm": [-.092, .013, -.104, -.059, .106, .082, .143, .131, -.021, -.026, -.136, -.134],
    "sds": [-.025, -.104, .005, -.130, -.217, .034, -.160, .144, .087, -.021, .044, -.051],
    "mist": [.036, -.020, .006, -.073, .297, .235, .197, .171, -.014, -.048, -.018, -.036],
    "pid": [.028, .093, -.050, -.091, -.100, -.131, .039, .054, .008, .037, -.058, -.079],
    "editshield": [.045, -.005, .000, .037, -.086, -.050, -.063, -.079, .015, .015, .009, .019],
    "diffusionguard": [.130, .077, .007, .044, -.063, -.071, -.014, .007, .021, .009, -.027, -.061],
    "blurguard": [.062, -.005, .042, -.041, .245, .121, .128, .049, -.024, .170, .063, .171],
    "dctshield": [-.046, -.030, .055, .016, .071, .022, .008, -.030, .023, .001, .021, .063],
    "instant": [.032, .027, .004, .027, .113, .180, .141, .147, .247, .204, .177, .174],
    "veto --model=flux-kontext": [.745, .755, .458, .397, -.460, -.499, -.416, -.253, .207, .400, .117, .233],
    "decontext --model=flux-kontext": [.036, -.004, -.093, -.098, .009, -.001, .112, .079, .071, .038, .152,
        .054],
    "noise --budget_mask=texture": [.031, -.013, .009, -.021, -.007, -.017, .001, .013, -.006, .014, -.043,
        -.037],
}  # fmt: skip


@pytest.mark.parametrize("flags", GOLDEN)
def test_pixels_are_those_of_this_version(flags, tiny_models):
    """On the bundled models, after two iterations, which are enough for all of facelock's terms."""
    line = f"x --models=mini --device=cpu --num_iters=2 --attack_budget=0.03 --defend_method={flags}"
    line += f" --protector={tiny_models.protector}"
    protector = Protector(defend.settings_of(defend.parse_args(line.split())))
    subject = protector.load(PORTRAIT)
    change = protector.pixels([subject])[0].astype(float) - subject.portrait.pixels
    found = change.reshape(2, 64, 2, 64, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
    where = f"{flags.split()[0]}'s Method in methods.py" if "--budget_mask" not in flags else "masks.py"
    assert found == pytest.approx(GOLDEN[flags], abs=TOLERANCE), (
        f"the pixels of {flags} have changed. If they were meant to, raise the version of {where}, so that "
        f"nobody's earlier results pass for new ones, and store {np.round(found, 3).tolist()}"
    )
