"""The tensors of a published run: which belong to the target, to V and U, and to the importances.

| tensor | shape | what it is |
|---|---|---|
| `target_model.<path>.weight` | `[d_out, d_in]` | a copy of the whole target |
| `_components.<site>.V`, `.U` | `[d_in, C]`, `[C, d_out]` | the subcomponents of one site |
| `_components.<site>.bias` | `[d_out]` | the target's own, again |
| `ci_fn._ci_fns.<site>...` | | one causal importance function per site, or |
| `ci_fn._global_ci_fn...` | | one for all |

`<site>` is the module's path with hyphens for dots. Before October 2025 the target was called
`patched_model` and held weights and components (`<path>.original`, `<path>.components`), and the
importance functions `_gates`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.errors import ArtefactError, first_line
from vpd_lens.interop.param_decomp.config import RunConfig, read_config

_TARGET = r"(?:target|patched)_model\."
# Of every name: which part of a checkpoint it belongs to. The first that matches counts.
_NAMES = (
    ("components", r"_components\.(?P<path>[^.]+)\.(?P<name>V|U|bias)"),
    ("components", _TARGET + r"(?P<path>.+)\.components\.(?P<name>V|U|bias)"),
    ("importance", r"ci_fn\._global_ci_fn(?P<path>)\.(?P<name>.+)"),
    ("importance", r"(?:ci_fn\.)?(?:_ci_fns|_gates)\.(?P<path>[^.]+)\.(?P<name>.+)"),
    ("target", _TARGET + r"(?P<path>.+)\.original\.(?P<name>weight|bias)"),
    ("target", _TARGET + r"(?:(?P<path>.+)\.)?(?P<name>[^.]+)"),
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """The tensors of a checkpoint by what they are.

    Attributes:
        target: The target's, by their names there.
        components: `V`, `U` and perhaps `bias` of every site, by its module path.
        importance: Those of the causal importance function of a site, by its module path, or of
            the one for all, by `""`; with names from there on.
    """

    target: Tensors
    components: dict[str, Tensors]
    importance: dict[str, Tensors]

    @property
    def sites(self) -> list[str]:
        """The module paths of all sites, in the order in which the target has its weights."""
        paths = [name.removesuffix(".weight") for name in self.target]
        return [path for path in paths if path in self.components]

    def weight(self, path: str) -> Float[Tensor, "d_in d_out"]:
        """The target's weight at a site, as `x` is multiplied by it."""
        return self.target[f"{path}.weight"].T


