"""Train a small transformer on Python code, decompose it with VPD, and look at what came out.

Everything happens offline: the text is the source of Python's own standard library.

    python examples/quickstart.py            # about 7 minutes on two CPU cores
    python examples/quickstart.py --help

The steps are those of any project: a target model, `vpd_lens.decompose(model, data, config)`,
`vpd_lens.evaluate`, and ordinary TransformerLens on the result.
"""

from __future__ import annotations

import argparse
import os
import random
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import vpd_lens
from vpd_lens.evaluation import EvalReport
from vpd_lens.models import load_model, save_model
from vpd_lens.training import VPDConfig

VOCABULARY, CONTEXT = 512, 64
STORED = Path(__file__).parent / "quickstart_without_adversary.json"
console = Console()


def standard_library_text(n_characters: int, seed: int = 0) -> str:
    """Source files of the standard library, in random order, cut to `n_characters`."""
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
    """A 2-layer transformer: HookedTransformer on TransformerLens 3.x, a bridge on 4.x."""
    shape = {
        "n_layers": 2,
        "d_model": 64,
        "n_ctx": CONTEXT,
        "d_head": 16,
        "n_heads": 4,
        "d_mlp": 256,
        "d_vocab": VOCABULARY,
        "act_fn": "gelu_new",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 16,
        "seed": seed,
        "default_prepend_bos": False,
    }
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape))
        model.tokenizer = tokenizer
        return model
    config = HookedTransformerConfig(**shape, device="cpu")
    return HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")


def train_target(model: torch.nn.Module, tokens: Tensor, steps: int, seed: int) -> float:
    """Ordinary next-token training on random windows; returns the last loss in nats."""
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


def get_target(folder: Path, steps: int, seed: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The target model with training and held-out tokens; trained once, then loaded."""
    text = standard_library_text(8_000_000)
    if not (folder / "model.json").exists():
        tokenizer = train_tokenizer(text[:2_000_000], folder.with_name("tokenizer"))
        model = new_model(tokenizer, seed)
        tokens = tokenise(tokenizer, text)
        loss = train_target(model, tokens[:-100_000], steps, seed)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
        save_model(model, folder)
    model = load_model(folder)
    tokens = tokenise(model.tokenizer, text)
    held_out = tokens[-100_000:]
    rows = len(held_out) // CONTEXT
    return model, tokens[:-100_000], held_out[: rows * CONTEXT].view(rows, CONTEXT)


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """One long stream of token ids."""
    lines = text.splitlines(keepends=True)
    pieces = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])


def configuration(steps: int, seed: int) -> VPDConfig:
    """The run of this example: the preset for small models, shortened."""
    return VPDConfig.small(steps=steps, seed=seed, log_every=max(1, steps // 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--target-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=500, help="VPD training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--without-adversary", action="store_true", help="the control, stored beside this script"
    )
    arguments = parser.parse_args()
    begun = time.perf_counter()

    console.rule("1. A target model")
    model, train_tokens, held_out = get_target(
        arguments.output / "target", arguments.target_steps, arguments.seed
    )

    console.rule("2. Its decomposition")
    config = configuration(arguments.steps, arguments.seed)
    if arguments.without_adversary:
        config = config.without_adversary()
    name = "vpd-without-adversary" if arguments.without_adversary else "vpd"
    folder = arguments.output / name
    resume = (folder / "checkpoint").exists()
    vpd_lens.decompose(model, train_tokens, config, output=folder, resume=resume)
    console.print(model.vpd)

    console.rule("3. Is it any good?")
    report = vpd_lens.evaluate(model, held_out[:64], pgd_steps=(20, 40, 80, 160), pgd_restarts=2)
    report.to_json(folder / "report.json")
    show(report, model, held_out, folder)
    console.print(f"\nDone in {(time.perf_counter() - begun) / 60:.1f} minutes.")


def show(report: EvalReport, model: torch.nn.Module, held_out: Tensor, folder: Path) -> None:
    """The tables beside the stored run without the adversary, some text, and what to do next."""
    beside = EvalReport.from_json(STORED) if STORED.exists() else None
    name = "without adversary"
    console.print(report.tables(beside, name))
    report.to_html(folder / "report.html", "VPD of the quickstart model", beside, name)
    prompt = held_out[:1, :24]
    console.print("A prompt and its continuation under different masks (greedy):")
    console.print(repr(model.to_string(prompt[0])), highlight=False, markup=False)
    for mode in ("target", "rounded", "stochastic", "adversarial"):
        with model.vpd.masked(mode, seed=0):
            out = model.generate(
                prompt, max_new_tokens=16, do_sample=False, stop_at_eos=False, verbose=False
            )
        text = repr(model.to_string(out[0, prompt.shape[1] :]))
        console.print(f"  {mode:12s} {text}", highlight=False, markup=False)
    console.print(
        f"\nReport:        {folder / 'report.html'}\n"
        f"Decomposition: {folder / 'decomposition'}\n"
        f"Target model:  {folder.parent / 'target'}\n\n"
        "What to try next:\n"
        f"  vpd-lens info {folder / 'decomposition'}\n"
        f"  vpd-lens eval {folder / 'decomposition'} --model {folder.parent / 'target'} "
        "--data <a folder of text>\n"
        "  python examples/quickstart.py --steps 4000 --output runs/longer\n"
        "  In Python: model = vpd_lens.load(decomposition, load_model(target)), then\n"
        "  model.run_with_cache(tokens) and look for names that contain '.vpd.'."
    )


if __name__ == "__main__":
    main()
