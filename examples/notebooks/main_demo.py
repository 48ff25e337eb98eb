# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A decomposition from start to end
#
# VPD takes every weight matrix of a transformer apart into rank-1 *subcomponents*, and says for every token which of them the
# model needs. This notebook looks at the decomposition that ships with the library: is it any good, what does a prompt need,
# what does one subcomponent do? Then it makes a small one. It runs on a CPU in about a minute.
#
# The same with more words: *A decomposition from start to end* and *What a text needs* in the documentation.

# %% tags=["install"]
# %pip install --quiet ../..  # the library: the folder of its source code, or its address

# %% [markdown]
# ## The model and its decomposition
#
# An ordinary TransformerLens model with one handle more, `model.vpd`. Its outputs are what they were, bit for bit.

# %%
import vpd_lens
from vpd_lens import plots
from vpd_lens.example import example_harvest, example_report

model = vpd_lens.load_example()
model.vpd

# %% [markdown]
# ## Is it any good?
#
# Ask this first. The report begins with a verdict; all its bounds are in the documentation of the evaluation.

# %%
report = example_report()
report

# %% [markdown]
# Left, an adversary chooses what happens to everything that is called unimportant. Right, what other tokens need is switched on
# together with a token's own. Give several reports by name, and they share the axes:
# `plots.resistance({"mine": mine, "the example": report})`.

# %%
plots.resistance(report)

# %%
plots.l0(report)

# %% [markdown]
# ## What does a prompt need?
#
# And what of it matters for the next token being `self`?

# %%
prompt = "class Queue:\n    def __init__("
found = vpd_lens.explain(model, prompt, target="self", harvest=example_harvest(model.vpd))
found

# %%
plots.needs(found)

# %%
plots.importances(found, k=15)

# %% [markdown]
# ## What does one subcomponent do?

# %%
card = found.cards["blocks.3.mlp.out:60"]
card

# %%
plots.logit_effects(card)

# %% [markdown]
# ## Is it true? Take away what is not needed
#
# `rounded` keeps only what each token needs; `stochastic` and `adversarial` let the rest come back at random, and as it harms most.

# %%
for mode in ("target", "rounded", "stochastic", "adversarial"):
    with model.vpd.masked(mode, seed=0):
        text = model.generate(prompt, max_new_tokens=6, do_sample=False, verbose=False)
    print(f"{mode:12s} {text[len(prompt) :]!r}")

# %% [markdown]
# ## Your own
#
# Any TransformerLens model and text. Here it is the same model, one of its matrices, and so few steps that nothing comes of it.

# %%
import sysconfig
from pathlib import Path

text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text()
tokens = model.to_tokens(text, truncate=False, prepend_bos=False)[0]

vpd_lens.remove(model)  # the model as it was
config = vpd_lens.VPDConfig.small(
    steps=8, sites=r"blocks\.1\.mlp\.in", batch_size=2, seq_len=32, log_every=1
)
config = config.replaced({"faithfulness.warmup_steps": 20})
result = vpd_lens.train(model, tokens, config)
result

# %%
plots.training(result.folder)

# %% [markdown]
# Next: *circuit.ipynb*, the circuit of a behaviour, and *attention.ipynb*, attention across heads.
