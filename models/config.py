"""The model sets, the flags that choose among them, and the configuration that results.

A member is a hub id, a name that its library knows, or a local directory or file. Nothing is downloaded
except what the set or a flag names.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import utils
from models.editors import DENOISERS, EDITORS, Editor
from models.loading import ROOT, Missing, from_hub, hub_way, loading, recorded, shown
from models.perceptual import LPIPS_TRUNKS, load_perceptual
from models.recognizers import KINDS_HELP, Recognizer, load_recognizer, name_of
from models.vaes import WorkingVAE, load_vae
from utils import UserError, defaults_help, warn

if TYPE_CHECKING:
    import torch

    from models.attention import Attention
    from models.denoiser import Denoiser

MINI = ROOT / "assets" / "mini"
# the bundled networks of `instant` for autoencoders that many editors share, by the name of those's directory
PROTECTORS = {"taef2": str(ROOT / "assets" / "taef2" / "protector")}
VAE_HELP = (
    "what is attacked, several at once by the mean of the objective: tiny (distilled from --model's VAE), "
    "KIND or KIND=ID (another editor's), or the id or directory of an autoencoder; the edit of "
    "--model=round-trip goes through the first (default: the editor's own)"
)


@dataclass(frozen=True)
class ModelSet:
    """The members that belong together, and the settings that their editor was made for."""

    editors: dict[str, str]  # one of EDITORS -> model id
    recognizer: str  # what the attack sees
    judges: tuple[str, ...]  # recognisers that no attack ever sees
    perceptual: str
    clip: str
    protector: str | None = None  # the network of `instant`, for the first editor's autoencoder
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
        protector=str(MINI / "protector"),
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


STAND_IN = "By the bundled stand-ins: it says nothing about how well a real photo is protected."
TRAINED_HERE = MODEL_SETS["mini"].judges[:1]  # judges that were trained like the bundled recogniser


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which models are wanted, and where they run, named like the flags; None and (): the set's own."""

    models: str = "full"  # one of MODEL_SETS
    model: str = next(iter(EDITORS))
    model_id: str | None = None
    vae: Sequence[str] = ()  # autoencoders, as VAE_HELP has it; (): the editor's own
    resolution: int | None = None  # px
    edit: Mapping[str, float] = field(default_factory=dict)  # of EDIT_KNOBS
    recognizer: Sequence[str] = ()
    judge: Sequence[str] = ()
    lpips: str | None = None
    clip: str | None = None
    protector: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @classmethod
    def of(cls, args: argparse.Namespace, **more: Any) -> Self:
        """Reads the settings from a script's flags; what was not given keeps its default."""
        given = {name: value for name, value in vars(args).items() if value is not None}
        own = {one.name: given[one.name] for one in fields(cls) if one.name in given}
        own["edit"] = {name: given[name] for name in EDIT_KNOBS if name in given}
        return cls(**own | more)


