"""The tokenizer of a published target: its own file, the one it names, or one of numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from vpd_lens.errors import ArtefactError

# What the authors' tokenizers call the end of a text.
_ENDS = ("<|endoftext|>", "[EOS]", "</s>")


class ParamDecompWarning(UserWarning):
    """Something about a published run could not be taken over, and what happens instead."""


def find_tokenizer(folder: Path, name: str | None, n_tokens: int) -> Any:
    """The `tokenizer.json` of a folder, or else the tokenizer called `name`.

    If that is neither on this machine nor to be had from the hub, or has more than `n_tokens`
    tokens, a warning says so, and a text is the numbers of its tokens: `<17> <4>`.

    Raises:
        ArtefactError: If the folder's file is damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return with_end(PreTrainedTokenizerFast(tokenizer_file=str(file)))
        except Exception as error:  # whatever the tokenizers library makes of a damaged file
            raise ArtefactError(f"{file}: not a tokenizer ({error}). Download it again.") from None
    problem = "its configuration names none"
    if name is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # whatever transformers and the hub's client raise
            problem = f"{name!r} could not be loaded ({type(error).__name__})"
        else:
            if len(tokenizer) <= n_tokens:
                return with_end(tokenizer)
            problem = f"{name!r} has {len(tokenizer)} tokens, the target {n_tokens}"
    warnings.warn(
        f"no tokenizer: there is no {file}, and {problem}. Texts are the numbers of their tokens, "
        "'<17> <4>'; put a tokenizer.json there for words.",
        ParamDecompWarning,
        stacklevel=4,
    )
    return numbers(n_tokens)


def with_end(tokenizer: Any) -> Any:
    """The tokenizer with an end of text from its own vocabulary, which is also BOS and padding.

    Without one, TransformerLens would add a token that the model does not have.
    """
    known = tokenizer.get_vocab()
    end = tokenizer.eos_token or next((e for e in _ENDS if e in known), None)
    end = end or tokenizer.convert_ids_to_tokens(0)
    for name in ("eos_token", "bos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, end)
    return tokenizer


def numbers(n_tokens: int) -> Any:
    """A tokenizer whose tokens are `<0>`, `<1>`, ..., with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(n_tokens)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_end(PreTrainedTokenizerFast(tokenizer_object=inner))
