import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import crops, world, train_recognizer as t, time
name=sys.argv[1]; seed, first = (1000, 50000) if name=='judge' else (0, 0)
r=t.training_requests(range(first, first+3000), 8, seed)
b=time.time(); f=crops.find(r, int(sys.argv[2])); print(name, time.time()-b, "found", (f[:,2]>0).mean(), "h", (f[:,3]-f[:,1])[f[:,2]>0].mean(), "w",(f[:,2]-f[:,0])[f[:,2]>0].mean(), flush=True)
