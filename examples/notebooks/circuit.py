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
# # Find the circuit of a behaviour
#
# After `    def __len__(` the model that ships with the library says `self`. Which of its subcomponents make it do so, and would
# they still if the others were taken away, by chance or on purpose?
#
# The same with measured figures: *Find the circuit of a behaviour* in the documentation.

# %% tags=["install"]
# %pip install --quiet ../..  # the library: the folder of its source code, or its address

# %% [markdown]
# ## The graph
#
# Nodes are the subcomponents in use at each position, the tokens' embeddings, and the logit of `self`. An edge is what one does to
# another directly.

# %%
import vpd_lens
from vpd_lens.example import example_harvest

model = vpd_lens.load_example()
prompt = "    def __len__("
graph = vpd_lens.attribute(model, prompt, target="self")
graph

# %% [markdown]
# Ask for the strongest edges into a node by name:

# %%
output = graph.nodes.names()[-1]
graph.incoming(output, top=6)

# %% [markdown]
# The nodes that hold half of the influence, with their page: hover a node for its edges, click to pin it.

# %%
graph.pruned(0.5)

# %% [markdown]
# ## The circuit
#
# `prune` looks for the importances that this one prediction needs while everything else is ablated at random, and as an adversary
# chooses. So few steps leave more than is needed; leave out the configuration for 400 of them, which take minutes.

# %%
config = vpd_lens.PruneConfig(steps=10, attack_steps=(4,), attack_restarts=1, draws=4)
circuit = vpd_lens.prune(model, prompt, "self", config)
circuit

# %% [markdown]
# ## Intervene
#
# Graphs suggest, interventions decide. Ablate the three nodes whose total effects on the output are largest:

# %%
small = vpd_lens.attribute(model, prompt, "self", prune=circuit)
effects = small.total_effects().nan_to_num()
best = [small.nodes.name(node) for node in effects.argsort(descending=True)[:3].tolist()]
vpd_lens.intervene(model, prompt, vpd_lens.Ablate(best), target="self")

# %% [markdown]
# What is the first of them for?

# %%
cards = vpd_lens.Cards(model, example_harvest(model.vpd))
cards[best[0].partition("@")[0]]

# %% [markdown]
# The page of the circuit with everything that is known of its nodes, as a file that needs no network:

# %%
small.to_html("circuit.html", cards=cards)
