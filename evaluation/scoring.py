"""Scoring: each file is read once and given to all metrics."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from directories import Row
from pairing import Edits, Key
from views import PIXELS, Metric, View, load_views

import utils
from images import load_image, to_tensor
from models.sets import Chosen
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
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
    import numpy as np
    from tqdm import tqdm

    needs = {need for metric in metrics for need in metric.needs}
    _check_sizes(edits, max(metric.smallest for metric in metrics))
    if "clip_texts" in needs:
        edits.check_texts()
    texts = {number: edits.texts.get(number, "") for number in edits.prompts}
    views, rows, damaged = load_views(needs, chosen, texts, edits.gallery), rows_of(edits, metrics), []
    keys = _learn_sources(edits, views, damaged)
    place = {key: number for number, key in enumerate(edits.keys)}
    values = np.full((len(rows), len(edits.keys), len(metrics)), np.nan)
    n_scored = 0
    with tqdm(total=len(keys), unit="edit", leave=False) as bar:
        for batch in _batches(edits, keys, batch_size):
            loaded, images = _read(edits, batch, damaged)
            bar.update(len(batch))
            n_scored += len(loaded)
            if not loaded:
                continue
            at = [place[key] for key in loaded]
            clean = to_tensor(images[edits.clean]) if "clean" in needs else None
            for number, row in enumerate(rows):
                seen = {"edits": to_tensor(images[row]), "clean": clean} if needs & PIXELS else {}
                for view in views:
                    seen |= view(images[row], loaded)
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
    import numpy as np
    import pandas as pd

    def category(texts: Sequence[str], codes: np.ndarray) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, pd.Index(texts, dtype=object))

    there = ~np.isnan(values)
    row, key, metric = np.nonzero(there)
    name, names = pd.factorize(np.array([key.name for key in keys], dtype=object), sort=True)
    return pd.DataFrame(
        {
            "method": category(methods, row),
            "seed": np.array([key.seed for key in keys])[key],
            "prompt": np.array([key.prompt for key in keys], dtype=np.int32)[key],
            "name": category(names, name[key]),
            "metric": category(metrics, metric),
            "value": values[there],
        }
    )


def _check_sizes(edits: Edits, smallest: int) -> None:
    """Raises UserError for images too small for a metric."""
    for key, size in edits.sizes.items():
        if size and min(size) < smallest:
            path = edits.path(edits.rows[0], key)
            raise UserError(f"{path} is {size[1]}x{size[0]}; sides of at least {smallest} px are needed")


def _learn_sources(edits: Edits, views: Sequence[View], damaged: list[str]) -> list[Key]:
    """Shows every source to the views, at the sizes of its edits -> the keys whose source can be read."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    wanted = defaultdict(set)
    for key, size in edits.sizes.items():
        wanted[key.name].add(size)
    unread = set()
    for name, path in tqdm(edits.sources.items(), unit="source", leave=False, disable=not edits.sources):
        try:
            pixels = load_image(path).pixels
        except UserError as error:
            damaged.append(str(error))
            unread.add(name)
            continue
        for size in sorted(wanted[name] - {None}):
            at_size = pixels
            if size != pixels.shape[:2]:
                at_size = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            for view in views:
                view.add_source(name, np.array(at_size))
    return [key for key in edits.keys if key.name not in unread]


def _batches(edits: Edits, keys: Sequence[Key], batch_size: int) -> Iterator[list[Key]]:
    """Cuts keys into batches of edits of one size."""
    groups = defaultdict(list)
    for key in keys:
        groups[edits.sizes[key]].append(key)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _read(edits: Edits, batch: Sequence[Key], damaged: list[str]) -> tuple[list[Key], dict[Row, np.ndarray]]:
    """Reads the edits of a batch -> keys that can be read in every row, and each row's (B, H, W, 3)."""
    import numpy as np

    read: dict[Key, dict[Row, np.ndarray]] = {}
    for key in batch:
        found = {}
        for row in edits.every_row:
            path = edits.path(row, key)
            try:
                pixels = load_image(path).pixels
                if pixels.shape[:2] != edits.sizes[key]:
                    raise UserError(f"{path}: its size is not what its header says")
                found[row] = pixels
            except UserError as error:
                damaged.append(str(error))
        if len(found) == len(edits.every_row):
            read[key] = found
    rows = edits.every_row if read else []
    return list(read), {row: np.stack([found[row] for found in read.values()]) for row in rows}
