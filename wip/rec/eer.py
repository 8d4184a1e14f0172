import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import numpy as np, portraits, crops, world, train_recognizer as t
from models.faces import load_recognizer
ids=portraits.VALIDATION[:200]
plain=[(i,v,None) for i in ids for v in range(4)]
f=crops.find(plain); none=~f.any(1); print("plain not found", none.sum(), [plain[i] for i in np.where(none)[0]])
fe=crops.find(t.edits_of(ids)); print("edits not found", (~fe.any(1)).mean())
r=load_recognizer('/work/world/assets/mini/'+(sys.argv[1] if len(sys.argv)>1 else 'recognizer'),torch.device('cpu'),torch.float32)
a=t.embed(r,world.render(plain),f); who=torch.arange(200).repeat_interleave(4)
for keep in (torch.ones(800,dtype=bool), torch.from_numpy(~none)):
    p=a[keep]@a[keep].T; w=who[keep]; up=torch.ones_like(p,dtype=torch.bool).triu(1); same=w[:,None]==w
    print(t.equal_error_rate(p[same&up],p[~same&up]), np.quantile(p[~same&up].numpy(),.999), [float((p[same&up]<x).float().mean()) for x in (.5,.532)])
p=a@a.T; p[same.shape[0]:]=p[same.shape[0]:]
p=(a@a.T); p[who[:,None]==who]=-1; v,i=p.flatten().topk(60); print([(int(who[k//800]),int(who[k%800]),round(float(x),2)) for x,k in zip(v,i)][::2])
