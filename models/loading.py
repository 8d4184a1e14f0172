"""Loads networks: quietly, frozen, and with one clear line where that fails.

Nothing from a hub is executed; pickles are read with `weights_only=True`. Heavy imports are inside the
functions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import MOST_TEXT, UserError, first_line, memory_format, parse_json, read_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# of the files that determine a model's output: weights, configs, vocabularies
READ_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".json", ".txt", ".model")

# numbers in configs that decide how much is built, the least and the most; None: as many as there are tensors
LIMITS = (
    (re.compile(r"(^|_)num_train_timesteps$"), 1, 100_000),
    (re.compile(r"^(num_(\w+_)?(layers|blocks)|(transformer_)?layers_per_block|depths)$"), 0, None),
    (re.compile(r"(^|_)(downsample_padding|kernel)$"), 0, 100),
    (re.compile(r"(^|_)(sizes?|dims?|channels|heads|groups|height|width)$"), 1, 10_000_000),
)
MOST_LAYERS = 1000  # where no index of tensors says how many there can be
MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it

MORE = "HF_ENDPOINT=URL names a mirror of the hub; docs/models.md says more"
OF_SD = '--include "*.json" --include "*.txt" --include "*/*.safetensors" --exclude "*.fp16.*"'
OF_SD += ' --exclude "*non_ema*" --exclude "safety_checker/*"'
IN_FOLDERS = '--include "*.json" --include "*/*"'
OF_CLIP = '--include "*.json" --include "*.txt" --include "*.safetensors" --include "pytorch_model.bin"'
OF_VAE = '--include "vae/*" --exclude "*.fp16.*"'
PTH = "or TAEF2's two .pth files (github.com/madebyollin/taesd) in a DIR: --vae=DIR, make photo TINY=DIR"
WAYS = {  # hub id -> GB of what is loaded, of its VAE alone, and what to fetch
    "timbrooks/instruct-pix2pix": (4.3, 0.3, OF_SD),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (4.3, 0.3, OF_SD),
    "diffusers/sdxl-instructpix2pix-768": (12, 0.3, OF_SD),
    "black-forest-labs/FLUX.1-Kontext-dev": (34, 0.2, IN_FOLDERS),
    "black-forest-labs/FLUX.2-klein-4B": (16, 0.2, IN_FOLDERS),
    "Qwen/Qwen-Image-Edit-2509": (58, 0.3, IN_FOLDERS),
    "openai/clip-vit-base-patch32": (0.6, None, OF_CLIP),
    "madebyollin/taesd": (0.01, None, ""),
    "madebyollin/taesdxl": (0.01, None, ""),
    "madebyollin/taef1": (0.01, None, ""),
    "madebyollin/taef2": (0.01, None, f", {PTH}"),
}


def quiet() -> None:
    """Silences the libraries' warnings and loading bars; those of downloads stay."""
    import logging
    import warnings

    import diffusers
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # a pickle instead of safetensors is no error
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    warnings.filterwarnings("ignore", category=UserWarning, module="onnx2torch")
    # of lpips' call
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models._utils")


def shown(member: str) -> str:
    """Writes a bundled model's path relative to the repository, as --help and messages have it."""
    path = Path(member)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else member


@functools.cache
def recorded(member: str) -> str:
    """Names a model for run.json; a local one with a hash of its weights and configs.

    Other weights or another config.json under the same path make another model. Cached per process.
    """
    path = Path(member)
    if not path.exists():  # of the hub, or whoever loads it says so
        return shown(member)
    files = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_suffix(".json")]
    seen = hashlib.sha256()
    for file in files:
        if file.is_file() and (file == path or file.suffix in READ_SUFFIXES):
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").digest()
            seen.update(str(file.relative_to(path.parent)).encode(errors="surrogateescape") + b"\0" + digest)
    return f"{shown(member)} {seen.hexdigest()[:8]}"


WORDS = {  # of schedulers, which read them when they are used
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}


def check_configs(folder: Path) -> None:
    """Refuses configs that don't fit a local model's weights, before a library builds the network.

    Building a million layers would take hours. Raises ValueError.
    """
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith("config.json") and not path.name.startswith("tokenizer"):
            files = [*path.parent.glob("*.safetensors")]
            try:
                most = sum(map(count_tensors, files)) if files else MOST_LAYERS
                check_numbers(parse_json(read_plain(path, MOST_TEXT)), most)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path.relative_to(folder)}: {error}") from None


