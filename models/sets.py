"""Which networks belong together, their flags, and what the flags come to.

A member is a hub id, a name that its library knows, or a local directory or file. Nothing is downloaded but
what the set or a flag names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Chosen:
    """What the flags of one script came to: members, settings, and where the networks run."""

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


def choose(args: argparse.Namespace) -> Chosen:
    """Puts the flags' values in place of the set's and the editor's own, and picks device and dtype.

    A knob that the editor hasn't is ignored with a warning. Raises UserError if the set has no editor of the
    kind asked for, or can't work with the settings.
    """
    models, given = MODEL_SETS[args.models], vars(args)
    kind = given.get("model") or next(iter(EDITORS))
    editor = EDITORS[kind]
    if given.get("model_id") is None and kind not in models.editors:
        raise UserError(f"the {args.models} models have no {kind} editor; it comes with --models full")
    for flag in ("model_id", "recognizer", "judge", "lpips", "clip"):
        value = given.get(flag)
        if "" in (value if isinstance(value, list) else [value]):
            raise UserError(f"--{flag}: an empty name")
    own = {**editor.knobs, "resolution": editor.resolution, "scheduler": editor.scheduler}
    settings = own | {name: value for name, value in models.settings.items() if name in own}
    for name in sorted({*own, *EDIT_KNOBS}):
        if given.get(name) is not None and name in own:
            settings[name] = given[name]
        elif given.get(name) is not None:
            warn(f"--{name} is ignored: {kind} has no such knob")
    editor.check(settings)
    recognizers = tuple(given.get("recognizer") or [models.recognizer])
    attacked = {identity(member) for member in recognizers}
    if seen := [one for one in given.get("judge") or () if identity(one) in attacked]:
        raise UserError(f"--judge {seen[0]}: the attack sees it, so that it is no judge (--recognizer)")
    quiet()
    device = utils.pick_device(args.device)
    return Chosen(
        models=args.models,
        kind=kind,
        model_id=given.get("model_id") or models.editors[kind],
        settings=settings,
        recognizers=recognizers,
        judges=tuple(given.get("judge") or (one for one in models.judges if identity(one) not in attacked)),
        perceptual=given.get("lpips") or models.perceptual,
        clip=given.get("clip") or models.clip,
        only_size=models.only_size,
        portraits=models.portraits,
        device=device,
        dtype=utils.pick_dtype(args.dtype, device, editor.half),
    )


def identity(member: str) -> str:
    """Says which recogniser a member is, however its path is written."""
    return str(Path(member).resolve()) if Path(member).exists() else member


def panel_names(recognizers: Sequence[str], judges: Sequence[str]) -> list[str]:
    """Names recognisers and judges in tables, the same name never twice."""
    names: list[str] = []
    for name in map(name_of, (*recognizers, *judges)):
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def choose_editor(args: argparse.Namespace, name: str) -> Chosen:
    """Chooses as `choose` does, but the editor named as KIND, KIND=ID, or by an ID of --model's kind."""
    kind, is_kind, id_ = name.partition("=")
    if kind not in EDITORS:
        kind, id_ = vars(args).get("model"), name
    elif not is_kind:
        id_ = None
    return choose(argparse.Namespace(**vars(args) | {"model": kind, "model_id": id_}))


def choose_vaes(args: argparse.Namespace) -> list[Chosen]:
    """Chooses the editors whose VAEs are attacked: those of --vae_ids, else that of --model."""
    names = vars(args).get("vae_ids") or ()
    unread = argparse.Namespace(**vars(args) | dict.fromkeys(EDIT_KNOBS))  # of whoever edits, if anybody does
    return [choose_editor(unread, name) for name in names] or [choose(unread)]


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


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Adds --models, --device, --dtype and --debug: what every script that loads a model has."""
    text = "full: the paper's models; mini: the bundled stand-ins, for 128x128 synthetic portraits"
    parser.add_argument("--models", choices=tuple(MODEL_SETS), default="full", help=text)
    parser.add_argument("--device", default="auto", help=utils.DEVICE_HELP)
    parser.add_argument("--dtype", choices=utils.DTYPE_NAMES, default=dtype, help=utils.DTYPE_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_editor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model (or, as the authors' batch scripts call it, --target_model), --model_id, --resolution."""
    kinds, names = tuple(EDITORS), ("--model", "--target_model")
    text = "kind of editor; stable-diffusion is its img2img"
    parser.add_argument(*names, dest="model", choices=kinds, default=kinds[0], help=text)
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


def add_vaes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --vae_ids."""
    text = f"attack the VAEs of several editors at once, by the mean of the objective: {NAME_HELP}"
    parser.add_argument("--vae_ids", nargs="+", metavar="EDITOR", help=text)


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag but the seed that decides how an image is edited."""
    for name, (kind, text) in EDIT_KNOBS.items():
        parser.add_argument(f"--{name}", type=kind, help=setting_help(text, name))
    add_editor_arguments(parser)
    add_model_arguments(parser)


def add_face_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --recognizer and --judge."""
    defaults = {
        name: (shown(models.recognizer), " ".join(map(shown, models.judges)))
        for name, models in MODEL_SETS.items()
    }
    for place, (flag, what) in enumerate(
        (
            (
                "recognizer",
                "face recognisers that the attack sees, one or several, whose mean similarity counts",
            ),
            ("judge", "face recognisers that no attack sees, one or several: a panel"),
        )
    ):
        own = ", ".join(f"{name}: {pair[place]}" for name, pair in defaults.items())
        parser.add_argument(
            f"--{flag}", nargs="+", metavar="NAME", help=f"{what}: {KINDS_HELP} (default: {own})"
        )


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
    return ", ".join(f"{name}: {shown(getattr(models, member))}" for name, models in MODEL_SETS.items())
