exec(open('/tmp/rec/pace2.py').read().split("for cl in")[0])
for h,d in (([48,96,160,256],[2,2,2,1]),([48,96,160,256],[1,2,2,1]),([48,96,192,256],[1,1,2,1]),([40,80,160,256],[1,1,3,1])):
    b=cn(h,d); print(h,d,run(b,0,True),sum(q.numel() for q in b.parameters())/1e6,flush=True)
