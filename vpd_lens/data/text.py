"""Text to tokens: the tokenizer, the BOS and EOS policy, and files of text."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_lens.data.batches import BatchSpec
from vpd_lens.errors import DataError
from vpd_lens.progress import Progress

FIRST = os.environ.get("RANK", "0") == "0"  # one bar for all processes of a job
CHUNK_CHARACTERS = 1 << 20  # per call of the tokenizer: enough for its threads, little memory


class TextEncoder:
    """How documents become tokens: `bos` in front of every row, `end` after every document."""

    def __init__(self, spec: BatchSpec) -> None:
        self.tokenizer = spec.tokenizer
        if self.tokenizer is None:
            raise DataError(
                "source is text, but the model has no tokenizer (model.tokenizer is None). Pass "
                "tokens, or set one with model.set_tokenizer(...)."
            )
        default = getattr(getattr(spec.model, "cfg", None), "default_prepend_bos", True)
        usual = default and self.tokenizer.bos_token_id is not None
        wanted = usual if spec.prepend_bos is None else spec.prepend_bos
        self.bos: int | None = spec.bos if wanted else None
        eos = self.tokenizer.eos_token_id
        self.end = [] if eos is None else [eos]
        self.eos_policy = f"EOS ({eos}) after each" if self.end else "no EOS between them"

    def encode(self, texts: Sequence[str | None]) -> np.ndarray:
        """Tokens of documents, each followed by EOS, one after the other; empty ones left out."""
        documents = self._ids([text for text in texts if text])
        return np.array([token for ids in documents for token in (*ids, *self.end)], np.int64)

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, after BOS if there is one; without EOS."""
        begin = [] if self.bos is None else [self.bos]
        return [np.array([*begin, *ids], np.int64) for ids in self._ids(list(texts))]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # No special tokens: TransformerLens makes many tokenizers add a BOS to each document, and a
        # mention of "<eos>" is no border. Not verbose: long documents are cut into rows later.
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        documents = self.tokenizer(texts, **plain, **only_ids)["input_ids"]
        # Where the vocabulary has no other way to write a control token, its mention is left out.
        control = {getattr(self.tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
        control.discard(getattr(self.tokenizer, "unk_token_id", None))
        return [[token for token in ids if token not in control] for ids in documents]


def tokenize_files(path: Path, encoder: TextEncoder) -> tuple[np.ndarray, str]:
    """One stream `[n_tokens]` (int32, to halve the memory) of all text files, and what it is."""
    files = _files(path)
    pieces: list[np.ndarray] = []
    texts: list[str | None] = []
    waiting = n_skipped = 0
    with Progress(f"Tokenising {path}", len(files), show=len(files) > 1 and FIRST) as bar:
        for file in bar.counting(files):
            texts.append(_read(file))
            waiting += len(texts[-1] or "")
            if waiting >= CHUNK_CHARACTERS or file is files[-1]:
                pieces.append(encoder.encode(texts).astype(np.int32))
                n_skipped += texts.count(None)
                texts, waiting = [], 0
    tokens = np.concatenate(pieces)
    if not len(tokens):
        raise DataError(
            f"source is {path}, but there is no text in it ({len(files)} files, {n_skipped} "
            "of them binary). For Parquet, Arrow or compressed files pass 'hf:DIRECTORY'."
        )
    skipped = f", {n_skipped} binary files skipped" if n_skipped else ""
    return tokens, f"{path}: {len(files) - n_skipped} text files{skipped}, {encoder.eos_policy}"


def _files(path: Path) -> list[Path]:
    """Files in a directory (recursively, hidden ones left out), or matching a glob, in order."""
    if path.is_dir():  # not by glob, which follows links to directories
        parts = {file: file.relative_to(path).parts for file in path.rglob("*")}
        found = [file for file in parts if not any(part.startswith(".") for part in parts[file])]
    else:
        found = [path] if path.exists() else list(map(Path, glob.glob(str(path), recursive=True)))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataError(
            f"source is {path}, but no files are found there. Pass an existing directory or file, "
            "a glob such as 'corpus/**/*.txt', or 'hf:NAME' for a Hugging Face dataset."
        )
    return files


def _read(file: Path) -> str | None:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    return None if "\0" in text else text  # valid UTF-8 with zeros is no text
