"""Which networks belong together, their flags, and what the flags come to.

A member is a hub id, a name that its library knows, or a local directory or file. Nothing is downloaded but
what the set or a flag names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import utils
from models.editors import EDITORS, Editor
from models.loading import ROOT, from_hub, loading, quiet, recorded, shown
from models.perceptual import LPIPS_TRUNKS
from models.recognizers import KINDS_HELP, Recognizer, load_recognizer, name_of
from utils import UserError, warn

if TYPE_CHECKING:
    import torch

MINI = ROOT / "assets" / "mini"
HUB_HELP = "hub id (ID@REVISION for a fixed one) or local directory"
NAME_HELP = "each a kind as of --model, KIND=ID, or an ID of --model's kind (default: the one of --model)"


@dataclass(frozen=True)
class ModelSet:
    """The members that belong together, and the settings that their editor was made for."""

    editors: dict[str, str]  # one of EDITORS -> model id
    recognizer: str  # what the attack sees
    judges: tuple[str, ...]  # recognisers that no attack ever sees
    perceptual: str
    clip: str
    settings: dict[str, Any] = field(default_factory=dict)  # instead of the editor's own
    only_size: int | None = None  # px; the one portrait size that the models were made for
    portraits: str = "photos"  # what recognisers are asked about, as `load_recognizer` has it


MODEL_SETS = {
    "full": ModelSet(
        editors={
            "instruct-pix2pix": "timbrooks/instruct-pix2pix",
            "stable-diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "sdxl-instruct-pix2pix": "diffusers/sdxl-instructpix2pix-768",
            "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
            "flux2-klein": "black-forest-labs/FLUX.2-klein-4B",
            "qwen-image-edit": "Qwen/Qwen-Image-Edit-2509",
        },
        recognizer="vggface2",
        judges=("casia-webface", "dlib"),
        perceptual="vgg",
        clip="openai/clip-vit-base-patch32",
    ),
    "mini": ModelSet(
        editors={"instruct-pix2pix": str(MINI / "editor"), "flux-kontext": str(MINI / "kontext")},
        recognizer=str(MINI / "recognizer"),
        judges=(str(MINI / "judge"), "dlib"),
        perceptual=str(MINI / "perceptual"),
        clip=str(MINI / "clip"),
        settings={
            "num_inference_steps": 20,
            "guidance_scale": 1.0,
            "image_guidance_scale": 1.0,
            "resolution": 128,
            "scheduler": None,
        },
        only_size=128,
        portraits="mini",
    ),
}


TRAINED_HERE = MODEL_SETS["mini"].judges[:1]  # judges that were trained like the bundled recogniser


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which models are wanted, and where they run, by the names of the flags; None and (): the set's own."""

    models: str = "full"  # one of MODEL_SETS
    model: str = next(iter(EDITORS))
    model_id: str | None = None
    resolution: int | None = None  # px
    edit: Mapping[str, float] = field(default_factory=dict)  # of EDIT_KNOBS
    recognizer: Sequence[str] = ()
    judge: Sequence[str] = ()
    lpips: str | None = None
    clip: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @classmethod
    def of(cls, args: argparse.Namespace, **more: Any) -> Self:
        """Takes the fields that a script has flags for, as far as they were given."""
        flags = {one.name: vars(args).get(one.name) for one in fields(cls)}
        flags["edit"] = {name: value for name in EDIT_KNOBS if (value := vars(args).get(name)) is not None}
        return cls(**{name: value for name, value in flags.items() if value is not None} | more)


