"""CLIP, by which CLIP-S and CLIP-I are measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.loading import check_tokenizer, from_hub, hub_way, load_network, loading

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class Clip:
    """A CLIP (Radford et al. 2021): images and texts -> their projected embeddings, not normalised."""

    def __init__(self, network: Any, processor: Any) -> None:
        self.network = network
        self.processor = processor

    def embed_images(self, images: np.ndarray) -> Tensor:
        """Embeds (B, H, W, 3) uint8, resized and standardised by CLIP's own processor -> float32 (B, D)."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        pixels = inputs["pixel_values"].to(self.network.device, self.network.dtype)
        with torch.no_grad():
            return self.network.get_image_features(pixel_values=pixels).pooler_output.float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts -> float32 (B, D); one longer than CLIP reads is cut."""
        import torch

        tokens = self.processor.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            found = self.network.get_text_features(**tokens.to(self.network.device))
        return found.pooler_output.float()


@functools.cache
def load_clip(member: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """Loads a transformers CLIPModel with its processor; cached. Raises UserError."""
    from transformers import CLIPProcessor

    with loading("CLIP", member, hub_way(member)):
        name, where = from_hub(member)
        network = load_network("CLIPModel", name, where, "", device, dtype)
        processor = CLIPProcessor.from_pretrained(name, **where)
        check_tokenizer(processor.tokenizer)
        return Clip(network, processor)
