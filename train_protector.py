"""Trains `instant`, a network that protects at once, with the objective of any other method.

    python mini/portraits.py --write people --first 0 --count 2000
    python mini/portraits.py --write held_out --first 100000 --count 16
    python train_protector.py --models=mini --image_dir=people --validation_dir=held_out \\
        --output_dir=checkpoints/protector --defend_method=facelock-dim
    python defend.py --models=mini --defend_method=instant --protector=checkpoints/protector/network \\
        --input_path=assets/portraits/mini/portrait_1000000.png

The network sees a portrait and each pixel's budget, and learns to maximise what the method's loop maximises,
through the autoencoder, the recognisers and the random transforms of --defend_method. Judges take no part in
training; at intervals the last judge measures what is left of the validation people after a round trip
through the autoencoder. With --pairs the network imitates the loop first. Writes OUTPUT_DIR/network, the one
to use, and a checkpoint, from which the next run continues. docs/methods.md has the costs.
"""

from __future__ import annotations

import argparse
import cmath
import copy
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from defend import add_defense_arguments, settings_of, transform_names
from images import to_tensor
from masks import budget_mask
from methods import METHODS
from models.config import identity
from models.faces import Face, PointCrop, scale_boxes
from models.loading import recorded
from models.recognizers import face_similarity_to
from protection import Protector, Subject
from runs import find_images
from transforms import chains
from utils import UserError, warn

if TYPE_CHECKING:
    from torch import Tensor, nn

NETWORKS = ("unet", "universal", "mixture")
LAST = 0.99  # the share of a loop's iterations at which an objective with a schedule is asked
KEEPING = 0.3  # weight of what keeps logits where tanh has a slope; without it all are beyond after 40 steps
DECAY = 0.998  # of the averaged weights, which are those that count
CHECKPOINT, LOG = "checkpoint.pt", "log.txt"


@dataclass(frozen=True)
class Plan:
    """How a network is trained, by the names of the flags."""

    network: str
    channels: Sequence[int]
    depths: Sequence[int]
    patterns: int
    pattern_size: int
    budgets: Sequence[float]
    steps: int
    batch_size: int
    rate: float
    pairs: int
    warm_steps: int
    save_minutes: float
    frame: int | None
    sides: Sequence[int] | None
    augment: str
    seed: int

    def form(self) -> dict[str, Any]:
        """Gives what the network is built of, as its config.json has it."""
        if self.network == "unet":
            return {"kind": "unet", "channels": list(self.channels), "depths": list(self.depths)}
        count = self.patterns if self.network == "mixture" else 1
        return {"kind": "universal", "num_patterns": count, "size": self.pattern_size}


@dataclass
class Batch:
    """Portraits of one size, or frames of a side, each with a budget of its own."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    boxes: list[list[Face]]  # at the working size
    protector: Protector  # which works at the frames' side
    sizes: Tensor  # (B, 1, 1, 1), the budgets
    mask: Tensor  # (B, 1, H, W), a pixel's share of its budget
    frame: int | None  # the side in px at which the network sees all of it
    shares: Tensor | None = None  # (B, 3, H, W) in [-1, 1]: of the budget, where the loop came to

    @property
    def budget(self) -> Tensor:
        """That of each pixel, (B, 1, H, W)."""
        return self.sizes * self.mask

    def seen(self) -> list[Tensor]:
        """Gives images and budget as the network sees them."""
        size = self.frame and (self.frame, self.frame)
        return [resized(values, size) for values in (self.images, self.budget)]

    def protected(self, shares: Tensor) -> Tensor:
        """Gives the pictures that shares of the budget make, at the network's size, without rounding."""
        from models.protector import limited

        shares = resized(shares, self.frame and self.images.shape[-2:]).clamp(-1, 1)
        change = limited(self.sizes * shares, self.mask, rms_of(self.protector))
        return (self.images + self.mask * change).clamp(-1, 1)


def resized(values: Tensor, size: Sequence[int] | None) -> Tensor:
    """Brings values (B, C, H, W) to a size (H, W), bicubic; None: they have it."""
    import torch.nn.functional as F

    return values if size is None else F.interpolate(values, size, mode="bicubic", antialias=True)


