"""Subcomponents of a modular-addition transformer next to its key frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.toys.fourier import logit_waves, pair_spectrum, spectrum
from vpd_lens.toys.modular_addition import ModularAddition

KEY = 0.05  # of the largest amplitude


def key_frequencies(logits: Float[Tensor, "p p p"]) -> list[int]:
    """The frequencies that a model answers with, the strongest first.

    Args:
        logits: The model's logits for all pairs.

    Returns:
        Frequencies whose amplitude in the logits is at least 5 % of the largest.
    """
    waves = logit_waves(logits)
    order = waves.argsort(descending=True) + 1
    return [k for k in order.tolist() if waves[k - 1] >= KEY * waves.max()]


@dataclass(frozen=True)
class SiteFrequencies:
    """The live subcomponents of one site, and the frequency that each computes with.

    Attributes:
        site: Name of the site.
        index: Which subcomponents are live, `[n]`.
        activation: Shares of all frequencies in their activation `V_c^T x`, as a function of the
            inputs, `[n, frequencies]`.
        write: Shares in what they write to the logits directly, as a function of the answer; only
            for matrices that write to the residual stream.
    """

    site: str
    index: Int[Tensor, " n"]
    activation: Float[Tensor, "n frequencies"]
    write: Float[Tensor, "n frequencies"] | None

    @property
    def frequency(self) -> Int[Tensor, " n"]:
        """The frequency with the largest share of each activation, `[n]`."""
        return self.activation.argmax(1) + 1

    @property
    def share(self) -> Float[Tensor, " n"]:
        """That share, `[n]`."""
        return self.activation.amax(1)


@torch.no_grad()
def site_frequencies(
    model: nn.Module, task: ModularAddition, name: str, threshold: float = 0.1, often: float = 0.01
) -> SiteFrequencies:
    """Which live subcomponents of a site compute with which frequency.

    A subcomponent is live if it is on, at any position, for enough of the inputs. The activations
    of keys and values are read at a number, where they are functions of it alone: at the first or
    the second, whichever they are on at more often. Those of the other matrices are read at the
    equals sign, where they are functions of both numbers.

    Frequencies are those of `vpd_lens.toys.fourier` (Nanda et al. 2023, arXiv:2301.05217).

    Args:
        model: A decomposed modular-addition transformer.
        task: Its task.
        name: A site.
        threshold: A subcomponent is on at a position where its importance exceeds this.
        often: It is live if it is on somewhere in more than this share of all inputs.
    """
    vpd: Decomposition = model.vpd  # type: ignore[assignment]
    kind, p = name.rpartition(".")[2], task.p
    inputs = vpd.inputs(task.all_rows())
    importance = lower_leaky(vpd.pre_importance(inputs))[..., vpd.layout.columns(name)]
    on = importance > threshold  # [pairs, pos, C]
    live = (on.any(1).float().mean(0) > often).nonzero().flatten()
    x = inputs[vpd.layout.names.index(name)]
    acts = (x @ vpd.v(name)[:, live]).view(p, p, 3, -1)
    if kind in ("k", "v"):
        first, second = spectrum(acts[:, 0, 0]), spectrum(acts[0, :, 1])
        at_first, at_second = on[:, :2, live].float().mean(0)
        shares = torch.where(at_first >= at_second, first, second)
    else:
        shares = pair_spectrum(acts[:, :, -1])
    write = None
    if kind in ("o", "out"):
        write = spectrum((vpd.u(name)[live] @ model.W_U)[:, :p].T).T  # type: ignore[operator]
    return SiteFrequencies(name, live, shares.T, write)


@torch.no_grad()
def amplitudes_without(
    model: nn.Module, task: ModularAddition, ablated: dict[str, Tensor]
) -> tuple[Float[Tensor, " frequencies"], float]:
    """What some subcomponents contribute to the answer, by ablating them in the target.

    All others, and the deltas, stay.

    Args:
        model: A decomposed modular-addition transformer.
        task: Its task.
        ablated: Indices of subcomponents by site.

    Returns:
        The amplitude of every frequency that is left in the logits, and the accuracy.
    """
    vpd: Decomposition = model.vpd  # type: ignore[assignment]
    masks = {}
    for name, index in ablated.items():
        masks[name] = torch.ones(vpd.u(name).shape[0])
        masks[name][index] = 0
    with vpd.masked(masks):
        return logit_waves(task.logits(model)), task.accuracy(model)
