"""The bundled VAE -> the wanted structure: attention in the middle, two layers a block, 8 channels.

New residual blocks and the attentions start as the identity, the latent keeps its C main components.
"""
import common
import torch
from common import psnr
from diffusers import AutoencoderKL
import gain
import explore as train_fragile

C = int(__import__("sys").argv[1])  # channels
old = common.load(common.BUNDLED)
new = train_fragile.build((16, 32, 64, 64), 2, C)
source, state = old.state_dict(), new.state_dict()
with torch.no_grad():
    flat, _ = common.training_pictures()
    x = torch.from_numpy(flat[:200].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.cat([old.encode(p).latent_dist.mode() for p in x.split(20)]).transpose(0, 1).flatten(1)
    # components by what they change in the picture: the decoder's first-order gain of each channel
    cov = torch.cov(z.double())
    w = source["post_quant_conv.weight"][:, :, 0, 0].double()  # (16, 16)
    values, vectors = torch.linalg.eigh(cov)
    v = vectors.flip(1)[:, :C].T.float()  # (8, 16)
    print("variance kept", (values.flip(0)[:C].sum() / values.sum()).item())
    for key, value in state.items():
        if key in ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias"):
            continue
        if "encoder.conv_out" in key or "decoder.conv_in" in key:
            continue
        other = source.get(key)
        if other is not None and other.shape == value.shape:
            state[key] = other.clone()
        elif "resnets" in key and "conv2" in key:
            state[key] = torch.zeros_like(value)
        elif "attentions" in key and "to_out" in key:
            state[key] = torch.zeros_like(value)
        else:
            print("left at random", key, tuple(value.shape), None if other is None else tuple(other.shape))
    # encoder.conv_out: 2*16 -> 2*8 through quant_conv (32x32 1x1): fold quant into conv_out
    q, qb = source["quant_conv.weight"][:, :, 0, 0], source["quant_conv.bias"]
    m = torch.cat([v @ q[:16], torch.zeros(C, 32)])  # mean rows, logvar rows
    state["encoder.conv_out.weight"] = torch.einsum("oi,iabc->oabc", m, source["encoder.conv_out.weight"])
    state["encoder.conv_out.bias"] = m @ source["encoder.conv_out.bias"] + torch.cat([v @ qb[:16], torch.full((C,), -7.0)])
    state["quant_conv.weight"] = torch.eye(2 * C)[:, :, None, None]
    state["quant_conv.bias"] = torch.zeros(2 * C)
    p, pb = source["post_quant_conv.weight"][:, :, 0, 0], source["post_quant_conv.bias"]
    state["post_quant_conv.weight"] = torch.eye(C)[:, :, None, None]
    state["post_quant_conv.bias"] = torch.zeros(C)
    n = p @ v.T  # (16, 8)
    state["decoder.conv_in.weight"] = torch.einsum("oiab,ij->ojab", source["decoder.conv_in.weight"], n)
    # a bias before a padded convolution is a map; its centre is close enough to start from
    state["decoder.conv_in.bias"] = source["decoder.conv_in.bias"] + torch.einsum("oiab,i->o", source["decoder.conv_in.weight"], pb)
new.load_state_dict(state)
new.eval()
x = common.people(4)
print("rec", psnr(x, gain.reconstruct(old, x)).mean(), "->", psnr(x, gain.reconstruct(new, x)).mean())
train_fragile.standardise(new.requires_grad_(False), flat[:500])
print("rec", psnr(x, gain.reconstruct(new, x)).mean())
new.save_pretrained(common.STUDY / "models" / f"surgery{C}")
print(sum(p.numel() for p in new.parameters()) / 1e6, "M")