@dataclass(frozen=True)
class ModelConfig:
    """What the settings resolve to: members, the editor's settings, and where the networks run."""

    models: str  # one of MODEL_SETS
    kind: str  # of editor, one of EDITORS
    model_id: str
    settings: dict[str, Any]  # of the editor: its knobs, resolution, scheduler
    recognizers: tuple[str, ...]  # that the attack sees
    judges: tuple[str, ...]  # that it doesn't
    perceptual: str
    clip: str
    device: torch.device
    dtype: torch.dtype
    own_protector: str | None = None  # --protector, or the set's
    vae_id: str | None = None  # an autoencoder in the place of the editor's own
    checkpointing: bool = False  # of a gradient's activations in VAE, denoiser and transformer
    compile: bool = False  # the networks that an attack goes through

    @property
    def vae(self) -> str:
        """The autoencoder, or the editor whose own it is."""
        return self.vae_id or self.model_id

    @property
    def protector(self) -> str | None:
        """The network of `instant`: the one given, the set's, or the bundled one of the autoencoder."""
        return self.own_protector or PROTECTORS.get(Path(self.vae).name)

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
        """The name of the dtype as run.json records it."""
        return str(self.dtype).removeprefix("torch.")

    def load_editor(self, progress: bool = False) -> Editor:
        """Loads the editing pipeline, or takes it from an earlier call. Raises UserError."""
        return self.editor(self.model_id, self.settings, self.device, self.dtype, progress)

    def check_editor(self) -> None:
        """Raises UserError if the editing pipeline is not available, without loading it."""
        with loading("the editor", self.model_id, hub_way(self.model_id)):
            from_hub(self.model_id)

    def check_denoiser(self, who: str, needs: Collection[str] = DENOISERS) -> None:
        """Raises UserError unless the editor has one of the denoisers that `who` needs."""
        if self.vae_id or self.editor.denoiser is None or self.editor.denoiser.need not in needs:
            kinds = [kind for kind, one in EDITORS.items() if one.denoiser and one.denoiser.need in needs]
            text = f"{who} needs the denoiser of {' or '.join(kinds)}"
            which = self.vae_id or self.kind
            raise UserError(f"{text}, which {which} does not have; name another --model or --vae")

    def load_vae(self) -> WorkingVAE:
        """Loads the autoencoder alone, or takes it from an earlier call. Raises UserError."""
        where = self.resolution, self.device, self.dtype
        return load_vae(self.editor, self.vae, *where, self.checkpointing, self.compile)

    def load_denoiser(self) -> Denoiser | Attention:
        """Returns the editor's denoiser as defenses see it, kept with its pipeline. Raises UserError."""
        editor = self.load_editor()
        views = vars(editor.pipeline).setdefault("views", {})
        if self.checkpointing not in views:
            views[self.checkpointing] = self.editor.denoiser(editor, self.checkpointing)
        return views[self.checkpointing]

    def load_recognizer(self, member: str, dtype: torch.dtype | None = None) -> Recognizer:
        """Loads one of the panel, or takes it from an earlier call. Raises UserError."""
        compile = self.compile and member in self.recognizers
        portraits = MODEL_SETS[self.models].portraits
        return load_recognizer(member, self.device, dtype or self.dtype, compile, portraits)

    def load_perceptual(self) -> Any:
        """Loads the perceptual distance, or takes it from an earlier call. Raises UserError."""
        return load_perceptual(self.perceptual, self.device, self.dtype, self.compile)

    def panel(self) -> dict[str, str]:
        """Gives the recognisers by their names in tables: the attacked ones first, then the judges."""
        found: dict[str, str] = {}
        for member in self.recognizers + self.judges:
            name = name_of(member)
            found[f"{name}-{len(found) + 1}" if name in found else name] = member
        return found

    def edit_settings(self) -> dict[str, Any]:
        """Gives what decides about an edit's pixels beside image, instruction and seed, for run.json."""
        id_ = recorded(self.model_id)
        return {"model": self.kind, "model_id": id_, "dtype": self.dtype_name, **self.settings}

    def last_word(self) -> str:
        """Says how little a result by stand-ins or by an autoencoder alone proves; empty for any other."""
        if self.models == "mini":
            return STAND_IN
        if self.vae_id is None and self.editor.by_words:
            return ""
        name, editors = Path(self.vae.partition("@")[0]).name, editors_of(self.vae)
        stands = f"stands for {' and '.join(editors) or 'no editor that is known here'}"
        return f"Only an autoencoder was used, {name}, which {stands}; the editor itself was not."

    def warn_of_cpu(self, wanted: str) -> None:
        """Warns of what a CPU costs where a GPU was looked for (--device auto) and the networks are large."""
        is_large = self.models == "full" and self.vae_id is None and self.editor.by_words
        if is_large and wanted == "auto" and self.device.type == "cpu":
            warn(
                "no GPU found: two CPU cores take about 9 s per iteration at 512 px, a quarter of an hour "
                "for 100 (docs/speed.md), and longer for an edit; a tiny autoencoder is faster (--vae tiny)"
            )

    @contextlib.contextmanager
    def offering_mini(self, sizes: Iterable[Sequence[int]]) -> Iterator[None]:
        """Adds to an error about missing weights that --models mini works, if images (H, W) have its size."""
        try:
            yield
        except Missing as error:
            side = MODEL_SETS["mini"].only_size
            if self.models == "full" and {tuple(size) for size in sizes} == {(side, side)}:
                error.more.append("for the bundled synthetic portraits, --models mini works offline")
            raise

    def warn_of(self, sizes: Iterable[Sequence[int] | None], texts: Iterable[str] = ()) -> None:
        """Warns of image sizes (H, W) and instructions that the set's models were not made for."""
        if (side := MODEL_SETS[self.models].only_size) is None:
            return
        for height, width in sorted({tuple(size) for size in sizes if size} - {(side, side)}):
            warn(
                f"the {self.models} models were made for {side}x{side} synthetic portraits, not for a "
                f"{width}x{height} image: the result says nothing about how well a real photo is protected"
            )
        known = {*utils.edit_prompts.values(), utils.NO_WORDS}
        if unknown := [text for text in texts if text not in known]:
            warn(f"the {self.models} editor knows the 25 instructions of the paper, not {unknown[0]!r}")


