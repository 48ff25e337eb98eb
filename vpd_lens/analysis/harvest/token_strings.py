"""Tokens as text, stored with a harvest so that it can be shown without the model."""

from __future__ import annotations

from typing import Any


def token_strings(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every token id, leading spaces included.

    A token that is part of a character only, which has no text of its own, is written as the
    tokenizer's vocabulary does; one without any text, or without a tokenizer, as its id in angle
    brackets.

    Args:
        tokenizer: A Hugging Face tokenizer, or `None`.
        vocabulary: Number of ids; models may have more than their tokenizer.
    """
    if tokenizer is None:
        return [f"<{token}>" for token in range(vocabulary)]
    ids = list(range(min(len(tokenizer), vocabulary)))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    known = [_one(*parts) for parts in zip(ids, texts, pieces, strict=True)]
    return known + [f"<{token}>" for token in range(len(ids), vocabulary)]


def _one(token: int, text: str, piece: str | None) -> str:
    piece = piece or f"<{token}>"
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return piece
    # SentencePiece drops the space in front of the first token that it decodes.
    return " " + text if piece.startswith("▁") and not text.startswith(" ") else text
