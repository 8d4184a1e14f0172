import train2, common, torch, gain, sys
x=train2.valid("valid40")
from common import psnr
for f in sys.argv[1:]:
    v=common.load(f); print(f, v.config.latent_channels, train2.rec(v,x), flush=True)
