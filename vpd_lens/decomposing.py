"""`decompose`: the front door. Attach a decomposition to a model, and train it if data is given."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import Tensor, nn

from vpd_lens.decomposition import CausalImportanceConfig
from vpd_lens.decomposition.attach import attach, decomposition_of, removed_if_untrained
from vpd_lens.decomposition.difference import differing_sites
from vpd_lens.decomposition.divergence import CustomDivergence, DivergenceKind
from vpd_lens.decomposition.subcomponents import CountSpec, singular
from vpd_lens.errors import AttachError, ConfigError, did_you_mean
from vpd_lens.origin import origin_of
from vpd_lens.sites import find_sites
from vpd_lens.sites.discovery import SiteSelection
from vpd_lens.training import VPDConfig, train

Model = TypeVar("Model", bound=nn.Module)


def decompose(
    model: Model,
    data: Any = None,
    config: VPDConfig | None = None,
    *,
    sites: SiteSelection | None = None,
    n_subcomponents: CountSpec | None = None,
    importance: CausalImportanceConfig | None = None,
    divergence: DivergenceKind | CustomDivergence | None = None,
    base: nn.Module | None = None,
    example: Tensor | None = None,
    seed: int | None = None,
    **training: Any,
) -> Model:
    """Attach a decomposition to `model`, and train it if `data` is given.

    The model is returned as it came, with one handle added, `model.vpd`. While no masks are
    active its outputs are bit-identical to before. Its weights are frozen and never modified;
    `vpd_lens.remove(model)` restores it. A tiny forward checks at every site that `x W + b = y`.

    Args:
        model: A HookedTransformer, a TransformerBridge, or any module with linear layers.
        data: What to train on; see `vpd_lens.train`. `None` attaches an untrained decomposition.
        config: The run; also gives sites, sizes and seed unless the arguments below do.
        sites: `"all"` (default), a regular expression, a list of names, or `Site` objects.
        n_subcomponents: An int, `"paper"` (default), `"faithful"`, `"2x-rank"`, a mapping from
            patterns to ints, or a callable from `Site` to int. `print(model.vpd)` shows how many
            every site has, beside the ranks of its weight.
        importance: The causal importance function; default: a transformer sized by the target.
        divergence: `"kl"` (default for transformers), `"mse"` (default for other modules), or a
            callable `(masked, target) -> scalar`.
        base: Another model of the same shape, usually what `model` was fine-tuned from: decompose
            the difference of the weights, `W = W_base + V U`. Masks of 0 give its matrices; all
            else stays `model`'s. Sites without difference are left out.
        example: One input batch, needed for models that are not transformers.
        seed: Seed of the initialisation.
        **training: Further arguments of `vpd_lens.train` (`output`, `resume`, `wandb`, ...).

    Raises:
        AttachError: If no site matches, a site fails the self-check, or the model is decomposed
            already, compiled, on several devices or under an adapter, or if `base` has other
            shapes or the same weights; the message says which.
        ConfigError: If a number of subcomponents is below 1, `data` is a configuration, or there
            is no such argument.

    Examples:
        >>> from transformer_lens.config import TransformerBridgeConfig
        >>> from transformer_lens.model_bridge import TransformerBridge
        >>> import vpd_lens
        >>> model = TransformerBridge.boot_native(TransformerBridgeConfig(
        ...     d_model=16, d_head=8, n_heads=2, n_layers=1, n_ctx=8, d_vocab=20, d_mlp=32,
        ...     act_fn="gelu", seed=0))
        >>> vpd_lens.decompose(model).vpd
        Decomposition(6 sites, 152 subcomponents, TransformerImportance, untrained)
    """
    if isinstance(data, VPDConfig):
        raise ConfigError("data is a VPDConfig; pass config=..., and data=... to train on.")
    own, known = (set(inspect.signature(f).parameters) for f in (decompose, train))
    for name in training.keys() - known:
        hint = did_you_mean(name, (own | known) - {"training"})
        raise ConfigError(f"decompose has no argument {name!r}{hint}")
    start = VPDConfig.small if training.get("elsewhere") is None else VPDConfig.targeted
    run = config or (VPDConfig() if data is None else start())
    if base is not None and config is None:
        run = run.replaced({"initialisation": "svd"})
    # What a configuration can record: not `Site`s and callables.
    names = isinstance(sites, list | tuple) and all(isinstance(site, str) for site in sites)
    given = {
        "sites": sites if names or isinstance(sites, str) else None,
        "n_subcomponents": n_subcomponents if not callable(n_subcomponents) else None,
        "importance": importance and importance.model_dump(),
        "seed": seed,
    }
    run = run.replaced({name: value for name, value in given.items() if value is not None})
    if training and data is None:
        raise ConfigError(f"{sorted(training)} only make sense with data=...; none was given.")
    if "vpd" in model.__dict__:
        raise AttachError(
            "This model is decomposed already. Call vpd_lens.remove(model) first, or train the "
            "decomposition it carries with vpd_lens.train(model, data, config)."
        )
    where = run.sites if sites is None else sites
    counts = run.n_subcomponents if n_subcomponents is None else n_subcomponents
    if base is not None:
        where = differing_sites(find_sites(model, where), base)
    attach(model, where, counts, run.importance, example, divergence, run.seed)
    if base is not None:
        vpd = decomposition_of(model)
        vpd.other_origin = origin_of(base)
        singular(vpd.subcomponents, [site.decomposed for site in vpd.sites])
    if data is not None:
        with removed_if_untrained(model):
            train(model, data, run, **training)
    return model
