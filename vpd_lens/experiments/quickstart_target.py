"""The quickstart's language model: text, tokenizer, architecture and training, all offline.

The text is the source of Python's own standard library, so the target is the same wherever the
same Python, TransformerLens and PyTorch are installed.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vpd_lens.models import load_model, save_model
from vpd_lens.native import native_transformer

VOCABULARY, CONTEXT = 512, 64
N_CHARACTERS, N_HELD_OUT = 8_000_000, 100_000


def standard_library_text(n_characters: int, seed: int = 0) -> str:
    """Source files of the standard library, in random order, cut to `n_characters`.

    Args:
        n_characters: Length of the text.
        seed: Seed of the order.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [f for f in files if "site-packages" not in f.parts and "test" not in f.parts]
    random.Random(seed).shuffle(files)
    texts, size = [], 0
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size >= n_characters:
            break
    return "\n".join(texts)[:n_characters]


def train_tokenizer(text: str, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, saved to and loaded from `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    special = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special, eos_token=special, pad_token=special
    )
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.nn.Module:
    """A 2-layer transformer with random weights.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
    """
    return native_transformer(
        tokenizer,
        n_layers=2,
        d_model=64,
        n_ctx=CONTEXT,
        d_head=16,
        n_heads=4,
        d_mlp=256,
        d_vocab=VOCABULARY,
        act_fn="gelu_new",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=16,
        seed=seed,
        default_prepend_bos=False,
    )


def train_target(
    model: torch.nn.Module,
    tokens: Int[Tensor, " n_tokens"],
    steps: int,
    seed: int,
    console: Console | None = None,
) -> float:
    """Ordinary next-token training on random windows.

    Args:
        model: The model, trained in place.
        tokens: One stream of tokens.
        steps: AdamW steps on 32 windows each.
        seed: Seed of the windows.
        console: Where a progress bar is drawn, by default the terminal.

    Returns:
        Cross-entropy over the last 100 steps, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    recent = torch.zeros(100)
    for step in track(range(steps), "Training the target", console=console):
        starts = torch.randint(len(tokens) - CONTEXT, (32,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(CONTEXT)]  # [32, 64]
        loss = model(batch, return_type="loss")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent[step % 100] = loss.detach()
    return float(recent.mean())


def get_target(
    folder: Path,
    steps: int,
    seed: int,
    n_characters: int = N_CHARACTERS,
    progress: bool = True,
) -> tuple[torch.nn.Module, Int[Tensor, " n_tokens"], Int[Tensor, "rows 64"]]:
    """The target model with training and held-out tokens; trained once, then loaded.

    Args:
        folder: Where the model is kept; the tokenizer is kept beside it.
        steps: Training steps, if it has to be trained.
        seed: Seed of weights and training.
        n_characters: Length of the text.
        progress: Show a progress bar and the loss reached.

    Returns:
        The model, the stream of training tokens, and held-out rows of the context's length.
    """
    console = Console(quiet=not progress)
    text = standard_library_text(n_characters)
    if not (folder / "model.json").exists():
        tokenizer = train_tokenizer(text[:2_000_000], folder.with_name("tokenizer"))
        model = new_model(tokenizer, seed)
        tokens = tokenise(tokenizer, text)
        loss = train_target(model, tokens[:-N_HELD_OUT], steps, seed, console)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
        save_model(model, folder)
    model = load_model(folder)
    tokens = tokenise(model.tokenizer, text)
    held_out = tokens[-N_HELD_OUT:]
    rows = len(held_out) // CONTEXT
    return model, tokens[:-N_HELD_OUT], held_out[: rows * CONTEXT].view(rows, CONTEXT)


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> Int[Tensor, " n_tokens"]:
    """One long stream of token ids."""
    lines = text.splitlines(keepends=True)
    pieces = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])
