"""FR, how much of the person is left: cosine similarity of the face in an edit to the face in its source.

    python evaluation/eval_facial.py --by judge --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0
    python evaluation/eval_facial.py --by judge --what identified --gallery_dir people --src_dir portraits \\
        --clean_edit_dir edits/clean --defend_edit_dirs edits/facelock --seed 0

Writes facial_metric.csv, or facial_judge_metric.csv (recognised_..., identified_...), into the working
directory. facelock optimises the recogniser itself, so what it says overstates the protection: report the
judge's, which no attack sees, beside it. Similarities compare only within one recogniser; what people can
read is the share of edits that are still recognised (above the threshold at which one pair of strangers in a
thousand passes) and identified (nearest in a gallery: the sources, and --gallery_dir).
"""

import math
import sys

from scoring import Metric, Tensor, script


def facial_similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Measures the cosine similarity of face embeddings, (B, D) and (B, D) -> (B,)."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(embeddings, references, dim=1)


def recognised(embeddings: Tensor, references: Tensor, undetected: Tensor, threshold: float | None) -> Tensor:
    """Tells whether a face is found and taken for the source's: its similarity is above the recogniser's
    verification threshold. Embeddings (B, D), undetected (B,) -> (B,); NaN for a recogniser without one.
    """
    similarity = facial_similarity(embeddings, references)
    found = (similarity > (threshold or 0)).to(similarity) * (1 - undetected)
    return found + 0 * similarity if threshold is not None else similarity * math.nan


def identified(embeddings: Tensor, references: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """Tells whether the most similar portrait of a gallery is the person's own (rank 1).

    Embeddings (B, D), gallery (G, D), own (B, G) -> (B,); NaN where the source has no face.
    """
    nearest = (embeddings @ gallery.T).argmax(dim=1, keepdim=True)  # (B, 1)
    return own.gather(1, nearest)[:, 0].to(embeddings) + 0 * references[:, 0]


def metrics_by(who: str, suffix: str, title: str) -> dict[str, Metric]:
    """Makes the three metrics of a recogniser: by --what."""
    faces = (f"{who}_edits", f"{who}_sources")
    verified, nearest = (*faces, "undetected", f"{who}_threshold"), (*faces, f"{who}_gallery", "own")
    return {
        "similarity": Metric(f"facial{suffix}", f"FR{title} ↓", facial_similarity, faces),
        "recognised": Metric(f"recognised{suffix}", f"recognised{title} ↓", recognised, verified),
        "identified": Metric(f"identified{suffix}", f"identified{title} ↓", identified, nearest),
    }


BY = {"recognizer": metrics_by("recognizer", "", ""), "judge": metrics_by("judge", "_judge", ", judge")}
NO_FACE = Metric("no_face", "no face", lambda found: found, ("undetected",), counts="no face was found in")
METRICS = [*BY["recognizer"].values(), *BY["judge"].values(), NO_FACE]
parse_args, main = script(BY["recognizer"]["similarity"], __doc__, by=BY, also=[NO_FACE])

if __name__ == "__main__":
    sys.exit(main())