class People:
    """The portraits of a folder with their faces.

    protectors: one for each side at which pictures go through the autoencoder.
    """

    def __init__(self, directory: Path, protectors: Sequence[Protector], plan: Plan) -> None:
        self.protectors, self.frame, self.augmented = protectors, plan.frame, chains(plan.augment)
        self.subjects: list[Subject] = []
        for path in find_images(directory):
            try:
                self.subjects.append(protectors[0].load(path))
            except UserError as error:
                warn(str(error))
        if not self.subjects:
            raise UserError(f"{directory}: no portrait with a face")

    def batch(
        self, subjects: Sequence[Subject], budgets: Sequence[float], draw: random.Random | None = None
    ) -> Batch:
        """Makes a batch of portraits of one size, or of frames; draw: alters them, and mirrors some."""
        import torch

        protector = draw.choice(self.protectors) if draw else self.protectors[-1]
        cut = [self._cut(subject, protector, draw) for subject in subjects]
        boxes, images = [faces for _, faces in cut], torch.cat([image for image, _ in cut])
        if draw:
            draws = [torch.Generator().manual_seed(draw.randrange(2**31)) for _ in boxes]
            images = draw.choice(self.augmented)(images, draws)
        images = images.clamp(-1, 1).to(protector.device)  # crops leave it by rounding
        mask = budget_mask(images, boxes, protector.mask)
        whole = images.new_ones(len(images), 1, *images.shape[-2:]) if mask is None else mask
        sizes = torch.tensor(budgets).to(images).view(-1, 1, 1, 1)
        return Batch(images, boxes, protector, sizes, whole, self.frame)

    def _cut(
        self, subject: Subject, protector: Protector, draw: random.Random | None
    ) -> tuple[Tensor, list[Face]]:
        """Gives a portrait at its working size, or the frame of its first face -> (1, 3, H, W), its faces."""
        from models.protector import frame_of

        image, editor = to_tensor(subject.portrait.pixels), protector.config.editor
        if self.frame is None:
            size = editor.working_size(image.shape[-2:], protector.resolution)
            faces = scale_boxes(subject.boxes, image.shape[-2:], size)
            image = editor.to_working(image, protector.resolution)
        else:
            face, crop = subject.boxes[0], frame_of(protector.resolution)
            crop = moved(crop, draw) if draw else crop
            image, faces = crop(image, face), [crop.place(face)]
        if draw and draw.random() < 0.5:
            image, faces = image.flip(-1), [_mirrored(box, image.shape[-1]) for box in faces]
        return image, faces

    def drawn(self, draw: random.Random, plan: Plan) -> Batch:
        """Draws portraits of one size, budgets between the plan's two; half of them are mirrored."""
        size = draw.choice(self.subjects).portrait.size
        alike = [one for one in self.subjects if self.frame or one.portrait.size == size]
        subjects = draw.choices(alike, k=plan.batch_size)
        low, high = (math.log(budget) for budget in plan.budgets)
        return self.batch(subjects, [math.exp(draw.uniform(low, high)) for _ in subjects], draw)


def rms_of(protector: Protector) -> float | None:
    """Gives the root mean square to which a method's loop keeps its change, if it does."""
    return protector.run.rms if "rms" in protector.method.reads else None


def moved(crop: PointCrop, draw: random.Random) -> PointCrop:
    """Scales a crop's template by up to 10 %, turns it by up to 6 degrees and moves it by up to 3 %."""
    middle, (right, down) = crop.size / 2, (crop.size * draw.uniform(-0.03, 0.03) for _ in range(2))
    by = draw.uniform(0.9, 1.1) * cmath.exp(1j * draw.uniform(-0.1, 0.1))
    places = [by * complex(x - middle, y - middle) for x, y in crop.template]
    points = [(place.real + middle + right, place.imag + middle + down) for place in places]
    return PointCrop(crop.size, tuple(points))


def _mirrored(box: Face, width: int) -> Face:
    """A face in the mirrored picture; its points change sides, too"""
    x0, y0, x1, y1 = box
    left, right, nose, low_left, low_right = [(width - 1 - x, y) for x, y in box.points]
    return Face((width - x1, y0, width - x0, y1), (right, left, nose, low_right, low_left))


