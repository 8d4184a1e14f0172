import sys; sys.path.insert(0,'/work/world/mini')
import torch; torch.set_num_threads(1)
import portraits, train_recognizer as t
from models.faces import load_recognizer
n=sys.argv[1]
r=load_recognizer('/work/world/assets/mini/'+n,torch.device('cpu'),torch.float32); print(n, r.threshold)
print(t.evaluate(r, portraits.VALIDATION[:200], print))
if len(sys.argv)>2: t.evaluate_altered(r, portraits.VALIDATION[:60], print)
