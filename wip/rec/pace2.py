import sys; sys.path.insert(0,'/work/world/mini')
import torch, time; torch.set_num_threads(1)
import train_recognizer as t
from transformers import *
def clock(f,n=5):
    f(); b=time.process_time()
    for _ in range(n): f()
    return round((time.process_time()-b)/n,3)
c=torch.randn(64,3,64,64); y=torch.randint(3000,(64,))
def run(bb,cl,bf):
    m=t.CosFace(bb,3000); x=c
    if cl: m=m.to(memory_format=torch.channels_last); x=c.to(memory_format=torch.channels_last)
    def step():
        with torch.autocast('cpu',dtype=torch.bfloat16,enabled=bf): l,_=m(x,y)
        l.backward()
    return clock(step)
def cn(h,d,p=4): return ConvNextModel(ConvNextConfig(image_size=64,patch_size=p,hidden_sizes=h,depths=d,layer_scale_init_value=.1))
for cl in (0,1):
    for bf in (False,True):
        print("cl",cl,"bf",bf,"rec",run(t.build(False),cl,bf),"judge",run(t.build(True),cl,bf), flush=True)
prof=t.CosFace(t.build(True),3000)
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CPU]) as pr:
    with torch.autocast('cpu',dtype=torch.bfloat16): l,_=prof(c,y)
    l.backward()
print(pr.key_averages().table(sort_by="self_cpu_time_total",row_limit=10,max_name_column_width=40))
