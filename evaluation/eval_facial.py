"""FR, how much of the person is left: cosine similarity of the face in an edit to the face in its source.

    python evaluation/eval_facial.py --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0
    python evaluation/eval_facial.py --by judge --src_dir portraits --clean_edit_dir edits/clean \\
        --defend_edit_dirs edits/facelock --seed 0

Writes facial_metric.csv, or facial_judge_metric.csv, into the working directory. facelock optimises the
recogniser itself, so FR by the recogniser overstates what it protects: report the judge's, which no attack
sees, beside it. Values compare only within one recogniser.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from command import Metric, script

if TYPE_CHECKING:
    from torch import Tensor


def facial_similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Measures the cosine similarity of face embeddings, (B, D) and (B, D) -> (B,)."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(embeddings, references, dim=1)


METRIC = Metric("facial", "FR ↓", facial_similarity, needs=("recognizer_edits", "recognizer_sources"))
JUDGE = Metric("facial_judge", "FR, judge ↓", facial_similarity, needs=("judge_edits", "judge_sources"))
NO_FACE = Metric(
    "no_face", "no face", lambda found: found, needs=("undetected",), counts="no face was found in"
)
parse_args, main = script(METRIC, __doc__, by={"recognizer": METRIC, "judge": JUDGE}, also=[NO_FACE])

if __name__ == "__main__":
    sys.exit(main())