@dataclass(frozen=True)
class ModelConfig:
    """What the settings came to: members, the editor's settings, and where the networks run."""

    models: str  # one of MODEL_SETS
    kind: str  # of editor, one of EDITORS
    model_id: str
    settings: dict[str, Any]  # of the editor: its knobs, resolution, scheduler
    recognizers: tuple[str, ...]  # that the attack sees
    judges: tuple[str, ...]  # that it doesn't
    perceptual: str
    clip: str
    only_size: int | None
    portraits: str
    device: torch.device
    dtype: torch.dtype

    @property
    def editor(self) -> type[Editor]:
        """The class of the editor."""
        return EDITORS[self.kind]

    @property
    def resolution(self) -> int:
        """The long side in px at which the editor works."""
        return self.settings["resolution"]

    @property
    def dtype_name(self) -> str:
        """As run.json has it."""
        return str(self.dtype).removeprefix("torch.")

    def load_editor(self, progress: bool = False) -> Editor:
        """Loads the editing pipeline, or takes it from an earlier call. Raises UserError."""
        return self.editor(self.model_id, self.settings, self.device, self.dtype, progress)

    def check_editor(self) -> None:
        """Raises UserError if the editing pipeline can't be had, which `load_editor` would find out later."""
        with loading("the editor", self.model_id):
            from_hub(self.model_id)

    def panel(self) -> dict[str, str]:
        """Gives the recognisers by what tables call them: the attacked ones first, then the judges."""
        return dict(
            zip(panel_names(self.recognizers, self.judges), (*self.recognizers, *self.judges), strict=True)
        )

    def load_recognizer(
        self, member: str, dtype: torch.dtype | None = None, compile: bool = False
    ) -> Recognizer:
        """Loads one of the panel, or takes it from an earlier call. Raises UserError."""
        return load_recognizer(member, self.device, dtype or self.dtype, compile, self.portraits)

    def edit_settings(self) -> dict[str, Any]:
        """Gives all that decides about an edit's pixels beside image, instruction and seed, for run.json."""
        id_ = recorded(self.model_id)
        return {"model": self.kind, "model_id": id_, "dtype": self.dtype_name, **self.settings}

    def warn_of(self, sizes: Iterable[Sequence[int] | None], texts: Iterable[str] = ()) -> None:
        """Warns of image sizes (H, W) and instructions that the set's models were not made for."""
        if (side := self.only_size) is None:
            return
        for height, width in sorted({tuple(size) for size in sizes if size} - {(side, side)}):
            warn(
                f"the {self.models} models were made for {side}x{side} synthetic portraits, not for a "
                f"{width}x{height} image: the result says nothing about how well a real photo is protected"
            )
        if unknown := [text for text in texts if text not in utils.edit_prompts.values()]:
            warn(f"the {self.models} editor knows the 25 instructions of the paper, not {unknown[0]!r}")


def resolve(wanted: ModelSettings | None = None, **given: Any) -> ModelConfig:
    """Puts what is wanted in place of the set's and the editor's own, and picks device and dtype.

    given: fields of ModelSettings, instead of those of `wanted`. A knob that the editor hasn't is ignored
    with a warning. Raises UserError if the set has no editor of that kind, or can't work with the settings.
    """
    wanted = replace(wanted or ModelSettings(), **given)
    models, kind, editor = MODEL_SETS[wanted.models], wanted.model, EDITORS[wanted.model]
    if wanted.model_id is None and kind not in models.editors:
        raise UserError(f"the {wanted.models} models have no {kind} editor; it comes with --models full")
    for name in ("model_id", "recognizer", "judge", "lpips", "clip"):
        value = getattr(wanted, name)
        if value == "" or "" in list(value or ()):
            raise UserError(f"--{name}: an empty name")
    own = {**editor.knobs, "resolution": editor.resolution, "scheduler": editor.scheduler}
    settings = own | {name: value for name, value in models.settings.items() if name in own}
    for name, value in wanted.edit.items():
        if name in editor.knobs:
            settings[name] = value
        else:
            warn(f"--{name} is ignored: {kind} has no such knob")
    settings["resolution"] = wanted.resolution or settings["resolution"]
    editor.check(settings)
    recognizers = several(wanted.recognizer) or (models.recognizer,)
    attacked = {identity(member) for member in recognizers}
    if seen := [one for one in several(wanted.judge) if identity(one) in attacked]:
        raise UserError(f"--judge {seen[0]}: the attack sees it, so that it is no judge (--recognizer)")
    quiet()
    device = utils.pick_device(wanted.device)
    return ModelConfig(
        models=wanted.models,
        kind=kind,
        model_id=wanted.model_id or models.editors[kind],
        settings=settings,
        recognizers=recognizers,
        judges=several(wanted.judge) or tuple(one for one in models.judges if identity(one) not in attacked),
        perceptual=wanted.lpips or models.perceptual,
        clip=wanted.clip or models.clip,
        only_size=models.only_size,
        portraits=models.portraits,
        device=device,
        dtype=utils.pick_dtype(wanted.dtype, device, editor.half),
    )


def resolve_editor(wanted: ModelSettings, name: str) -> ModelConfig:
    """Chooses as `choose` does, but the editor named as KIND, KIND=ID, or by an ID of the wanted kind."""
    kind, is_kind, id_ = name.partition("=")
    if kind not in EDITORS:
        return resolve(wanted, model_id=name)
    return resolve(wanted, model=kind, model_id=id_ if is_kind else None)


def several(members: str | Sequence[str]) -> tuple[str, ...]:
    """Makes a tuple of names, or of one name: a string is a sequence, too."""
    return (members,) if isinstance(members, str) else tuple(members)