def resolve(wanted: ModelSettings | None = None, **given: Any) -> ModelConfig:
    """Fills in what the settings leave to the set and to the editor, and picks device and dtype.

    given: fields of ModelSettings that replace those of `wanted`. Warns of a knob that the editor doesn't
    have. Raises UserError if the set has no editor of that kind, or if the settings don't go together.
    """
    wanted = replace(wanted or ModelSettings(), **given)
    models, kind, editor = MODEL_SETS[wanted.models], wanted.model, EDITORS[wanted.model]
    for name in ("model_id", "vae", "recognizer", "judge", "lpips", "clip", "protector"):
        value = getattr(wanted, name)
        if value == "" or "" in list(value or ()):
            raise UserError(f"--{name}: an empty name")
    settings = {**editor.knobs, "resolution": editor.resolution, "scheduler": editor.scheduler}
    settings |= {name: value for name, value in models.settings.items() if name in settings}
    settings |= {name: value for name, value in wanted.edit.items() if name in editor.knobs}
    for name in wanted.edit.keys() - editor.knobs.keys():
        warn(f"--{name} is ignored: {kind} has no such knob")
    if wanted.resolution:
        settings["resolution"] = wanted.resolution
    model_id = wanted.model_id or _own_id(wanted)
    editor.check(settings)
    recognizers = several(wanted.recognizer) or (models.recognizer,)
    attacked = {identity(member) for member in recognizers}
    if seen := [one for one in several(wanted.judge) if identity(one) in attacked]:
        raise UserError(f"--judge {seen[0]}: the attack sees it, so it can't be a judge (--recognizer)")
    device = utils.pick_device(wanted.device)
    return ModelConfig(
        models=wanted.models,
        kind=kind,
        model_id=model_id,
        settings=settings,
        recognizers=recognizers,
        judges=several(wanted.judge) or tuple(one for one in models.judges if identity(one) not in attacked),
        perceptual=wanted.lpips or models.perceptual,
        clip=wanted.clip or models.clip,
        device=device,
        dtype=utils.pick_dtype(wanted.dtype, device, editor.half),
        own_protector=wanted.protector or models.protector,
    )


def resolve_editor(wanted: ModelSettings, name: str) -> ModelConfig:
    """Resolves the settings for another editor: KIND, KIND=ID, or an ID of the wanted kind."""
    kind, is_kind, id_ = name.partition("=")
    if kind not in EDITORS:
        return resolve(wanted, model_id=name)
    return resolve(wanted, model=kind, model_id=id_ if is_kind else None)


def resolve_vaes(wanted: ModelSettings) -> list[ModelConfig]:
    """Resolves to each autoencoder of --vae, or to the editor's own. Raises UserError.

    One that is named by an editor's kind sees images as that editor does, every other as --model does.
    """
    found = []
    for name in several(wanted.vae):
        if name.partition("=")[0] in EDITORS and EDITORS[wanted.model].by_words:
            found.append(resolve_editor(wanted, name))
        else:
            found.append(replace(resolve(wanted), vae_id=_autoencoder(wanted, name)))
    return found or [resolve(wanted)]


def _own_id(wanted: ModelSettings) -> str:
    """Gives the id of the set's editor of a kind, or of the autoencoder that is an editor without words."""
    editors, kind = MODEL_SETS[wanted.models].editors, wanted.model
    if not EDITORS[kind].by_words:
        names = several(wanted.vae)
        if not names or names[0] == kind:
            raise UserError(f"--model {kind} needs an autoencoder: --vae=ID or --vae=DIRECTORY")
        return _autoencoder(wanted, names[0])
    if kind not in editors:
        raise UserError(f"the {wanted.models} models have no {kind} editor; it comes with --models full")
    return editors[kind]


def _autoencoder(wanted: ModelSettings, name: str) -> str:
    """Gives the id or directory that a name of --vae stands for. Raises UserError."""
    if name == "tiny":
        if not (tiny := EDITORS[wanted.model].tiny_vae):
            raise UserError(f"--vae tiny: there is none for {wanted.model}; name one by its id or directory")
        return tiny
    return resolve_editor(replace(wanted, edit={}), name).model_id


def editors_of(member: str) -> list[str]:
    """Lists the editors in whose latent space an autoencoder works, by the name of it or of its files."""
    names = {Path(member.partition("@")[0]).name}
    if Path(member).is_dir() and any(Path(member).glob("taef2*.*")):
        names.add("taef2")
    found = []
    for kind, id_ in MODEL_SETS["full"].editors.items():
        if names & {Path(id_).name, Path(EDITORS[kind].tiny_vae or id_).name}:
            found.append(kind)
    return found


def prompts_of(kind: str, numbers: Sequence[int] | None, file: Path | None) -> dict[int, str]:
    """Chooses instructions as `choose_prompts` does; an editor without words gets a single placeholder.

    Raises UserError.
    """
    if EDITORS[kind].by_words:
        return utils.choose_prompts(numbers, file)
    if numbers or file:
        warn(f"--prompts and --prompt_file are ignored: {kind} takes no words")
    return {0: utils.NO_WORDS}


def several(members: str | Sequence[str]) -> tuple[str, ...]:
    """Makes a tuple of names or of a single name."""
    return (members,) if isinstance(members, str) else tuple(members)