# ---------------------------------------------------------------------------------------------------------
# losses


def method_loss(network: nn.Module, batch: Batch, seeds: Sequence[int]) -> Tensor:
    """Asks the method's objective of what the network makes -> its negative mean."""
    import torch

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    objective = batch.protector.objective_of(batch.images, batch.boxes, draws)(batch.images)
    seen, budget = batch.seen()
    logits = network.logits(seen, budget).float()
    beyond = (budget > 0) * (logits.abs() - 1).clamp(min=0).square()
    return KEEPING * beyond.mean() - objective(batch.protected(logits.tanh()), LAST).mean()


def imitation_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Compares the network's shares of the budget with where the loop came to, where there is a budget."""
    shares = resized(network(*batch.seen()).float(), batch.frame and batch.shares.shape[-2:])
    difference = (shares - batch.shares).square()
    weight = (batch.budget > 0).to(difference)
    return (weight * difference).sum() / (3 * weight.sum())


def make_pairs(people: People, plan: Plan, draw: random.Random) -> Iterator[Batch]:
    """Runs the method's own loop on batches of portraits, a budget for each batch."""
    import torch

    for _ in range(math.ceil(plan.pairs / plan.batch_size)):
        budget = math.exp(draw.uniform(*(math.log(one) for one in plan.budgets)))
        batch = people.drawn(draw, replace(plan, budgets=(budget, budget)))
        loop = copy.copy(batch.protector)
        loop.run = replace(loop.run, budget=budget)
        seeds = [draw.randrange(2**31) for _ in batch.boxes]
        changed = loop.perturb(batch.images, batch.boxes, seeds)[0] - batch.images
        yield replace(batch, shares=(changed / batch.budget.clamp(min=1e-6)).clamp(-1, 1).to(torch.float16))


# ---------------------------------------------------------------------------------------------------------
# what is left


class Validation:
    """Measures what the last judge finds of people in round trips of their protected pictures."""

    def __init__(self, people: People, plan: Plan) -> None:
        import torch

        config = people.protectors[0].config
        budget = math.sqrt(plan.budgets[0] * plan.budgets[-1])
        self.batches = [people.batch([subject], [budget]) for subject in people.subjects]
        # the hardest to deceive are those that share nothing with the recogniser: the last of the panel
        self.judge = config.load_recognizer(config.judges[-1], torch.float32)
        self.before = self.left(None)

    def left(self, network: nn.Module | None) -> float:
        """Means over people; None: of the portraits as they are."""
        import torch

        found = []
        with torch.no_grad():
            for batch in self.batches:
                images = batch.images
                if network is not None:
                    images = batch.protected(network(*batch.seen()).float())
                trip = batch.protector.config.load_vae().round_trip(images)
                similarity = face_similarity_to([self.judge], batch.images, batch.boxes)
                found.append(self.judge.left(similarity(trip)))
        return float(torch.cat(found).mean())


# ---------------------------------------------------------------------------------------------------------
# training


