import json, glob, matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
f, ax = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
for a, k in zip(ax, ("encoder_u@0.06", "encoder_t@0.06", "vae@0.06")):
    for n in ("b1","b2","b3","c1","d1","e1","e2","e3"):
        p=[json.loads(l)["rows"] for l in open(f"{n}.curve.jsonl")]
        a.plot([r["rec"] for r in p],[r[k]["gain"] for r in p],"o-",label=n,ms=3)
    a.set_title(k); a.set_xlabel("reconstruction, dB"); a.axhline(8,c="k",lw=.5); a.axvline(28,c="k",lw=.5)
ax[0].set_ylabel("gain, dB"); ax[0].legend(); f.tight_layout(); f.savefig("tradeoff.png",dpi=90)