def identity(member: str) -> str:
    """Identifies a recogniser, however its path is written."""
    return str(Path(member).resolve()) if Path(member).exists() else member


# ---------------------------------------------------------------------------------------------------------
# flags. None: not given, so that each editor keeps its own value where there are several

HUB_HELP = "hub id (ID@REVISION for a fixed one) or local directory"
NAME_HELP = "each a KIND as in --model, KIND=ID, or an ID of --model's kind (default: the editor of --model)"
EDIT_KNOBS = {  # flag -> type and what it is; an editor reads those that its class has
    "num_inference_steps": (utils.positive_int, "number of denoising steps"),
    # below 1, diffusers would turn all guidance off without a word
    "image_guidance_scale": (utils.at_least_one, "how closely the edit follows the image, at least 1"),
    "guidance_scale": (
        utils.non_negative_float,
        "how closely the edit follows the instruction; at 1 or below, both guidances are off",
    ),
    "strength": (utils.share, "share of the denoising steps that img2img runs"),
}
MEMBERS = {  # name -> the member of the set that it replaces, and what it is
    "recognizer": ("recognizer", f"recognizers that the attack sees (their mean similarity): {KINDS_HELP}"),
    "judge": ("judges", "recognizers that no attack sees, named as in --recognizer"),
    "lpips": ("perceptual", f"perceptual distance: {', '.join(LPIPS_TRUNKS)}, or a local directory"),
    "protector": ("protector", "the network of instant, a directory that train_protector.py has made"),
    "clip": ("clip", f"transformers CLIP, {HUB_HELP}"),
}
ATTACK = ("editor", "recognizer", "judge", "lpips", "protector")  # what a defense and its report may need


def add_model_arguments(
    parser: argparse.ArgumentParser, *wanted: str, dtype: str = ModelSettings.dtype
) -> None:
    """Adds --models, --device, --dtype and --debug, and the flags of the members that are wanted.

    wanted: recognizer, judge, lpips, clip, protector; editor, for which --model (or, as in the authors' batch
    scripts, --target_model), --model_id, --vae and --resolution; edit, also `EDIT_KNOBS`.
    """
    if "edit" in wanted:
        for name, (kind, text) in EDIT_KNOBS.items():
            parser.add_argument(f"--{name}", type=kind, help=setting_help(text, name))
    if {"edit", "editor"} & {*wanted}:
        _add_editor_arguments(parser)
    for name, (member, text) in MEMBERS.items():
        if name in wanted:
            own = {key: getattr(models, member) for key, models in MODEL_SETS.items()}
            own |= PROTECTORS if name == "protector" else {}
            own = {key: " ".join(map(shown, several(one))) for key, one in own.items() if one}
            flag = "--clip_id" if name == "clip" else f"--{name}"
            how = {"nargs": "+", "metavar": "NAME"} if name in ("recognizer", "judge") else {}
            parser.add_argument(flag, dest=name, help=defaults_help(text, own), **how)
    text = "full: the paper's models; mini: the bundled stand-ins, for 128x128 synthetic portraits"
    parser.add_argument("--models", choices=tuple(MODEL_SETS), default=ModelSettings.models, help=text)
    parser.add_argument("--device", default=ModelSettings.device, help=utils.DEVICE_HELP)
    parser.add_argument("--dtype", choices=utils.DTYPE_NAMES, default=dtype, help=utils.DTYPE_HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_editor_arguments(parser: argparse.ArgumentParser) -> None:
    text = "kind of editor; stable-diffusion means its img2img, round-trip an autoencoder without words"
    names = "--model", "--target_model"
    parser.add_argument(*names, dest="model", choices=EDITORS, default=ModelSettings.model, help=text)
    ids = {**MODEL_SETS["full"].editors}
    ids |= {f"{kind} of mini": shown(id_) for kind, id_ in MODEL_SETS["mini"].editors.items()}
    parser.add_argument("--model_id", help=defaults_help(f"the editor's {HUB_HELP}", ids))
    parser.add_argument("--vae", nargs="+", metavar="NAME", help=VAE_HELP)
    text = "long side in px at which the editor works, to which larger images are reduced; for FLUX and "
    text += "Qwen, the side of a square of the same area"
    parser.add_argument("--resolution", type=utils.positive_int, help=setting_help(text, "resolution"))


def setting_help(text: str, name: str) -> str:
    """Writes a flag's help with its default for each editor that has the setting, and for mini's."""
    own = {kind: one.knobs.get(name, getattr(one, name, None)) for kind, one in EDITORS.items()}
    own["mini"] = MODEL_SETS["mini"].settings.get(name)
    own = {kind: value for kind, value in own.items() if value is not None}
    return defaults_help(text, own, [kind for kind, editor in EDITORS.items() if editor.by_words])
