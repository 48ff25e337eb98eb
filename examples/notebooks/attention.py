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
# # Attention across heads
#
# To a decomposition the q matrices of all heads of a layer are one matrix, and so are their k matrices. A mechanism that is spread
# over heads is one pair of a q and a k subcomponent. This notebook finds the pair behind the strongest previous-token head of the
# example, and takes it away.
#
# The same with measured figures: *Attention across heads* in the documentation.

# %% tags=["install"]
# %pip install --quiet ../..  # the library: the folder of its source code, or its address

# %%
import vpd_lens
from vpd_lens import plots
from vpd_lens.example import example_harvest

model = vpd_lens.load_example()
heads = vpd_lens.attention(model, example_harvest(model.vpd))
heads

# %% [markdown]
# ## Where do the heads look?

# %%
import sysconfig
from pathlib import Path

text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text()
tokens = model.to_tokens(text, truncate=False, prepend_bos=False)[0, : 64 * 16].view(16, 64)
data = heads.over(tokens)
data.profiles[2]  # mean attention by distance

# %% [markdown]
# ## Which pair draws head 2.1 to the position before?
#
# What a pair adds at every distance alike changes nothing, because a softmax does not see it: take the contributions less their
# mean over distances.

# %%
mean = data.contributions[2].relative()
pairs = mean.top(4, head=1, offset=1)
pairs

# %%
plots.qk_offsets(mean, pairs)

# %% [markdown]
# The same pair in the weights alone, and its q subcomponent over heads:

# %%
plots.qk_pair(heads.static(2).standardised(), "blocks.2.attn.q:48", "blocks.2.attn.k:55")

# %%
plots.head_spread(heads.spread("blocks.2.attn.q"))

# %% [markdown]
# ## Is that the reason? Take it away

# %%
changes = [heads.ablate(name, tokens) for name in ("blocks.2.attn.q:48", "blocks.2.attn.k:55")]
plots.attention_ablation(changes, layer=2)

# %% [markdown]
# Patterns on one prompt, with and without:

# %%
prompt = heads.on("class Queue:\n    def __init__(self, maxsize=0):\n")
strings = [model.to_string([token]) for token in prompt.tokens.tolist()]
without = prompt.without("blocks.2.attn.k:55")
patterns = [("with all", prompt.patterns[2][1]), ("without k:55", without[2][1])]
plots.attention_patterns(patterns, strings)
