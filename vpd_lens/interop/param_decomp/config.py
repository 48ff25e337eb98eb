"""The YAML file of a published run, in every layout that the authors have used, as one record.

| file | from | what names the sites |
|---|---|---|
| `final_config.yaml` | before October 2025 | `target_module_patterns`, and one `C` for all |
| `final_config.yaml` | until May 2026, all published `s-...` runs | `module_info` |
| `experiment_config.yaml` | June 2026 | `pd.decomposition_targets` |

Older layouts are first rewritten as the published one. Only what decides the decomposition is read;
how it was trained is kept as it is, for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.config.base import read_yaml
from vpd_lens.errors import ArtefactError, ConfigError

FILES = ("final_config.yaml", "experiment_config.yaml")

# Their causal importance functions, and ours.
_KINDS = {
    "mlp": "mlp",
    "vector_mlp": "vector_mlp",
    "shared_mlp": "shared_mlp",
    "layerwise_global_mlp": "shared_mlp",
    "global_shared_mlp": "global_mlp",
    "global_shared_transformer": "transformer",
}

# Fields of any layout that are read below, or say how a run was trained, measured and logged.
_FIELDS = """
    C autocast_bf16 batch_size cadence ci_alive_threshold ci_config ci_fn_hidden_dims
    ci_fn_optimizer ci_fn_type ci_recon_coeff ci_recon_layerwise_coeff components_optimizer data
    decomposition_targets dist_backend eval eval_batch_size eval_freq eval_metric_configs
    eval_metrics faithfulness_coeff faithfulness_warmup_lr faithfulness_warmup_steps
    faithfulness_warmup_weight_decay gate_hidden_dims gate_type gradient_accumulation_steps
    grad_clip_norm grad_clip_norm_ci_fns grad_clip_norm_components identity_decomposition_targets
    identity_module_info identity_module_patterns importance_minimality_coeff init_pd_checkpoint
    init_spd_checkpoint loss_metric_configs loss_metrics lr lr_exponential_halflife lr_schedule
    lr_warmup_pct module_info n_eval_steps n_examples_until_dead n_mask_samples out_dir
    output_extract output_loss_type p_anneal_end_frac p_anneal_final_p p_anneal_start_frac pd pnorm
    pretrained_model_class pretrained_model_name pretrained_model_name_hf
    pretrained_model_output_attr pretrained_model_path print_freq recon_coeff recon_layerwise_coeff
    runtime sampling save_freq schatten_coeff seed sigmoid_type slow_eval_freq
    slow_eval_on_first_step steps stochastic_recon_coeff stochastic_recon_layerwise_coeff target
    target_module_patterns task_config tied_weights tokenizer_name train_log_freq
    use_delta_component use_global_ci wandb wandb_project wandb_run_name wandb_run_name_prefix
