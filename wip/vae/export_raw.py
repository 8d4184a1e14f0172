"""The averaged weights of NAME.pt without standardising: models/NAMEraw, and the latents' statistics."""
import sys
import common, torch, train_fragile
name, channels = sys.argv[1], int(sys.argv[2])
state = torch.load(common.STUDY / f"{name}.pt", map_location="cpu", weights_only=True)
vae = train_fragile.build((16, 32, 64, 64), 2, channels)
vae.load_state_dict({k.removeprefix("module."): v for k, v in state["average"].items() if k != "n_averaged"})
vae.eval().requires_grad_(False)
flat, _ = common.training_pictures()
x = torch.from_numpy(flat[:200].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
z = torch.cat([vae.encode(p).latent_dist.mode() for p in x.split(20)]).transpose(0, 1).flatten(1)
print(name, state["step"], "mean", [round(v, 2) for v in z.mean(1).tolist()], "std", [round(v, 2) for v in z.std(1).tolist()])
vae.save_pretrained(common.STUDY / "models" / f"{name}raw")