class Training:
    """A network on its way: its weights, their average, and the optimizer's state.

    Continues from an earlier run's checkpoint. Raises UserError for another training's.
    """

    def __init__(self, plan: Plan, protector: Protector, directory: Path) -> None:
        import torch

        from models.protector import KINDS

        self.plan, self.protector, self.directory = plan, protector, directory
        device, form = protector.device, plan.form()
        torch.manual_seed(plan.seed)
        network = KINDS[form.pop("kind")](**form)
        self.network = network.to(device, memory_format=utils.memory_format(device))
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=plan.rate, weight_decay=0.0)
        self.step = 0
        settings = protector.settings()
        self.facts = {  # of the config.json; a checkpoint of another training isn't used
            "method": protector.name,
            "vae": [recorded(one.vae) for one in protector.attacked],
            "recognizers": [identity(member) for member in protector.config.recognizers],
            "rms": rms_of(protector),
            "budgets": list(plan.budgets),
            "augment": plan.augment,
            "sides": plan.sides,
            "settings": [f"{key} {value}" for key, value in settings.items() if key != "attack_budget"],
        }
        self.about = json.dumps([plan.form(), plan.frame, self.facts])  # what a checkpoint is of
        self.parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        if (path := directory / CHECKPOINT).exists():
            state = torch.load(path, map_location=device, weights_only=True)
            if state["about"] != self.about:
                raise UserError(f"{path} is of another network, method or model; choose another --output_dir")
            self.step = state["step"]
            for name, part in self.parts.items():
                part.load_state_dict(state[name])

    def save(self) -> None:
        """Writes the checkpoint, and the averaged network in float16, each whole or not at all."""
        import torch
        from safetensors.torch import save

        path = self.directory / CHECKPOINT
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"step": self.step, "about": self.about}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        halves = {key: value.half().contiguous().cpu() for key, value in self.average.state_dict().items()}
        utils.write_file(self.directory / "network" / "model.safetensors", save(halves))
        trained = {**self.facts, "steps": self.step}
        config = {"network": self.plan.form(), "trained": trained, "frame": self.plan.frame}
        utils.write_file(self.directory / "network" / "config.json", json.dumps(config, indent=1).encode())

    def turn(self, loss_of: Any, share: float) -> float:
        """Takes one step of AdamW; share: of the training that is over, for the rate's cosine -> the loss."""
        import torch

        rate = min(1, 0.02 + 20 * share) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1, share))) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * rate
        half = self.protector.config.dtype
        with torch.autocast(self.protector.device.type, half, enabled=half == torch.bfloat16):
            loss = loss_of(self.network)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(DECAY, (self.step + 1) / (self.step + 10))
        now = self.network.state_dict()
        for name, mean in self.average.state_dict().items():
            mean.lerp_(now[name], 1 - decay)
        return float(loss.detach())


def train(training: Training, people: People, validation: Validation | None) -> None:
    """Trains for the plan's steps; saves and logs at intervals."""
    plan, protector, directory = training.plan, training.protector, training.directory
    draw = random.Random(f"{plan.seed} {training.step}")
    warm = min(plan.warm_steps, plan.steps) if plan.pairs else 0
    pairs = []
    if training.step < warm:
        pairs = list(make_pairs(people, plan, draw))
        log(directory, f"{plan.batch_size * len(pairs)} pairs made by {protector.name}'s loop")
    began, losses = time.perf_counter(), []
    while training.step < plan.steps:
        if is_warm := training.step < warm:
            loss_of = partial(imitation_loss, batch=draw.choice(pairs))
        else:
            batch = people.drawn(draw, plan)
            loss_of = partial(method_loss, batch=batch, seeds=[draw.randrange(2**31) for _ in batch.boxes])
        share = training.step / warm if is_warm else (training.step - warm) / (plan.steps - warm)
        losses.append(training.turn(loss_of, share))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss is not finite after {training.step} steps; try --dtype fp32")
        spent = time.perf_counter() - began
        if spent >= 60 * plan.save_minutes or training.step in (warm, plan.steps):
            pace = spent / len(losses)
            text = f"step {training.step} of {plan.steps}"
            text += f"  {'imitation' if is_warm else 'loss'} {sum(losses) / len(losses):.4g}"
            if validation:
                left = validation.left(training.average)
                text += f"  left {left:.3f} of {validation.before:.3f} ({validation.judge.name})"
            log(directory, f"{text}  {pace:.2f} s/step")
            training.save()
            began, losses = time.perf_counter(), []


