"""The quickstart's language model: text, tokenizer, architecture and training, all offline.

The text is the source of Python's own standard library, so the target is the same wherever the
same Python, TransformerLens and PyTorch are installed.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
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

N_CHARACTERS, N_HELD_OUT = 8_000_000, 100_000


@dataclass(frozen=True)
class TargetSize:
    """Shape of a target and of the batches it is trained on; by default the quickstart's.

    Attributes:
        n_layers: Blocks.
        d_model: Residual width; the MLP is four times as wide.
        n_heads: Attention heads.
        vocabulary: Tokens of its tokenizer.
        context: Tokens per sequence.
        batch_size: Sequences per training step.
    """

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    vocabulary: int = 512
    context: int = 64
    batch_size: int = 32


QUICKSTART = TargetSize()


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


def train_tokenizer(text: str, folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, saved to and loaded from `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
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


def new_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: TargetSize = QUICKSTART
) -> torch.nn.Module:
    """A transformer with random weights.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
        size: Its shape.
    """
    d_head = size.d_model // size.n_heads
    return native_transformer(
        tokenizer,
        n_layers=size.n_layers,
        d_model=size.d_model,
        n_ctx=size.context,
        d_head=d_head,
        n_heads=size.n_heads,
        d_mlp=4 * size.d_model,
        d_vocab=size.vocabulary,
        act_fn="gelu_new",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        seed=seed,
        default_prepend_bos=False,
    )


def train_target(
    model: torch.nn.Module,
    tokens: Int[Tensor, " n_tokens"],
    steps: int,
    seed: int,
    console: Console | None = None,
    batch_size: int = QUICKSTART.batch_size,
    lr: float = 3e-3,
) -> float:
    """Ordinary next-token training on random windows.

    Args:
        model: The model, trained in place.
        tokens: One stream of tokens.
        steps: AdamW steps.
        seed: Seed of the windows.
        console: Where a progress bar is drawn, by default the terminal.
        batch_size: Windows per step.
        lr: Peak learning rate.

    Returns:
        Cross-entropy over the last 100 steps, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    device = next(model.parameters()).device
    context = int(model.cfg.n_ctx)  # type: ignore[arg-type, union-attr]
    recent = torch.zeros(100, device=device)
    for step in track(range(steps), "Training the target", console=console):
        starts = torch.randint(len(tokens) - context, (batch_size,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(context)].to(device)  # [batch, pos]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
        tokenizer = train_tokenizer(
            text[:2_000_000], folder.with_name("tokenizer"), QUICKSTART.vocabulary
        )
        model = new_model(tokenizer, seed)
        tokens = tokenise(tokenizer, text)
        loss = train_target(model, tokens[:-N_HELD_OUT], steps, seed, console)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
        save_model(model, folder)
    model = load_model(folder)
    tokens = tokenise(model.tokenizer, text)
    return model, *split(tokens, QUICKSTART.context)


def split(
    tokens: Int[Tensor, " n_tokens"], context: int
) -> tuple[Int[Tensor, " n_train"], Int[Tensor, "rows context"]]:
    """The stream to train on, and held-out rows of the context's length from its end.

    Args:
        tokens: The whole stream.
        context: Tokens per row.
    """
    rows = N_HELD_OUT // context
    return tokens[:-N_HELD_OUT], tokens[-N_HELD_OUT:][: rows * context].view(rows, context)


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> Int[Tensor, " n_tokens"]:
    """One long stream of token ids."""
    lines = text.splitlines(keepends=True)
    pieces = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])
