"""What the tokens of an editor attend to, as the defenses get it: frozen, differentiable, without a pipeline.

A token editor denoises the tokens of a canvas beside those of the image that it is shown and of the words;
in each block of its transformer all of them attend to each other. A latent z is what `WorkingVAE` gives;
z_k = (1 - sigma) s(z) + sigma e is a canvas, with noise e, where s brings z to the diffusion's scale.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.editors import Editor


class Block(NamedTuple):
    """What a block compares: queries and keys, (B, tokens, heads, D), of words, canvas (n) and image (n)."""

    queries: Tensor
    keys: Tensor
    n: int
    checkpointing: bool = False

    def entropy(self, of: str, to: str) -> Tensor:
        """Gives -sum(A log A) of the attention A (B, n, n) that one part pays to another, mean over heads.

        of, to: "canvas" or "image". A row sums to 1 with what its token pays to words and its own part. (B,)
        """
        return self._mean(of, to, lambda a: -(a * (a + 1e-8).log()).sum(dim=(1, 2)))

    def share(self, of: str, to: str) -> Tensor:
        """Gives the share of its attention that one part pays to another, mean over tokens and heads: (B,)"""
        return self._mean(of, to, lambda a: a.sum(dim=2).mean(dim=1))

    def _mean(self, of: str, to: str, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Averages a value (B,) of A over the heads."""
        from torch.utils.checkpoint import checkpoint

        parts = {"canvas": slice(-2 * self.n, -self.n), "image": slice(-self.n, None)}

        def of_head(queries: Tensor, keys: Tensor) -> Tensor:
            scores = queries[:, parts[of]] @ keys.mT / queries.shape[-1] ** 0.5  # (B, n, tokens)
            return value(scores.softmax(dim=-1)[..., parts[to]])

        run = functools.partial(checkpoint, of_head, use_reentrant=False) if self.checkpointing else of_head
        heads = zip(self.queries.unbind(2), self.keys.unbind(2), strict=True)  # one by one: A is large
        return sum(run(*head) for head in heads) / self.queries.shape[2]