@dataclass(frozen=True)
class Checkpoint:
    """A published run, read and found to fit its own configuration."""

    path: Path  # of the tensors
    step: int
    config: RunConfig
    state: State


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a run's folder, at its highest step, or one `model_<step>.pth` of it.

    Raises:
        ArtefactError: If a file is missing, damaged or foreign, a site is none that can be
            decomposed, or the tensors do not fit the configuration.
    """
    path = Path(path).expanduser()
    file = path if path.is_file() else newest(path, r"model_(\d+)\.pth")
    if file is None:
        raise ArtefactError(
            f"{path}: there is no model_<step>.pth, a decomposition's tensors. Give the folder of "
            "an s-... run, with its final_config.yaml; that of its target is another one."
        )
    state = sort_tensors(read_tensors(file), file)
    _require_linear(state, file)
    config = read_config(file.parent)
    _require_counts(state, config)
    step = re.search(r"(\d+)$", file.stem)
    return Checkpoint(file, int(step[1]) if step else 0, config, state)


def newest(folder: Path, pattern: str) -> Path | None:
    """The file of a folder whose whole name matches, with the highest number in its group."""
    matches = ((re.fullmatch(pattern, file.name), file) for file in folder.glob("*"))
    steps = [(int(match[1]), file) for match, file in matches if match]
    return max(steps)[1] if steps else None


def read_tensors(file: Path) -> Tensors:
    """The tensors by name that `torch.save` wrote, on the CPU; nothing else is unpickled."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a damaged file
        raise ArtefactError(
            f"{file}: not readable as tensors that PyTorch saved ({type(error).__name__}: "
            f"{first_line(error)}). Download it again."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ArtefactError(f"{file}: it holds something else than tensors by name.")
    return tensors


def require_same(tensors: Mapping[str, Tensor], copy: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a target's tensors that are not those that a decomposition has a copy of."""
    names = sorted(tensors.keys() | copy.keys())
    different = [
        name
        for name in names
        if name not in tensors or name not in copy or not torch.equal(tensors[name], copy[name])
    ]
    if different:
        raise ArtefactError(
            f"{file}: {len(different)} of {len(names)} tensors differ from the copy in the "
            f"decomposition's checkpoint, among them {', '.join(different[:4])}. It is another "
            "target, or another step of it."
        )


def sort_tensors(tensors: Tensors, file: Path) -> State:
    """Sort tensors by what they are, whatever age their names are of."""
    parts: dict[str, dict[str, Tensors]] = {
        part: defaultdict(dict) for part in ("target", "components", "importance")
    }
    for name, tensor in tensors.items():
        found = ((part, m) for part, regex in _NAMES if (m := re.fullmatch(regex, name)))
        part, match = next(found, ("", None))
        if match is None:
            raise ArtefactError(
                f"{file}: {name!r} is no tensor of a decomposition by param-decomp or spd, where "
                "all begin with target_model, _components or ci_fn. Give the model_<step>.pth of "
                "an s-... run."
            )
        path = match["path"] or ""
        if part != "target":
            path = path.replace("-", ".")
        parts[part][path][match["name"]] = tensor
    target = {
        f"{path}.{name}".removeprefix("."): tensor
        for path, own in parts["target"].items()
        for name, tensor in own.items()
    }
    return State(target, dict(parts["components"]), dict(parts["importance"]))


def _require_linear(state: State, file: Path) -> None:
    """Check that every site is a linear layer of the target with its V and U."""
    if not state.components:
        raise ArtefactError(f"{file}: there are no components in it, only other tensors.")
    for path, own in state.components.items():
        if path.endswith(".pre_identity"):
            raise ArtefactError(
                f"{file}: {path} is an identity site, a matrix that was inserted into the target. "
                "No TransformerLens model has it; the run cannot be imported."
            )
        weight = state.target.get(f"{path}.weight")
        if weight is None or not {"V", "U"} <= own.keys() or own["V"].ndim != 2:
            raise ArtefactError(
                f"{file}: {path} has the tensors {sorted(own)}, and the target "
                f"{'no' if weight is None else 'a'} weight there; expected V, U and a weight."
            )
        shape = (own["V"].shape[0], own["U"].shape[1])
        if shape != tuple(weight.T.shape) and shape == tuple(weight.shape):
            raise ArtefactError(
                f"{file}: {path} is an embedding, whose rows are looked up, not multiplied by. "
                "Only linear layers can be decomposed here; the run cannot be imported."
            )
        if shape != tuple(weight.T.shape) or own["V"].shape[1] != own["U"].shape[0]:
            raise ArtefactError(
                f"{file}: {path} has V {list(own['V'].shape)} and U {list(own['U'].shape)}, which "
                f"do not make up its weight {list(weight.T.shape)}."
            )
        bias = state.target.get(f"{path}.bias")
        if "bias" in own and (bias is None or not torch.equal(own["bias"], bias)):
            raise ArtefactError(f"{file}: the bias beside the components of {path} is not its own.")


def _require_counts(state: State, config: RunConfig) -> None:
    """Check that the patterns of a configuration name the sites and their numbers."""
    used: set[str] = set()
    for path, own in state.components.items():
        matching = [(p, c) for p, c in config.patterns if fnmatchcase(path, p)]
        used.update(pattern for pattern, _ in matching)
        expected = [c for _, c in matching]
        if expected != [own["V"].shape[1]]:
            raise ArtefactError(
                f"{config.path}: {path} has {own['V'].shape[1]} subcomponents in the checkpoint; "
                f"the patterns that match it say {expected or 'nothing'}. The two files are not of "
                "one run."
            )
    if unused := [pattern for pattern, _ in config.patterns if pattern not in used]:
        raise ArtefactError(
            f"{config.path}: no component of the checkpoint is at {unused}. The two files are not "
            "of one run."
        )
