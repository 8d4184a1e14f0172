import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import crops, world, train_recognizer as t, time
r=t.training_requests(range(50000, 50000+int(sys.argv[1])), int(sys.argv[2]), 1000)
b=time.time(); world.render(r, 1); print("rendered", time.time()-b, flush=True)
f=crops.find(r, 1); print(time.time()-b, "found", (f[:,2]>0).mean(), flush=True)
