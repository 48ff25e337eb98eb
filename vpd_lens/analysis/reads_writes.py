"""What subcomponents read and write, in terms of tokens, heads, neurons and each other.

A subcomponent `V_c U_c` whose matrix reads the residual stream reads it through a norm: with the
norm's weight `w` and its centring `P`, the activation is `a_c = (x . P (w V_c)) / scale(x)`, so
`P (w V_c)` is its read direction in the stream. One whose matrix writes to the stream has the write
direction `U_c` there (through a norm behind the matrix, if there is one, `P (w U_c)`), and on a
logit it acts by `U_c . P (w W_U[:, t]) / scale(x)` through the final norm. Products of write and
read directions say how subcomponents of different matrices go together.

`(V_c, U_c)` and `(-V_c, -U_c)` are the same subcomponent. With a harvest, both are turned so that
its activation is positive on the average where it fires; every effect is then that of its firing.

Source: VPD, interpretation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.linear import LinearNorm, norm_modules
from vpd_lens.analysis.circuits.targets import token_text
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.harvest.examples import EMPTY
from vpd_lens.analysis.usage import head_shares
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError
from vpd_lens.sites import find_sites, model_kind

READERS = ("attn.q", "attn.k", "attn.v", "mlp.in", "mlp.gate")
WRITERS = ("attn.o", "mlp.out")
HIDDEN = ("mlp.in", "mlp.gate", "mlp.out")
_WINDOWS = 64  # of text, over which the final norm's scale is averaged


class TokenEffect(NamedTuple):
    """A token as text, and what it adds to an activation, or an activation to its logit."""

    token: str
    value: float


class Neighbour(NamedTuple):
    """Another subcomponent by name, and the cosine of the two directions that are compared."""

    name: str
    cosine: float


class Directions:
    """The read and write directions of every subcomponent of a transformer.

    Args:
        vpd: The decomposition of a HookedTransformer or TransformerBridge.
        harvest: What says which sign a subcomponent has where it fires. On its examples the final
            norm's scale is averaged, so that effects on logits are in nats per unit of activation.
            `None`: signs as they are, and effects as if that scale were 1.

    Attributes:
        final_scale: The scale of the final norm that effects on logits were divided by.

    Raises:
        ArtefactError: If the harvest is of another decomposition.
        InputError: If the model has no known residual stream.
    """

    def __init__(self, vpd: Decomposition, harvest: Harvest | None = None) -> None:
        if model_kind(vpd.model) == "module":
            raise InputError(
                f"read and write directions need a HookedTransformer or a TransformerBridge; "
                f"{type(vpd.model).__name__} has no residual stream that is known."
            )
        self.vpd, self.model = vpd, vpd.model
        self._norms = self._norms_of_sites()
        self.signs = torch.ones(vpd.layout.total)
        self.final_scale = 1.0
        if harvest is not None:
            harvest.check(vpd)
            for site in harvest.layout.names:  # perhaps some only
                signed = harvest.usage.signed[harvest.layout.columns(site)]
                self.signs[vpd.layout.columns(site)] = torch.where(signed < 0, -1.0, 1.0)
            self.final_scale = self._mean_scale(harvest)
        self.signs = self.signs.to(vpd.device)
        self.reads, self.writes = cache(self._reads), cache(self._writes)
        self._units, self._before = cache(self._all_units), cache(self._sites_before)
        self._text = cache(partial(token_text, vpd.model))

    def v(self, site: str) -> Float[Tensor, "C d_in"]:
        """`V_c` of every subcomponent, turned to be positive where it fires."""
        return self.vpd.v(site).detach().float().T * self._sign(site)

    def u(self, site: str) -> Float[Tensor, "C d_out"]:
        """`U_c`, turned likewise."""
        return self.vpd.u(site).detach().float() * self._sign(site)

    def _sign(self, site: str) -> Float[Tensor, "C 1"]:
        return self.signs[self.vpd.layout.columns(site), None]

    # ------------------------------------------------------------- directions

    @torch.no_grad()
    def _reads(self, site: str) -> Float[Tensor, "C d_model"] | None:
        """Read directions in the residual stream; `None` if the site does not read it."""
        if site != "unembed" and _parts(site)[1] not in READERS:
            return None
        norm, vectors = self._norms.get(site), self.v(site)
        return vectors if norm is None else norm.centre(norm.weight * vectors)

    @torch.no_grad()
    def _writes(self, site: str) -> Float[Tensor, "C d_model"] | None:
        """Write directions in the residual stream; `None` if the site does not write to it."""
        if _parts(site)[1] not in WRITERS:
            return None
        norm, vectors = self._norms.get(site), self.u(site)
        return vectors if norm is None else norm.weight * norm.centre(vectors)

    @torch.no_grad()
    def _norms_of_sites(self) -> dict[str, LinearNorm]:
        """The norm in front of every reader and behind every writer, and that of `unembed`.

        Names of norms say where they are in most models, not in all, so what a norm returns is
        compared with what matrices receive, and what it receives with what they write.
        """
        vpd, model, like = self.vpd, self.vpd.model, self.vpd.sites[0].weight
        tokens = torch.arange(min(4, int(model.cfg.n_ctx)), device=vpd.device)[None]
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        norms = dict(norm_modules(model))
        with vpd.undisturbed():
            with ExitStack() as stack:
                for name, module in norms.items():
                    hook = module.register_forward_hook(partial(_see, seen, name))
                    stack.callback(hook.remove)
                _, outputs = vpd.run_recording(None, tokens)
                _, inputs = vpd.target(tokens)
            linear = {name: LinearNorm(norms[name], int(model.cfg.d_model), like) for name in seen}
        found = {"unembed": "ln_final"}
        for site, x, y in zip(vpd.sites, inputs, outputs, strict=True):
            writes = _parts(site.name)[1] in WRITERS
            for name, (before, after) in seen.items():
                if _same(y, before) if writes else _same(x, after):
                    found[site.name] = name
        behind = {found.get(site.name) for site in vpd.sites if _parts(site.name)[1] in WRITERS}
        for site in vpd.sites:  # positions may be added between a norm and attention
            block, kind = _parts(site.name)
            if kind.startswith("attn") and kind in READERS and f"{block}.ln1" not in behind:
                found.setdefault(site.name, f"{block}.ln1")
        return {site: linear[name] for site, name in found.items() if name in linear}

    # ----------------------------------------------------------------- tokens

    @torch.no_grad()
    def logits(self, site: str, index: int) -> Float[Tensor, " vocab"] | None:
        """What one unit of activation adds to every logit, directly, less the mean over logits.

        Past everything between the site and the final norm, whose scale is `final_scale`. `None`
        if the site does not write to the residual stream.
        """
        writes = self.writes(site)
        return None if writes is None else writes[index] @ self._unembedding

    def towards(self, token: int) -> Float[Tensor, " d_model"]:
        """The direction in the stream that raises a token's logit against the mean of all."""
        return self._unembedding[:, token]

    @torch.no_grad()
    def embeddings(self, site: str, index: int) -> Float[Tensor, " vocab"] | None:
        """What every token's embedding alone adds to the activation, at a norm's scale of 1.

        Less the mean over tokens. `None` if the site does not read the residual stream.
        """
        reads = self.reads(site)
        if reads is None:
            return None
        found = self.model.W_E.float() @ reads[index]  # type: ignore[operator, union-attr]
        return found - found.mean()

    @cached_property
    def _unembedding(self) -> Float[Tensor, "d_model vocab"]:
        weight = find_sites(self.model, ["unembed"])[0].weight.float()
        if (norm := self._norms.get("unembed")) is not None:
            weight = norm.centre(norm.weight * weight.T).T
        return (weight - weight.mean(-1, keepdim=True)) / self.final_scale

    def extremes(
        self, values: Float[Tensor, " vocab"], k: int
    ) -> tuple[list[TokenEffect], list[TokenEffect]]:
        """The `k` tokens of the largest values, and of the smallest, as text."""
        largest, smallest = ((values * sign).topk(min(k, len(values))).indices for sign in (1, -1))
        return self._named(values, largest), self._named(values, smallest)

    def _named(self, values: Tensor, tokens: Tensor) -> list[TokenEffect]:
        found = zip(tokens.tolist(), values[tokens].tolist(), strict=True)
        return [TokenEffect(self._text(token), value) for token, value in found]

    # ------------------------------------------------------ heads and neurons

    def heads(self, site: str, index: int) -> list[float] | None:
        """Each head's share in a subcomponent of attention; `None` at other sites."""
        return head_shares(self.vpd, site)[index].tolist() if ".attn." in site else None

    def neurons(self, site: str, index: int, k: int) -> list[tuple[int, float]] | None:
        """The `k` neurons of the largest weights, as shares of the squared norm, with their sign.

        What `mlp.in` and `mlp.gate` write to, or `mlp.out` reads; `None` at other sites.
        """
        if (kind := _parts(site)[1]) not in HIDDEN:
            return None
        vector = (self.v(site) if kind == "mlp.out" else self.u(site))[index]
        best = vector.abs().topk(min(k, len(vector))).indices
        shares = vector.sign() * vector.square() / vector.square().sum().clamp(min=1e-30)
        return list(zip(best.tolist(), shares[best].tolist(), strict=True))

    # ------------------------------------------------------------- neighbours

    def upstream(self, site: str, index: int, k: int) -> list[Neighbour]:
        """Those in earlier matrices that write most along, or against, what this one reads."""
        own = self.reads(site)
        return [] if own is None else self._nearest("writes", own[index], self._before(site), k)

    def downstream(self, site: str, index: int, k: int) -> list[Neighbour]:
        """Those in later matrices that read most along, or against, what this one writes."""
        own = self.writes(site)
        if own is None:
            return []
        later = [name for name in self.vpd.layout.names if site in self._before(name)]
        return self._nearest("reads", own[index], later, k)

    def alike(self, site: str, index: int, k: int) -> list[Neighbour]:
        """Those of any matrix that write, or if this one does not, read in the same direction."""
        side = "reads" if self.writes(site) is None else "writes"
        own = getattr(self, side)(site)
        if own is None:
            return []
        found = self._nearest(side, own[index], self.vpd.layout.names, k + 1)
        return [other for other in found if other.name != f"{site}:{index}"][:k]

    @torch.no_grad()
    def read_after(self, site: str) -> Float[Tensor, "n d_model"]:
        """The reads of all subcomponents of later matrices, as long as what they then write."""
        later = [name for name in self.vpd.layout.names if site in self._before(name)]
        reads = [(self.reads(name), self.u(name).norm(dim=-1, keepdim=True)) for name in later]
        found = [own * size for own, size in reads if own is not None]
        return (
            torch.cat(found)
            if found
            else self.vpd.v(site).new_zeros(0, int(self.model.cfg.d_model))
        )

    @torch.no_grad()
    def _nearest(self, side: str, vector: Tensor, sites: Sequence[str], k: int) -> list[Neighbour]:
        names, place, units = self._units(side)
        sizes = (units @ F.normalize(vector, dim=0)).abs()
        chosen = torch.tensor([name in sites for name in self.vpd.layout.names])
        sizes[~chosen.to(sizes.device)[place]] = -1
        best = sizes.topk(min(k, len(sizes))).indices
        cosines = units[best] @ F.normalize(vector, dim=0)
        rows = zip(best.tolist(), sizes[best].tolist(), cosines.tolist(), strict=True)
        return [Neighbour(names[row], cosine) for row, size, cosine in rows if size >= 0]

    @torch.no_grad()
    def _all_units(
        self, side: str
    ) -> tuple[list[str], Int[Tensor, " n"], Float[Tensor, "n d_model"]]:
        """Names, numbers of sites and unit vectors of all that read, or write to, the stream."""
        names, place, units = [], [], []
        for number, site in enumerate(self.vpd.layout.names):
            if (vectors := getattr(self, side)(site)) is not None:
                names += [f"{site}:{c}" for c in range(len(vectors))]
                place += [number] * len(vectors)
                units.append(F.normalize(vectors, dim=-1))
        if not units:
            return [], torch.empty(0, dtype=torch.long), torch.empty(0, int(self.model.cfg.d_model))
        return names, torch.tensor(place, device=self.vpd.device), torch.cat(units)

    def _sites_before(self, site: str) -> list[str]:
        """The matrices whose writing a site's input can contain."""
        writers = [name for name in self.vpd.layout.names if _parts(name)[1] in WRITERS]
        if site == "unembed":
            return writers
        # Side by side, attention and MLP do not read what the other writes.
        side_by_side = getattr(self.model.cfg, "parallel_attn_mlp", False)

        def order(name: str) -> tuple[int, int]:
            block, part = int(name.split(".")[1]), name.split(".")[2]
            return block, int(part == "mlp" and not side_by_side)

        return [name for name in writers if order(name) < order(site)]

    @torch.no_grad()
    def _mean_scale(self, harvest: Harvest) -> float:
        """The final norm's scale: one over the mean of its inverse, which logits are linear in."""
        norm, seen = self._norms.get("unembed"), []
        windows = harvest.top.tokens.flatten(0, 1)
        tokens = windows[(windows != EMPTY).all(dim=1)][:_WINDOWS].long()
        if norm is None or not len(tokens):
            return 1.0

        def see(_module: nn.Module, args: tuple, y: Tensor) -> None:
            seen.append(norm.inverse_scale(args[0].float(), norm.unbiased(y.float())))

        with self.vpd.undisturbed():
            handle = self.model.ln_final.register_forward_hook(see)  # type: ignore[union-attr, operator]
            try:
                self.vpd.run(None, tokens.to(self.vpd.device))
            finally:
                handle.remove()
        return 1 / float(torch.cat(seen).mean())


def _see(
    seen: dict[str, tuple[Tensor, Tensor]], name: str, _m: nn.Module, args: tuple, y: Tensor
) -> None:
    seen[name] = args[0], y


def _same(x: Tensor, y: Tensor) -> bool:
    return x.numel() == y.numel() and torch.equal(x.flatten(), y.flatten())


def _parts(site: str) -> tuple[str, str]:
    """`blocks.0.attn.q` is `attn.q` of `blocks.0`."""
    pieces = site.split(".")
    return ".".join(pieces[:2]), ".".join(pieces[2:])
