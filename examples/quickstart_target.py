"""The quickstart's language model: text, tokenizer, architecture and training, all offline.

It is an ordinary Hugging Face model, a tiny Qwen2: a Llama with biases on q, k and v, for which
TransformerLens prepends no BOS token, as fits a model that was trained on windows of one stream.

The text is the source of Python's own standard library, so the target is the same wherever the
same Python, TransformerLens and PyTorch are installed.
"""

from __future__ import annotations

import random
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from vpd_lens.models import load_model
from vpd_lens.storage import atomic_folder

N_CHARACTERS, N_HELD_OUT = 8_000_000, 100_000


@dataclass(frozen=True)
class TargetSize:
    """Shape of a target and of the batches it is trained on; by default the quickstart's.

    Attributes:
        n_layers: Blocks.
        d_model: Residual width.
        n_heads: Attention heads.
        vocabulary: Tokens of its tokenizer.
        context: Tokens per sequence.
        d_mlp: Hidden width of the gated MLP; `None`: one with as many weights as an ungated one
            four times as wide as the stream.
        batch_size: Sequences per training step.
    """

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    vocabulary: int = 512
    context: int = 64
    d_mlp: int | None = None
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


def train_tokenizer(text: str, vocabulary: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of the kind that the directory of a Qwen2 is read with."""
    lines = text.splitlines(keepends=True)
    return Qwen2Tokenizer().train_new_from_iterator(lines, vocabulary, show_progress=False)


def new_model(seed: int, size: TargetSize = QUICKSTART) -> Qwen2ForCausalLM:
    """A transformer with random weights.

    Args:
        seed: Seed of the weights.
        size: Its shape.
    """
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp or 8 * size.d_model // 3 // 8 * 8,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn anew below
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return model


def train_target(
    model: Qwen2ForCausalLM,
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
    context = model.config.max_position_embeddings
    recent: deque[Tensor] = deque(maxlen=100)
    for _ in track(range(steps), "Training the target", console=console):
        starts = torch.randint(len(tokens) - context, (batch_size,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(context)].to(model.device)  # [batch, pos]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.detach())
    return float(torch.stack(list(recent)).mean())


def get_target(
    folder: Path,
    steps: int,
    seed: int,
    n_characters: int = N_CHARACTERS,
    progress: bool = True,
) -> tuple[torch.nn.Module, Int[Tensor, " n_tokens"], Int[Tensor, "rows 64"]]:
    """The target model with training and held-out tokens; trained once, then loaded.

    Args:
        folder: Where model and tokenizer are kept, a Hugging Face directory.
        steps: Training steps, if it has to be trained.
        seed: Seed of weights and training.
        n_characters: Length of the text.
        progress: Show a progress bar and the loss reached.

    Returns:
        The model, the stream of training tokens, and held-out rows of the context's length.
    """
    console = Console(quiet=not progress)
    text = standard_library_text(n_characters)
    if (folder / "config.json").exists():
        model = load_model(folder)
        return model, *split(tokenise(model.tokenizer, text), QUICKSTART.context)
    tokenizer = train_tokenizer(text[:2_000_000], QUICKSTART.vocabulary)
    tokens, held_out = split(tokenise(tokenizer, text), QUICKSTART.context)
    trained = new_model(seed)
    loss = train_target(trained, tokens, steps, seed, console)
    save(trained, tokenizer, folder)
    console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
    return load_model(folder), tokens, held_out


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write model and tokenizer to a directory, whole or not at all."""
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


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


def tokenise(tokenizer: Qwen2Tokenizer, text: str) -> Int[Tensor, " n_tokens"]:
    """One long stream of token ids."""
    lines = text.splitlines(keepends=True)
    pieces = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])
