import sys; sys.path.insert(0,'/work/world/mini')
import world, train_recognizer as t
seed, first = (1000, 50000) if sys.argv[1]=='judge' else (0, 0)
r=t.training_requests(range(first, first+3000), 8, seed)
import time; b=time.time(); world.render(r, int(sys.argv[2])); print(sys.argv[1], time.time()-b, flush=True)
