"""Standardises a folder's latents on training pictures: python standardise.py FROM TO"""
import sys
import common, train2, explore
vae = common.load(sys.argv[1])
explore.standardise(vae, train2.pictures()[:400])
vae.save_pretrained(sys.argv[2])
print("standardised", sys.argv[1], train2.rec(vae, train2.valid("valid40")))