def identity(member: str) -> str:
    """Says which recogniser a member is, however its path is written."""
    return str(Path(member).resolve()) if Path(member).exists() else member


def panel_names(recognizers: Sequence[str], judges: Sequence[str]) -> list[str]:
    """Names recognisers and judges in tables, the same name never twice."""
    names: list[str] = []
    for name in map(name_of, (*recognizers, *judges)):
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


# ---------------------------------------------------------------------------------------------------------
# flags

EDIT_KNOBS = {  # flag -> type and what it is; a class of editors reads some of them
    "num_inference_steps": (utils.positive_int, "denoising steps"),
    # diffusers would silently turn all guidance off below 1
    "image_guidance_scale": (utils.at_least_one, "how closely the edit keeps to the image, at least 1"),
    "guidance_scale": (
        utils.non_negative_float,
        "how strongly the instruction is followed; up to 1, both guidances are off",
    ),
    "strength": (utils.share, "share of the denoising that img2img does"),
}


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = ModelSettings.dtype) -> None:
    """Adds --models, --device, --dtype and --debug: what every script that loads a model has."""
    text = "full: the paper's models; mini: the bundled stand-ins, for 128x128 synthetic portraits"
    parser.add_argument("--models", choices=tuple(MODEL_SETS), default=ModelSettings.models, help=text)
    parser.add_argument("--device", default=ModelSettings.device, help=utils.DEVICE_HELP)
    parser.add_argument("--dtype", choices=utils.DTYPE_NAMES, default=dtype, help=utils.DTYPE_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_editor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model (or, as the authors' batch scripts call it, --target_model), --model_id, --resolution."""
    names = ("--model", "--target_model")
    text = "kind of editor; stable-diffusion is its img2img"
    parser.add_argument(*names, dest="model", choices=EDITORS, default=ModelSettings.model, help=text)
    ids = "; ".join(
        f"{name}: {', '.join(map(shown, models.editors.values()))}" for name, models in MODEL_SETS.items()
    )
    parser.add_argument("--model_id", help=f"{HUB_HELP} of the editor (default: {ids})")
    text = setting_help(
        "long side in px at which the editor works; larger images are reduced; for FLUX and Qwen, "
        "the side of the square that has the area at which they work",
        "resolution",
    )
    parser.add_argument("--resolution", type=utils.positive_int, help=text)


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag but the seed that decides how an image is edited."""
    for name, (kind, text) in EDIT_KNOBS.items():
        parser.add_argument(f"--{name}", type=kind, help=setting_help(text, name))
    add_editor_arguments(parser)
    add_model_arguments(parser)


def add_face_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --recognizer and --judge."""
    attacked = "face recognisers that the attack sees, one or several, whose mean similarity counts"
    judges = "face recognisers that no attack sees, one or several: a panel"
    for flag, member, what in (("recognizer", "recognizer", attacked), ("judge", "judges", judges)):
        text = f"{what}: {KINDS_HELP} (default: {_of_each_set(member)})"
        parser.add_argument(f"--{flag}", nargs="+", metavar="NAME", help=text)


def add_perceptual_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --lpips."""
    kinds = f"{', '.join(LPIPS_TRUNKS)}, or a local directory"
    text = f"perceptual distance: {kinds} (default: {_of_each_set('perceptual')})"
    parser.add_argument("--lpips", help=text)


def add_clip_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --clip_id."""
    text = f"{HUB_HELP} of a transformers CLIP (default: {_of_each_set('clip')})"
    parser.add_argument("--clip_id", dest="clip", help=text)


def setting_help(text: str, name: str) -> str:
    """Writes a flag's help with the value that each set has for it, in place of the default None."""
    own = {kind: one.knobs.get(name, getattr(one, name, None)) for kind, one in EDITORS.items()}
    own = {kind: value for kind, value in own.items() if value is not None}
    first = next(iter(own.values()))
    others = [f"{kind} {value}" for kind, value in own.items() if value != first]
    values = {key: models.settings.get(name, first) for key, models in MODEL_SETS.items()}
    values["full"] = f"{first} ({', '.join(others)})" if others else first
    only = f", {' and '.join(own)} only" if len(own) < len(EDITORS) else ""
    return f"{text}{only} (default: {', '.join(f'{key}: {value}' for key, value in values.items())})"


def _of_each_set(member: str) -> str:
    """Writes a member, or several, as each set has it."""
    own = {name: getattr(models, member) for name, models in MODEL_SETS.items()}
    own = {name: [value] if isinstance(value, str) else value for name, value in own.items()}
    return ", ".join(f"{name}: {' '.join(map(shown, values))}" for name, values in own.items())
