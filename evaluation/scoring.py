"""Scoring: each file is read once and given to all metrics."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from directories import Row
from pairing import Edits, Key
from PIL import Image
from views import Metric, View, load_views

import utils
from images import load_image, to_tensor
from models.sets import Chosen
from runs import batches
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Scores:
    """The values, and what could not be measured."""

    metrics: Sequence[Metric]
    values: pd.DataFrame  # method, seed, prompt, name, metric, value; without NaN
    damaged: list[str]  # what can't be read
    problems: list[str]  # other reasons for what isn't there
    n_edits: int  # of each row, that should have been scored
    n_left_out: int  # of them, since they or their source can't be read in some row

    def report(self, what: str = "edits") -> int:
        """Says what could not be measured -> exit status: 1 if there is anything. what: is scored."""
        for metric in (metric for metric in self.metrics if metric.counts):
            of_metric = self.values[self.values["metric"] == metric.name]
            for row, found in of_metric.groupby("method", observed=True)["value"]:
                if count := int(found.sum()):
                    print(utils.one_line(f"{row}: {metric.counts} {count} of {len(found)} edits"))
        for line in (*self.problems, *(f"damaged: {line}" for line in self.damaged)):
            print(utils.one_line(line), file=sys.stderr)
        if self.n_left_out:
            print(f"{self.n_left_out} of {self.n_edits} {what} are left out of every row", file=sys.stderr)
        return 1 if self.damaged or self.problems else 0


def rows_of(edits: Edits, metrics: Sequence[Metric]) -> list[Row]:
    """Lists the rows of a table: the clean edits are one where something is compared with the sources."""
    return edits.every_row if any(metric.is_of_source for metric in metrics) else edits.rows


def score(
    edits: Edits, metrics: Sequence[Metric], chosen: Chosen | None = None, batch_size: int = 16
) -> Scores:
    """Reads each file once and gives it to all metrics; images are not kept.

    An image that can't be read is left out of every row alike. Raises UserError for edits too small for a
    metric, instructions that are not known, and if nothing can be scored.
    """
    from tqdm import tqdm

    needs = {need for metric in metrics for need in metric.needs}
    smallest = max(metric.smallest for metric in metrics)
    for key, size in edits.sizes.items():
        if size and min(size) < smallest:
            path = edits.path(edits.rows[0], key)
            raise UserError(f"{path} is {size[1]}x{size[0]}; sides of at least {smallest} px are needed")
    if "clip_texts" in needs:
        edits.check_texts()
    texts = {number: edits.texts.get(number, "") for number in edits.prompts}
    views, rows, damaged = load_views(needs, chosen, texts, edits.gallery), rows_of(edits, metrics), []
    keys = _learn_sources(edits, views, damaged)
    place = {key: number for number, key in enumerate(edits.keys)}
    values = np.full((len(rows), len(edits.keys), len(metrics)), np.nan)
    n_scored = 0
    with tqdm(total=len(keys), unit="edit", leave=False) as bar:
        for batch in batches(keys, batch_size, edits.sizes.get):
            loaded = _read(edits, batch, damaged)
            bar.update(len(batch))
            n_scored += len(loaded)
            if not loaded:
                continue
            at = [place[key] for key in loaded]
            of_rows = zip(edits.every_row, map(np.stack, zip(*loaded.values(), strict=True)), strict=True)
            images = dict(of_rows)  # (B, H, W, 3) each
            clean = to_tensor(images[edits.clean]) if "clean" in needs else None
            for number, row in enumerate(rows):
                seen = {"edits": to_tensor(images[row]), "clean": clean}
                for view in views:
                    seen |= view(images[row], list(loaded))
                for column, metric in enumerate(metrics):
                    if metric.is_of_source or row != edits.clean:
                        found = metric.function(*(seen[need] for need in metric.needs))
                        values[number, at, column] = found.cpu().numpy()
    problems = [problem for view in views for problem in view.problems]
    if np.isnan(values).all():
        raise UserError(f"nothing could be scored: {'; '.join([*damaged, *problems][:3])}")
    frame = _long(values, [row.method for row in rows], edits.keys, [metric.name for metric in metrics])
    return Scores(metrics, frame, damaged, problems, len(edits.keys), len(edits.keys) - n_scored)


def _long(
    values: np.ndarray, methods: Sequence[str], keys: Sequence[Key], metrics: Sequence[str]
) -> pd.DataFrame:
    """(rows, edits, metrics) -> a line a value; categories, in this order, which cost a byte or two each."""
    import pandas as pd

    def category(texts: Sequence[str], codes: np.ndarray) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, pd.Index(texts, dtype=object))

    row, key, metric = np.nonzero(~np.isnan(values))
    seeds, prompts, names = zip(*keys, strict=True)
    code, names = pd.factorize(np.array(names, dtype=object), sort=True)
    columns = {
        "method": category(methods, row),
        "seed": np.array(seeds)[key],
        "prompt": np.array(prompts, dtype=np.int32)[key],
        "name": category(names, code[key]),
        "metric": category(metrics, metric),
        "value": values[row, key, metric],
    }
    return pd.DataFrame(columns)


def _learn_sources(edits: Edits, views: Sequence[View], damaged: list[str]) -> list[Key]:
    """Shows every source to the views, at the sizes of its edits -> the keys whose source can be read."""
    from tqdm import tqdm

    wanted = defaultdict(set)
    for key, size in edits.sizes.items():
        wanted[key.name].add(size)
    unread = set()
    for name, path in tqdm(edits.sources.items(), unit="source", leave=False, disable=not edits.sources):
        try:
            source = Image.fromarray(load_image(path).pixels)
        except UserError as error:
            damaged.append(str(error))
            unread.add(name)
            continue
        for height, width in sorted(wanted[name] - {None}):
            at_size = source.resize((width, height), Image.Resampling.BICUBIC)  # none, if it has that size
            for view in views:
                view.add_source(name, np.array(at_size))
    return [key for key in edits.keys if key.name not in unread]


def _read(edits: Edits, batch: Sequence[Key], damaged: list[str]) -> dict[Key, list[np.ndarray]]:
    """Reads the edits of a batch -> those that can be read in every row: (H, W, 3) of each row."""
    read = {}
    for key in batch:
        found = []
        for row in edits.every_row:
            path = edits.path(row, key)
            try:
                pixels = load_image(path).pixels
                if pixels.shape[:2] != edits.sizes[key]:
                    raise UserError(f"{path}: its size is not what its header says")
                found.append(pixels)
            except UserError as error:
                damaged.append(str(error))
        if len(found) == len(edits.every_row):
            read[key] = found
    return read