def log(directory: Path, text: str) -> None:
    """Prints a line and appends it to the log, with the time."""
    print(text, flush=True)
    with open(directory / LOG, "a") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def begin_mixture(training: Training, people: People, draw: random.Random) -> None:
    """Puts a mixture's centres among the training people: k-means of the faces' fields."""
    import torch
    from scipy.cluster.vq import kmeans2

    from models.protector import fields

    plan = training.plan
    some = draw.sample(people.subjects, min(1000, len(people.subjects)))
    batches = (people.batch([subject], plan.budgets[:1]) for subject in some)
    faces = torch.cat([fields(batch.images, batch.budget) for batch in batches])  # (N, D)
    first = faces[torch.linspace(0, len(faces) - 1, plan.patterns).long()]
    centres, _ = kmeans2(faces.cpu().numpy(), first.cpu().numpy(), minit="matrix")
    for one in (training.network, training.average):
        one.centres.copy_(torch.from_numpy(centres))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    some, path = utils.positive_int, utils.path
    parser.add_argument("--image_dir", type=path, required=True, help="directory of training portraits")
    parser.add_argument("--validation_dir", type=path, help="portraits of other people, to watch")
    parser.add_argument("--output_dir", type=path, required=True, help="where network/ is made")
    parser.add_argument("--network", choices=NETWORKS, default="unet", help="or stored patterns, to compare")
    text = "of each of the U-Net's levels, multiples of 8"
    parser.add_argument("--channels", type=some, nargs="+", default=(64, 96, 128), help=text)
    parser.add_argument("--depths", type=some, nargs="+", default=(1, 1, 2), help="blocks of each level")
    parser.add_argument("--patterns", type=some, default=8, help="of a mixture")
    parser.add_argument("--pattern_size", type=some, default=128, help="their side in px")
    text = "the smallest and the largest that it learns, instead of --attack_budget"
    size = {"type": utils.budget_size, "metavar": ("LOW", "HIGH"), "nargs": 2}
    parser.add_argument("--budgets", **size, default=(0.03, 0.12), help=text)
    parser.add_argument("--steps", type=some, default=4000, help="also the length of the rate's cosine")
    parser.add_argument("--batch_size", type=some, default=8, help="portraits per step")
    text = "px of the square in which it sees each face, 5/3 as wide (default: it sees the whole picture)"
    side = utils.number(int, 32, 1024, "a whole number from 32 to 1024")
    parser.add_argument("--frame", type=side, help=text)
    text = "px at which frames go through the autoencoder, drawn for each batch (default: --resolution)"
    parser.add_argument("--sides", type=side, nargs="+", help=text)
    text = "what happens to the portraits before, like --transforms, a chain for each batch"
    parser.add_argument("--augment", type=transform_names, default="none", help=text)
    positive = utils.positive_float
    parser.add_argument("--rate", type=positive, default=5e-4, help="highest learning rate of AdamW")
    parser.add_argument("--pairs", type=utils.natural_number, default=0, help="to imitate first; 0: none")
    parser.add_argument("--warm_steps", type=some, default=200, help="of imitation")
    parser.add_argument("--save_minutes", type=positive, default=5.0, help="between two checkpoints")
    add_defense_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return utils.run_command(run, parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Trains the network that the flags name -> exit status. Raises UserError."""
    if args.method in ("noise", "instant"):
        raise UserError(f"{args.method} has no objective that a network could learn")
    if len(args.channels) != len(args.depths) or any(channels % 8 for channels in args.channels):
        raise UserError("--channels and --depths: as many of each, and channels are multiples of 8")
    if args.sides and not args.frame:
        raise UserError("--sides are those of frames: give --frame")
    from models.norms import quicken

    args.seed = utils.draw_seed(args.seed)
    plan = Plan(**{name: getattr(args, name) for name in Plan.__dataclass_fields__})
    utils.check_directory(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    mask = args.budget_mask or METHODS["instant"].mask
    sides = args.sides or [args.resolution]
    protectors = [Protector(settings_of(args), budget_mask=mask, resolution=side) for side in sides]
    protector = protectors[0]
    protector.preload()
    if protector.device.type == "cpu" and "vae" in protector.needs and not protector.wanted.compile:
        for one in itertools.chain(*(each.attacked for each in protectors)):
            quicken(one.load_vae().vae)
    people, held_out = People(args.image_dir, protectors, plan), args.validation_dir
    validation = Validation(People(held_out, protectors, plan), plan) if held_out else None
    training = Training(plan, protector, args.output_dir)
    if plan.network == "mixture" and not training.step:
        begin_mixture(training, people, random.Random(plan.seed))
    if protector.device.type == "cpu":
        quicken(training.network)
    count = sum(values.numel() for values in training.network.parameters())
    text = f"{count / 1e6:.2f} M parameters, {len(people.subjects)} portraits, from step {training.step}"
    log(args.output_dir, text)
    train(training, people, validation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