def count_tensors(path: Path) -> int:
    """Counts the tensors of a .safetensors file by its header. Raises ValueError or TypeError."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= MOST_HEADER:
            raise ValueError(f"{path.name} has no header")
        found = parse_json(file.read(size))
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} has no header")
    return len(found)


def check_numbers(said: Any, most: int) -> None:
    """Refuses absurd counts of layers and steps, invalid sizes, and what only fails at work. ValueError."""
    for key, value in said.items() if isinstance(said, dict) else ():
        check_numbers(value, most)
        if key in WORDS and value not in (None, *WORDS[key]):
            raise ValueError(f"{key} is {str(value)[:40]!r}, none of {', '.join(WORDS[key])}")
        if key.endswith(("eps", "scale_factor")) and not isinstance(value, int | float | None):
            raise ValueError(f"{key} is {str(value)[:40]!r}, not a number")
        limits = [(least, limit or most) for names, least, limit in LIMITS if names.search(key)]
        if not limits or "ngram" in key:
            continue
        least, limit = limits[0]
        numbers = value if isinstance(value, list) else [value]
        numbers = [one for one in numbers if one is not None and not isinstance(one, bool | dict | list)]
        if not all(isinstance(one, int | float) and least <= one <= limit for one in numbers):
            raise ValueError(f"{key} is {str(value)[:40]!r}, not a number from {least} to {limit}")
        if value == [] and least:
            raise ValueError(f"{key} is empty")
        if isinstance(value, list) and len(value) > max(most, MOST_LAYERS):
            raise ValueError(f"{key} has {len(value)} entries, its weights {most} tensors")


class Missing(UserError):
    """Weights that are missing: which, why, and how to get them; several are listed one per line."""

    def __init__(self, missing: Iterable[str]) -> None:
        super().__init__()
        self.missing = list(dict.fromkeys(missing))
        self.more = [MORE]

    @property
    def lines(self) -> list[str]:
        if len(self.missing) == 1:
            return [str(self)]
        return [f"{len(self.missing)} networks are missing:", *self.missing, *self.more]

    def __str__(self) -> str:
        return "; ".join([*self.missing, *self.more])


def hub_way(member: str, is_vae: bool = False) -> str:
    """Writes the command that fetches a hub id, or its VAE alone, and how much that is."""
    name, _, revision = member.partition("@")
    whole, of_vae, files = WAYS.get(name, (None, None, ""))
    size, files = (of_vae, OF_VAE) if is_vae and of_vae else (whole, files)
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return f"{f'{size:g} GB, ' if size else ''}{command} {files}".strip().replace(" ,", ",")


def file_way(size: float, url: str) -> str:
    """Writes where a file of torch's hub comes from and goes to."""
    import torch

    return f"{size:g} GB, {url} into {torch.hub.get_dir()}/checkpoints"


@contextlib.contextmanager
def loading(what: str, member: str, way: str = "") -> Iterator[None]:
    """Turns any error of a library that loads weights into one clear line.

    way: how to get the weights and how large they are, unless they are local files.
    """
    quiet()
    try:
        if Path(member).is_dir():
            check_configs(Path(member))
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, HTTP errors, KeyError of a wrong state dict, unpickling errors...
        text = f"{what} '{shown(member)}' can't be loaded ({_reason(error)})"
        if not way or is_local(member):
            raise UserError(text) from None
        raise Missing([f"{text}: {way}"]) from None


def is_local(member: str) -> bool:
    """Tells a path, there or not, from a hub id."""
    path = Path(member)
    return path.exists() or path.is_absolute() or member.startswith(".") or member.count("/") > 1


def load_all(needed: Iterable[Callable[[], Any]], asked: Iterable[Callable[[], Any]] = ()) -> None:
    """Calls loaders and names everything that is missing in one error. Raises UserError.

    asked: optional ones, tried only if something needed is missing.
    """
    missing: list[str] = []

    def attempt(load: Callable[[], Any]) -> None:
        try:
            load()
        except Missing as error:
            missing.extend(error.missing)

    for load in needed:
        attempt(load)
    for load in asked if missing else ():
        with contextlib.suppress(UserError):  # reported when it is used
            attempt(load)
    if missing:
        raise Missing(missing)


