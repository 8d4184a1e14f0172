"""The small CLIP tokenizer of the mini editors and the mini CLIP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_LENGTH = 32  # tokens, including the start and end tokens; longer texts are cut
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """Builds a byte-level BPE tokenizer with one token for every word of `texts`; only the words matter.

    All 256 bytes are in the vocabulary, so any other text is spelled out rather than lost. As in OpenAI's
    CLIP, text is lower-cased, and the end token is also the padding token and has the largest id.
    """
    rules = CLIPTokenizer().backend_tokenizer  # an empty tokenizer, for its normalisation and word splitting
    words = set()
    for text in texts:
        pieces = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))
        words.update(piece for piece, _ in pieces)
    merges = _learn_merges(sorted(words))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges pairs of bytes until each word is one symbol: the most frequent first, ties alphabetically.

    Written by hand because the trainer of `tokenizers` breaks ties differently in every process, and a
    resumed training must find the ids that it began with.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while True:
        pairs = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelled:
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
