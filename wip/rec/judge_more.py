import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import numpy as np, os
import crops, world, train_recognizer as t, time
from models.faces import LOOKS
n=int(sys.argv[1])
r=t.training_requests(range(50000, 50000+n), 6, 1000); first=t.training_requests(range(50000, 51500), 6, 1000)
assert r[:9000]==first
more=r[9000:]
b=time.time(); px=world.render(more, 1); print("rendered", time.time()-b, flush=True)
f=crops.find(more, 1); print(time.time()-b, "found", (f[:,2]>0).mean(), flush=True)
data=world.WORK/"data"; key=world.cache_key(r); bkey=world.cache_key(r, repr(LOOKS).encode())
a=np.lib.format.open_memmap(data/f"{key}.tmp", mode="w+", dtype=np.uint8, shape=(len(r),128,128,3))
a[:9000]=world.render(first); a[9000:]=px; a.flush(); os.rename(data/f"{key}.tmp", data/f"{key}.npy")
np.save(data/f"{bkey}.boxes.npy", np.concatenate([crops.find(first,1), f])); print("done", flush=True)