def _reason(error: Exception) -> str:
    """What went wrong; torch's advice for a refused pickle, to read it all the same, is left out."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors"
    line = first_line(error)
    if isinstance(error, HfHubHTTPError) or line.endswith(":"):  # the explanation comes after the first line
        return " ".join(str(error).split())[:300]
    return line


def from_hub(member: str) -> tuple[str, dict[str, Any]]:
    """Turns a hub id, ID@REVISION or a local directory into the name and keywords for `from_pretrained`.

    The hub is asked once first, so that a missing network or a wrong id fails at once, not after the
    libraries' five retries. Without a network, the local cache is used.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    if Path(member).is_dir():
        return member, {"local_files_only": True}
    if is_local(member):
        raise FileNotFoundError("no such directory")
    name, _, revision = member.partition("@")
    fixed = {"revision": revision} if revision else {}
    try:
        info = HfApi().model_info(name, timeout=10, **fixed)
        if getattr(info, "gated", False):  # anybody may read about it
            HfApi().auth_check(name)
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{name}"
        how = f"accept its licence at {page}, log in by `hf auth login`, and run this again"
        raise Missing([f"'{name}' is gated: {how}"]) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception as error:  # no connection, a hub out of order, or HF_HUB_OFFLINE
        try:
            return snapshot_download(name, local_files_only=True, **fixed), {"local_files_only": True}
        except errors.LocalEntryNotFoundError:
            reason = f"the hub can't be reached, {first_line(error)}, and it is not in the local cache"
            raise ConnectionError(reason) from None
    return name, fixed


def find_file(name: str, where: dict[str, Any], file: str) -> Path | None:
    """Finds a file of what `from_hub` gives, and fetches it if need be; None if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if "local_files_only" in where:  # a directory
        return path if (path := Path(name) / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, **where))
    except EntryNotFoundError:
        return None


def load_network(
    class_name: str, name: str, where: dict[str, Any], folder: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """Loads a network of diffusers or transformers from a folder of what `from_hub` gives.

    Gives None for a class that is not a network. Takes fp16 weights where there are no others. Loads straight
    to the device, since a pipeline's own device_map knows no "cuda:1". Raises ValueError as `complete` and
    `frozen` do, and what the libraries raise.
    """
    import diffusers
    import torch
    import transformers

    kind = getattr(diffusers, class_name, None) or getattr(transformers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        return None
    how = {"subfolder": folder, "dtype": dtype, "device_map": {"": device}, **where}

    def load(**variant: str) -> Any:
        loaded = kind.from_pretrained(name, output_loading_info=True, **how, **variant)
        return frozen(complete(folder or class_name, loaded), device, dtype)

    try:
        return load()
    except OSError:
        with contextlib.suppress(OSError):
            return load(variant="fp16")
        raise


def complete(part: str, loaded: tuple[Any, dict[str, Any]]) -> Any:
    """Checks what `from_pretrained` returns with `output_loading_info` -> the network.

    The libraries fill missing tensors at random; this raises ValueError instead.
    """
    network, info = loaded
    for what in ("missing", "unexpected", "mismatched"):
        keys = info.get(f"{what}_keys") or ()
        if keys := sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys):
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"{part}: {what} in its file: {keys[0]}{more}")
    return network


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that knows no words, which the libraries make from a folder without its files.

    Raises ValueError.
    """
    one, other = ({*tokenizer(text).input_ids} for text in ("Let it be snowy", "Add elf-like ears"))
    if one == other:  # the same tokens, for the beginning, the end and what is unknown
        raise ValueError("its tokenizer knows no words: tokenizer.json or vocab.json is not there")


def frozen(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Prepares a network for inference: no dropout, no gradients. Raises ValueError for non-finite values."""
    for name, values in network.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    network = network.to(device=device, dtype=dtype)
    if all(weights.ndim < 5 for weights in network.parameters()):  # torch has no such format for videos
        network = network.to(memory_format=memory_format(device))
    return network.eval().requires_grad_(False)


def compiled(network: torch.nn.Module) -> None:
    """Compiles a network in place, with one graph per image size.

    torch's limit of eight graphs guards against code that never settles; three sizes of portraits reach it.
    One graph for all sizes breaks torch 2.14's code generator.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**16
    network.compile(dynamic=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a .safetensors file, or from a pickle that may hold nothing but tensors."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