"""
_KNOWN = frozenset(_FIELDS.split())
_KNOWN_CI = frozenset({"mode", "fn_type", "hidden_dims", "simple_transformer_ci_cfg"})


@dataclass(frozen=True)
class RunConfig:
    """What a published run's YAML file says about its decomposition.

    Attributes:
        path: The file.
        patterns: Pairs of a `fnmatch` pattern of module paths and the number of subcomponents of
            each module that matches.
        importance: The causal importance function.
        target_class: Name of the target's class, such as `LlamaSimpleMLP`.
        target_run: Where its weights are: a W&B run, or a name on the Hugging Face hub.
        tokenizer: The tokenizer's name, if any.
        divergence: What the reconstruction losses compare by, if the file says so.
        values: The file as it is.
        unknown: Fields that no layout known here has; they were ignored.
    """

    path: Path
    patterns: tuple[tuple[str, int], ...]
    importance: CausalImportanceConfig
    target_class: str
    target_run: str | None
    tokenizer: str | None
    divergence: str | None
    values: dict[str, Any]
    unknown: tuple[str, ...]


def read_config(folder: Path) -> RunConfig:
    """Read the YAML file of a run's folder.

    Raises:
        ArtefactError: If there is none, it is no run's, or names something that is not supported:
            identity sites, another causal importance function or sigmoid.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise ArtefactError(
            f"{folder}: neither {' nor '.join(FILES)} is there, so its sites and its target are "
            "unknown. Download it from the run, beside the model_*.pth."
        )
    try:
        values = read_yaml(path)
    except ConfigError as error:
        raise ArtefactError(str(error)) from None
    try:
        return _run_config(path, values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtefactError(f"{path}: not the configuration of a decomposition: {what}.") from None


def _run_config(path: Path, values: dict[str, Any]) -> RunConfig:
    sections = "pd" in values
    flat = _from_sections(values) if sections else _from_old_names(values)
    given = {**values, **values["pd"]} if sections else values
    unknown = [key for key, value in given.items() if value is not None and key not in _KNOWN]
    if flat.get("identity_module_info"):
        raise ArtefactError(
            f"{path}: the run decomposes identity sites (identity_module_info), matrices that were "
            "inserted into the target. No TransformerLens model has them; the run cannot be "
            "imported."
        )
    if (sigmoid := flat.get("sigmoid_type", "leaky_hard")) != "leaky_hard":
        raise ArtefactError(
            f"{path}: sigmoid_type is {sigmoid!r}. Only leaky_hard, which all published runs have, "
            "gives importances that mean the same here."
        )
    names = (flat.get("pretrained_model_name"), flat.get("pretrained_model_path"))
    ci = {key: value for key, value in flat["ci_config"].items() if value is not None}
    return RunConfig(
        path=path,
        patterns=tuple((str(i["module_pattern"]), int(i["C"])) for i in flat["module_info"]),
        importance=_importance(path, ci),
        target_class=str(flat["pretrained_model_class"]).rsplit(".", 1)[-1],
        target_run=next(filter(None, names), None),
        tokenizer=flat.get("tokenizer_name"),
        divergence=flat.get("output_loss_type"),
        values=values,
        unknown=(*unknown, *(f"ci_config.{key}" for key in ci if key not in _KNOWN_CI)),
    )


def _from_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of June 2026."""
    flat, target = dict(values["pd"]), values["target"]
    spec = target["spec"]
    flat["module_info"] = flat.pop("decomposition_targets")
    flat["identity_module_info"] = flat.pop("identity_decomposition_targets", None)
    flat["pretrained_model_class"] = spec.get("model_class", spec.get("kind"))
    flat["pretrained_model_name"] = spec.get("run_path", spec.get("model_name"))
    flat["tokenizer_name"] = (values.get("data") or {}).get("tokenizer_name")
    return flat


def _from_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The published layout from itself, or from one with names that are older."""
    flat = dict(values)
    for name in ("module", "identity_module"):
        old = "target_module_patterns" if name == "module" else "identity_module_patterns"
        if patterns := flat.pop(old, None):
            flat[f"{name}_info"] = [{"module_pattern": p, "C": flat["C"]} for p in patterns]
    for old in ("gate", "ci_fn"):
        kind, hidden = flat.pop(f"{old}_type", None), flat.pop(f"{old}_hidden_dims", None)
        if kind is not None or hidden is not None:
            kind = "global_shared_mlp" if flat.get("use_global_ci") else kind or "vector_mlp"
            flat["ci_config"] = {"fn_type": kind, "hidden_dims": hidden or [8]}  # their defaults
    if name := flat.pop("pretrained_model_name_hf", None):
        flat["pretrained_model_name"] = name
    return flat


def _importance(path: Path, ci: Mapping[str, Any]) -> CausalImportanceConfig:
    """The causal importance function of a `ci_config` without its nulls."""
    kind = _KINDS.get(ci["fn_type"])
    if kind is None:
        raise ArtefactError(
            f"{path}: the causal importance function {ci['fn_type']!r} is not supported; these "
            f"are: {', '.join(_KINDS)}."
        )
    if kind != "transformer":
        hidden = tuple(ci["hidden_dims"])
        return CausalImportanceConfig(kind=kind, hidden=hidden if len(hidden) > 1 else sum(hidden))
    size, attention = (
        ci["simple_transformer_ci_cfg"],
        ci["simple_transformer_ci_cfg"]["attn_config"],
    )
    hidden = size.get("mlp_hidden_dim") or [4 * size["d_model"]]
    if len(hidden) != 1:
        raise ArtefactError(
            f"{path}: the importance transformer's MLPs have {len(hidden)} hidden layers "
            f"(mlp_hidden_dim {hidden}); only one is supported."
        )
    return CausalImportanceConfig(
        kind=kind,
        d_model=size["d_model"],
        n_blocks=size["n_blocks"],
        n_heads=attention["n_heads"],
        d_ffn=hidden[0],
        rope_base=attention.get("rope_base", 10_000.0),
    )