class Attention:
    """The attention in FLUX.1 Kontext's transformer, without words; gradients go through z_k and z.

    Runs the transformer in its dtype; attention is computed in that of z_k. double, single: its blocks, where
    words have a stream of their own or share that of the images. Guidance is the editor's default.
    """

    need: ClassVar[str] = "attention"  # what defenses call it
    place: ClassVar[int] = 1  # of the image, on the axis of positions on which a canvas is at 0
    patch: ClassVar[int] = 2  # side of the square of z that is a token

    def __init__(self, editor: Editor, checkpointing: bool = False) -> None:
        """checkpointing: a gradient computes blocks, and the attention of each head, again."""
        self.editor, self.pipeline, self.checkpointing = editor, editor.pipeline, checkpointing
        self.transformer = editor.pipeline.transformer
        self.double: Sequence[nn.Module] = self.transformer.transformer_blocks
        self.single: Sequence[nn.Module] = self.transformer.single_transformer_blocks
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def noised(self, z: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """Noises z (B, C, h, w) as the diffusion does -> z_k. sigma: one for all or (B,), from 0 to 1."""
        share = _for_each(sigma, z).view(-1, 1, 1, 1)
        return (1 - share) * self._scaled(z) + share * noise

    def schedule(self, z: Tensor, steps: int) -> list[float]:
        """Gives the sigmas at which an edit of so many steps runs the transformer, the noisiest first."""
        import numpy as np

        scheduler = copy.deepcopy(self.pipeline.scheduler)
        mu = self._shift(self._tokens(z).shape[1], steps)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        return scheduler.sigmas[:steps].tolist()

    def blocks(
        self, wanted: Sequence[nn.Module], z_k: Tensor, sigma: Tensor | float, z: Tensor
    ) -> list[Block]:
        """Gives blocks, in their order, for canvases z_k at sigma beside images z: all (B, C, h, w).

        The transformer stops where the last of them begins to compare.
        """
        seen: list[tuple[nn.Module, dict[str, Any]]] = []

        def keep(attn: nn.Module, _: tuple, given: dict[str, Any]) -> None:
            seen.append((attn, given))
            if len(seen) == len(wanted):
                raise _Enough

        hooks = [block.attn.register_forward_pre_hook(keep, with_kwargs=True) for block in wanted]
        try:
            self._run(z_k, sigma, z)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        n = self._tokens(z).shape[1]
        pairs = [_compared(attn, **given) for attn, given in seen]
        return [Block(q.to(z_k.dtype), k.to(z_k.dtype), n, self.checkpointing) for q, k in pairs]

    def again(self, z: Tensor, noise: Tensor, share: float, steps: int) -> Tensor:
        """Noises z to a share of an edit's schedule and denoises it by Euler's steps -> like z.

        The transformer is shown no words but z, as in an edit.
        """
        from torch.nn.functional import pixel_shuffle

        sigmas = [*self.schedule(z, max(steps, round(steps / share)))[-steps:], 0.0]
        z_k = self.noised(z, sigmas[0], noise)
        rows, columns = (side // self.patch for side in z.shape[2:])
        for sigma, after in itertools.pairwise(sigmas):
            velocity = self._run(z_k, sigma, z)[0][:, : rows * columns].mT.unflatten(2, (rows, columns))
            z_k = z_k + (after - sigma) * pixel_shuffle(velocity.to(z_k.dtype), self.patch)
        return self._unscaled(z_k)

    def _run(self, z_k: Tensor, sigma: Tensor | float, z: Tensor) -> Any:
        """Runs the transformer on canvases z_k at sigma beside images z -> what it returns."""
        import torch

        parts = [self._tokens(z_k), self._tokens(self._scaled(z))]
        tokens = torch.cat(parts, dim=1).to(self.transformer.dtype)
        positions = torch.cat([self._positions(place, z) for place in (0, self.place)])
        word_positions, words = self._words
        words = {name: part.expand(len(z), *part.shape[1:]) for name, part in words.items()}
        return self.transformer(
            hidden_states=tokens,
            timestep=_for_each(sigma, tokens),
            img_ids=positions.to(z.device),
            txt_ids=word_positions.to(z.device),
            return_dict=False,
            **words,
        )

    def _scaled(self, z: Tensor) -> Tensor:
        """Brings z to the diffusion's scale."""
        config = self.pipeline.vae.config
        return (z - (config.shift_factor or 0)) * config.scaling_factor

    def _unscaled(self, z: Tensor) -> Tensor:
        """Undoes `_scaled`."""
        config = self.pipeline.vae.config
        return z / config.scaling_factor + (config.shift_factor or 0)

    def _tokens(self, z: Tensor) -> Tensor:
        """Gives the tokens of z, (B, n, 4 C) if their side is 2."""
        from torch.nn.functional import pixel_unshuffle

        return pixel_unshuffle(z, self.patch).flatten(2).mT

    def _positions(self, place: int, z: Tensor) -> Tensor:
        """Gives the positions of the tokens of z, (n, 3): place, row, column."""
        import torch

        rows, columns = (torch.arange(side // self.patch) for side in z.shape[2:])
        return torch.cartesian_prod(torch.tensor([place]), rows, columns)

    def _shift(self, n: int, steps: int) -> float:
        """Gives the shift of the schedule for so many tokens."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

        config = self.pipeline.scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(n, *(config[name] for name in names))

    @functools.cached_property
    def _words(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the transformer is given of an empty prompt: positions, (tokens, 3), and (1, ...) each."""
        import torch

        length = self.editor.more(1, 1)["max_sequence_length"]
        with torch.no_grad():
            words, pooled, _ = self.pipeline.encode_prompt("", None, max_sequence_length=length)
        given = {"encoder_hidden_states": words, "pooled_projections": pooled}
        if self.transformer.config.guidance_embeds:
            given["guidance"] = words.new_full((1,), type(self.editor).knobs["guidance_scale"])
        return words.new_zeros(words.shape[1], 3), given


class Flux2Attention(Attention):
    """FLUX.2 [klein]'s."""

    place = 10
    patch = 1  # `Flux2VAE` gives tokens

    def _scaled(self, z: Tensor) -> Tensor:
        return z

    _unscaled = _scaled

    def _positions(self, place: int, z: Tensor) -> Tensor:
        from torch.nn.functional import pad

        return pad(super()._positions(place, z), (0, 1))  # the last axis is that of words

    def _shift(self, n: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(n, steps)

    @functools.cached_property
    def _words(self) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            words = self.pipeline.encode_prompt("")[0]
        places = torch.arange(words.shape[1])[:, None]
        return torch.nn.functional.pad(places, (3, 0)), {"encoder_hidden_states": words}


class _Enough(Exception):
    """All blocks that were asked for have been seen."""


def _for_each(sigma: Tensor | float, like: Tensor) -> Tensor:
    """One sigma for each image of a batch: (B,) of the dtype and device of `like` (B, ...)."""
    import torch

    return torch.as_tensor(sigma).to(like).expand(len(like))


def _compared(
    attn: nn.Module, hidden_states: Tensor, image_rotary_emb: Any, encoder_hidden_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys as a block compares them, of words, canvas and image, from what its attention gets."""
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from torch.nn.functional import linear

    if hasattr(attn, "to_qkv_mlp_proj"):  # of FLUX.2's single blocks, with much that isn't needed
        both = linear(hidden_states, attn.to_qkv_mlp_proj.weight[: 2 * attn.inner_dim]).chunk(2, dim=-1)
    else:
        both = attn.to_q(hidden_states), attn.to_k(hidden_states)

    def by_head(norm: nn.Module, projected: Tensor) -> Tensor:
        return norm(projected.unflatten(-1, (-1, attn.head_dim)))

    queries, keys = by_head(attn.norm_q, both[0]), by_head(attn.norm_k, both[1])
    if encoder_hidden_states is not None:
        words = encoder_hidden_states
        queries = torch.cat([by_head(attn.norm_added_q, attn.add_q_proj(words)), queries], dim=1)
        keys = torch.cat([by_head(attn.norm_added_k, attn.add_k_proj(words)), keys], dim=1)
    return tuple(apply_rotary_emb(each, image_rotary_emb, sequence_dim=1) for each in (queries, keys))
