"""The authors' toy targets: plain modules with the tensors, and the names, of their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vpd_lens.config.base import read_yaml
from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.interop.param_decomp.checkpoint import Checkpoint, read_tensors, require_same

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class ImportedTMS(nn.Module):
    """Toy model of superposition: `relu(linear2(hidden_layers(linear1(x))))`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        n, d = int(fields["n_features"]), int(fields["n_hidden"])
        self.n_features = n
        self.linear1 = _linear(n, d, bias=False)
        hidden = (_linear(d, d, bias=False) for _ in range(int(fields["n_hidden_layers"])))
        self.hidden_layers = nn.ModuleList(hidden)
        self.linear2 = _linear(d, n, bias=True)

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network."""
        x = self.linear1(x)
        for layer in self.hidden_layers:
            x = layer(x)
        return F.relu(self.linear2(x))


class ImportedResidMLP(nn.Module):
    """Residual MLP blocks between the fixed matrices `W_E` and `W_U`."""

    W_E: Float[Tensor, "n d"]
    W_U: Float[Tensor, "d n"]

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        n, d, d_mlp = (int(fields[name]) for name in ("n_features", "d_embed", "d_mlp"))
        self.n_features = n
        self.act = _ACTIVATIONS[fields["act_fn_name"]]
        self.register_buffer("W_E", torch.zeros(n, d))
        self.register_buffer("W_U", torch.zeros(d, n))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mlp_in": _linear(d, d_mlp, bias=bool(fields["in_bias"])),
                    "mlp_out": _linear(d_mlp, d, bias=bool(fields["out_bias"])),
                }
            )
            for _ in range(int(fields["n_layers"]))
        )

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network."""
        residual = x @ self.W_E
        for layer in self.layers:
            residual = residual + layer["mlp_out"](self.act(layer["mlp_in"](residual)))
        return residual @ self.W_U


# By the authors' class, ours and the section of a training configuration that describes it.
_TOYS = {
    "TMSModel": (ImportedTMS, "tms_model_config"),
    "ResidMLP": (ImportedResidMLP, "resid_mlp_model_config"),
    "ResidualMLP": (ImportedResidMLP, "resid_mlp_model_config"),
}


def example_for(model: nn.Module) -> Float[Tensor, "2 n"] | None:
    """A batch of a toy; `None` for any other module."""
    if not isinstance(model, ImportedTMS | ImportedResidMLP):
        return None
    return torch.linspace(-1, 1, 2 * model.n_features).reshape(2, model.n_features)


def is_toy(checkpoint: Checkpoint) -> bool:
    """Whether a decomposition's target is one of the toys."""
    return checkpoint.config.target_class in _TOYS


def toy_target(checkpoint: Checkpoint, folder: str | Path | None) -> nn.Module:
    """The toy that was decomposed, in evaluation mode, with the checkpoint's copy of its weights.

    `folder` has `<task>_train_config.yaml`, of the target's run or, at `None`, beside the
    decomposition. Tensors there (`<task>.pth`) are checked against the copy.

    Raises:
        ArtefactError: If something is missing, damaged or of another run.
    """
    place = checkpoint.path.parent if folder is None else Path(folder).expanduser()
    file = next(iter(sorted(place.glob("*_train_config.yaml"))), None)
    if file is None:
        raise ArtefactError(
            f"{place}: there is no <task>_train_config.yaml, which says what the target "
            f"{checkpoint.config.target_run!r} is. Give the folder of that run as target=..."
        )
    kind, section = _TOYS[checkpoint.config.target_class]
    try:
        fields = read_yaml(file)
        model = kind(fields.get(section, fields))
        model.load_state_dict(checkpoint.state.target)
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{file}: the copy of the target in {checkpoint.path} is not what it describes: "
            f"{' '.join(str(error).split())[:400]}"
        ) from None
    saved = file.with_name(file.name.replace("_train_config.yaml", ".pth"))
    if saved.is_file():
        require_same(read_tensors(saved), checkpoint.state.target, saved)
    return model.eval()


def _linear(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    return skip_init(nn.Linear, d_in, d_out, bias=bias)  # type: ignore[return-value]
