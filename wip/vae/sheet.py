import sys, train2, common, torch, gain
from PIL import Image
x=train2.valid("valid40",6)
rows=[x]+[gain.reconstruct(common.load(f),x) for f in sys.argv[2:]]
s=torch.cat([torch.cat(list(r),2) for r in rows],1)
Image.fromarray(((s.permute(1,2,0)+1)*127.5).clamp(0,255).byte().numpy()).save(sys.argv[1])
