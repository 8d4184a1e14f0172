import sys; sys.argv=['x','/work/world/v3.npz']
import numpy as np, torch
exec(open('/work/world/det3.py').read().split('I=lambda')[0])
sys.path.insert(0,'/work/world')
from models.faces import FaceDetector, clip_box
import time
I=lambda x:x; px=ed.reshape(-1,128,128,3)[:500]
b=time.process_time(); theirs=chain([(mt(32),I),(mt(32),sepia),(mt(40),I)],px); print("theirs ms",(time.process_time()-b)/500*1e3)
d=FaceDetector(torch.device('cpu')); b=time.process_time(); ours=d.find(px); print("ours ms",(time.process_time()-b)/500*1e3)
alone=[d(x) for x in px[:100]]
print("alone == batch", sum(a==o for a,o in zip(alone,ours)), "of 100; found", np.mean([bool(o) for o in ours]))
print("same as theirs", sum((not o)==(t is None) and (t is None or clip_box(t[0],(128,128)) in o) for o,t in zip(ours,theirs)))
