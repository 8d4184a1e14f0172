"""VERSION 2 pictures -> data/NAME.npy, in one process, resumable: python render.py NAME FIRST PEOPLE VARIATIONS [plain] [stop=ROWS]

PEOPLE identities from FIRST, VARIATIONS pictures of each, two of three edited (train_vae.requests); `plain`:
variation 0, no edit. The pixels come from /work/world/mini (portraits.VERSION 2).
"""
import sys
import time
from pathlib import Path

sys.path[:] = [p for p in sys.path if not p.startswith("/work/old") and not p.startswith("/work/study")]
sys.path[:0] = ["/work/world/mini"]
import numpy as np
import portraits

assert portraits.VERSION == 2, portraits.VERSION
DATA = Path(__file__).resolve().parent / "data"


def requests(identities, variations, seed):
    """That of train_vae.py, copied so that torch needn't be imported."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 25, (len(identities), variations))
    plain = rng.random((len(identities), variations)) < 1 / 3
    return [
        (identity, variation, None if plain[row, variation] else int(prompts[row, variation]))
        for row, identity in enumerate(identities)
        for variation in range(variations)
    ]


name, first, people, variations = sys.argv[1], *map(int, sys.argv[2:5])
ids = range(first, first + people)
assert ids[-1] < 50_000 or 100_000 <= ids[0] and ids[-1] < 200_000  # training's half, or validation
wanted = [(i, 0, None) for i in ids] if "plain" in sys.argv else requests(ids, variations, 0)
path, count = DATA / f"{name}.npy", DATA / f"{name}.count"
if path.exists():
    out = np.load(path, mmap_mode="r+")
    done = int(count.read_text())
else:
    out, done = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(wanted), 128, 128, 3)), 0
assert len(out) == len(wanted)
stop = min(len(wanted), int(next((a[5:] for a in sys.argv if a.startswith("stop=")), len(wanted))))
began = time.time()
for row in range(done, stop):
    out[row] = np.asarray(portraits.portrait(*wanted[row]))
    if (row + 1) % 100 == 0 or row + 1 == stop:
        out.flush()
        count.write_text(str(row + 1))
print(name, stop - done, "pictures", round(time.time() - began), "s", flush=True)
