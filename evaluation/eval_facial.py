"""FR, how much of the person is left: cosine similarity of the face in an edit to the face in its source.

    python evaluation/eval_facial.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0 --judge assets/mini/judge dlib --models mini
    python evaluation/eval_facial.py --by judge --what identified --gallery_dir people --src_dir portraits \\
        --clean_edit_dir edits/clean --defend_edit_dirs edits/facelock --seed 0
    python evaluation/eval_facial.py --by judge --reference_dir other_photos --src_dir portraits \\
        --clean_edit_dir edits/clean --defend_edit_dirs edits/facelock --seed 0

Writes facial_metric.csv, by the recogniser that attacks see; or, with --by judge or --judge, by those that
no attack sees: facial_JUDGE_metric.csv for each judge of the panel, and left_metric.csv, by the judge that
finds most. The bundled judge, which was trained like the attacked recogniser, counts there only if it is the
only one. FR by cosine is also called ISM, the share of edits without a face FDFR, identified rank-1.

An attacked recogniser overstates the protection, and so does one that was trained like it: report judges that
no attack saw and that others trained. Cosines are comparable only within one recogniser; `left`, which is 1
for the same picture and 0 for a stranger, is comparable between them. Easier to read are the shares of edits
still recognised (above the threshold that one pair of strangers in a thousand exceeds) and identified
(nearest in a gallery: the people themselves, and --gallery_dir). Comparing with the source overestimates
recognition: in life, a person is recognised by other photos. --reference_dir holds them, as NAME.* or NAME/*.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

if not __package__:  # run as a file
    import _path  # noqa: F401

from evaluation.features import face_need
from evaluation.scoring import Metric, Tensor, script
from models.config import TRAINED_HERE, ModelConfig, identity
from utils import UserError


def facial_similarity(embeddings: Tensor, people: Tensor) -> Tensor:
    """Measures the cosine similarity of faces to people, (B, D) of unit length and (B, D) -> (B,).

    A person with several photos is the mean of their embeddings, which gives the mean cosine.
    """
    return (embeddings * people).sum(dim=1)


def left(embeddings: Tensor, people: Tensor, strangers: float | None) -> Tensor:
    """Measures (cosine - strangers' mean cosine) / (1 - the same), (B, D) and (B, D) -> (B,).

    1 is the same picture, 0 a stranger, whatever the recogniser; NaN where the strangers' mean isn't known.
    """
    mean = math.nan if strangers is None else strangers
    return (facial_similarity(embeddings, people) - mean) / (1 - mean)


def recognised(embeddings: Tensor, people: Tensor, threshold: float | None, undetected: Tensor) -> Tensor:
    """Returns whether a face is found and taken for the person's: its similarity is above the recogniser's
    verification threshold. Embeddings (B, D), undetected (B,) -> (B,); NaN for a recogniser without one.
    """
    similarity = facial_similarity(embeddings, people)
    found = (similarity > (threshold or 0)).to(similarity) * (1 - undetected)
    return found + 0 * similarity if threshold is not None else similarity * math.nan


def identified(embeddings: Tensor, people: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """Returns whether the most similar person of a gallery is the edit's own (rank 1).

    Embeddings (B, D), gallery (G, D), own (B, G) -> (B,); NaN where the person has no face.
    """
    nearest = (embeddings @ gallery.T).argmax(dim=1, keepdim=True)  # (B, 1)
    return own.gather(1, nearest)[:, 0].to(embeddings) + 0 * people[:, 0]


def by_any(measure: Callable[..., Tensor], n_judges: int, width: int) -> Callable[..., Tensor]:
    """Makes a function that returns the highest of the judges' values; NaN where no judge has one.

    Its arguments: `width` for each judge, then those that all judges share.
    """

    def highest(*given: Tensor) -> Tensor:
        import torch

        shared = given[n_judges * width :]
        said = [measure(*given[i * width : (i + 1) * width], *shared) for i in range(n_judges)]
        found = torch.stack(said)  # (judges, B)
        most = found.nan_to_num(nan=-math.inf).amax(dim=0)
        return most.where(~found.isnan().all(dim=0), torch.nan)

    return highest


WHATS = {  # --what: the function, what it needs of each recogniser, what all share, its column
    "similarity": (facial_similarity, ("edits", "sources"), (), "facial"),
    "left": (left, ("edits", "sources", "strangers"), (), "left"),
    "recognised": (recognised, ("edits", "sources", "threshold"), ("undetected",), "recognised"),
    "identified": (identified, ("edits", "sources", "gallery"), ("own",), "identified"),
}
TITLES = {"facial": "FR", "identified": "identified (rank-1)"}
NO_FACE = Metric(
    "no_face", "no face (FDFR)", lambda found: found, ("undetected",), counts="no face was found in"
)


def metric_of(what: str, recognizer: str, suffix: str) -> Metric:
    """Makes one of `WHATS` by a recogniser; the column's name and title end in `suffix`."""
    function, own, shared, column = WHATS[what]
    needs = (*(face_need(recognizer, need) for need in own), *shared)
    name = f"{column}_{suffix}" if suffix else column
    return Metric(name, title_of(name), function, needs, judge=suffix or "attacked")


def is_of_faces(name: str) -> bool:
    """Returns whether a column is one of `WHATS`."""
    return name.partition("_")[0] in {column for *_, column in WHATS.values()}


def title_of(name: str) -> str:
    """Writes the title of a column of faces, such as `facial_dlib`."""
    column, _, by = name.partition("_")
    if name == "left":
        by = "hardest judge"
    by = by.replace("by_any", "any judge")
    return f"{TITLES.get(column, column)}{by and f', {by}'} ↓"


def metric_of_panel(what: str, judges: Sequence[str]) -> Metric:
    """Makes `left` of the judge who finds most, or whether any judge recognises or identifies the person."""
    function, own, shared, column = WHATS["left" if what == "similarity" else what]
    needs = (*(face_need(judge, need) for judge in judges for need in own), *shared)
    name, by = (column, "hardest") if column == "left" else (f"{column}_by_any", "any")
    return Metric(name, title_of(name), by_any(function, len(judges), len(own)), needs, judge=by)


def names_of(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Returns the names of the attacked recognisers and of the judges."""
    names = list(config.panel())
    return names[: len(config.recognizers)], names[len(config.recognizers) :]


def counted(config: ModelConfig) -> list[str]:
    """Names the judges that the headline counts: not those trained here, unless there is no other.

    A judge trained here is deceived where its sibling was attacked, and finds more in other edits than judges
    that never saw such portraits: it ranks the methods differently (docs/results.md).
    """
    pairs = zip(names_of(config)[1], config.judges, strict=True)
    return [name for name, member in pairs if identity(member) not in TRAINED_HERE] or names_of(config)[1]


def of_attacked(what: str, names: Sequence[str]) -> list[Metric]:
    """Makes a metric by each attacked recogniser; columns lack the first one's name, except `left_NAME`."""
    named = [name if place or what == "left" else "" for place, name in enumerate(names)]
    return [metric_of(what, *pair) for pair in zip(names, named, strict=True)]


def groups(config: ModelConfig) -> dict[str, list[Metric]]:
    """Lists every metric of faces: the panel's with FDFR, each judge's and the attacked recognisers'."""
    attacked, judges = names_of(config)
    whats = [what for what in WHATS if judges and what != "similarity"]
    found = {"": [*(metric_of_panel(what, counted(config)) for what in whats), NO_FACE]}
    for judge, member in zip(judges, config.judges, strict=True):
        is_sibling = identity(member) in TRAINED_HERE
        who = "trained here, like the attacked recogniser" if is_sibling else "which no attack has seen"
        found[f"judge {judge}, {who}"] = [metric_of(what, judge, judge) for what in WHATS]
    title = f"{' and '.join(attacked)}, which attacks see: no evidence of protection"
    metrics = [metric for what in WHATS if what != "left" for metric in of_attacked(what, attacked)]
    return found | {title: metrics}


def choose(args: argparse.Namespace, config: ModelConfig) -> list[Metric]:
    """Lists the metrics that --by and --what ask for. Raises UserError."""
    attacked, judges = names_of(config)
    if args.by == "recognizer" or (args.by is None and not args.judge):
        return of_attacked(args.what, attacked)
    if not judges:
        raise UserError("no judge is left: the attack sees all of them; name others with --judge")
    own = [metric_of(args.what, judge, judge) for judge in judges]
    return [metric_of_panel(args.what, counted(config)), *own]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --by and --what."""
    text = "whose embeddings are compared (default: recognizer, but judge if --judge names some)"
    parser.add_argument("--by", choices=("recognizer", "judge"), help=text)
    text = "what is measured with them"
    parser.add_argument("--what", choices=tuple(WHATS), default="similarity", help=text)


METRIC = metric_of("similarity", "recognizer", "")
parse_args, main = script(METRIC, __doc__, choose=choose, add_arguments=add_arguments, also=[NO_FACE])

if __name__ == "__main__":
    sys.exit(main())
