"""models/clip.py: embeddings are the library's own."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from models.clip import load_clip
from models.config import MODEL_SETS

CPU = torch.device("cpu")
F32 = torch.float32


def test_clip_embeds_as_its_library_does():
    """Projected, not normalised, prepared by the model's own processor; alone or in a batch."""
    clip = load_clip(MODEL_SETS["mini"].clip, CPU, F32)
    network = CLIPModel.from_pretrained(MODEL_SETS["mini"].clip, dtype=F32)
    processor = CLIPProcessor.from_pretrained(MODEL_SETS["mini"].clip)
    pictures = np.stack([tiny.portrait((48, 64), seed=k) for k in range(3)])
    texts = ["a beard", "a much longer sentence about a hat that goes on and on"]
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(pixels) for pixels in pictures], return_tensors="pt")
        wanted = network.get_image_features(**inputs).pooler_output
        tokens = processor(text=texts[0], return_tensors="pt")
        of_text = network.get_text_features(**tokens).pooler_output
    found = clip.embed_images(pictures)
    assert found.dtype == F32 and not any(p.requires_grad for p in clip.network.parameters())
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(clip.embed_images(pictures[1:2]), found[1:2], atol=1e-5)
    assert torch.allclose(clip.embed_texts(texts)[:1], of_text, atol=1e-5)
    assert clip.embed_texts(["x" * 500]).shape == (1, 128)
