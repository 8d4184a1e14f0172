import common, torch, time
from diffusers import AutoencoderKL
def build(w,layers,ch,attn):
    return AutoencoderKL(down_block_types=["DownEncoderBlock2D"]*4,up_block_types=["UpDecoderBlock2D"]*4,block_out_channels=w,layers_per_block=layers,latent_channels=ch,norm_num_groups=8,sample_size=128,scaling_factor=1.0,force_upcast=False,mid_block_add_attention=attn)
for w,l,ch,at in [((16,32,64,64),1,16,False),((16,32,64,64),2,8,True),((24,48,96,96),2,8,True),((16,48,96,128),2,8,True),((32,64,128,128),2,8,True)]:
    v=build(w,l,ch,at); n=sum(p.numel() for p in v.parameters())/1e6
    r=[]
    for cl in (False,True):
        v=v.to(memory_format=torch.channels_last if cl else torch.contiguous_format)
        x=torch.rand(4,3,128,128)*2-1
        if cl: x=x.to(memory_format=torch.channels_last)
        for i in range(4):
            if i==1: t=time.time()
            with torch.autocast("cpu",dtype=torch.bfloat16):
                y=v.decode(v.encode(x).latent_dist.mode()).sample.float()
                loss=(y-x).abs().mean()
            loss.backward()
        r.append((time.time()-t)/3)
    t=time.time(); v.requires_grad_(False); x1=(torch.rand(1,3,128,128)).requires_grad_(True)
    for i in range(3):
        y=v.decode(v.encode(x1).latent_dist.mode()).sample; torch.autograd.grad(y.square().mean(),x1)
    print(w,l,ch,at,f"{n:.2f}M bf16 4 pictures: {r[0]:.2f} s, channels_last {r[1]:.2f} s; fp32 1 picture input grad {(time.time()-t)/3:.3f}",flush=True)
