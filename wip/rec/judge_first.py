import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import crops, world, train_recognizer as t, time
r=t.training_requests(range(50000, 51500), 6, 1000)
b=time.time(); f=crops.find(r, 2); print(time.time()-b, "found", (f[:,2]>0).mean(), flush=True)
