"""What cannot be decomposed is refused before anything is attached, with the cause."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens

CASES = ["bridge-gpt2-default", "bridge-llama-default", "hooked-ln"]


@pytest.mark.parametrize("case", CASES)
def test_decomposing_twice(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach, remove
    from vpd_lens.errors import AttachError

    model = attach(build(case), n_subcomponents=5)
    vpd = model.vpd
    with pytest.raises(AttachError, match="decomposed already"):
        attach(model, n_subcomponents=5)
    assert model.vpd is vpd
    remove(model)
    with pytest.raises(AttachError, match="no decomposition"):
        remove(model)
    attach(model, n_subcomponents=7)
    assert model.vpd.layout.sizes[0] == 7


@pytest.mark.parametrize(
    ("case", "flag"),
    [
        ("bridge-gpt2-default", "use_split_qkv_input"),
        ("bridge-llama-processed", "use_split_qkv_input"),
        ("hooked-ln", "use_split_qkv_input"),
        ("bridge-gpt2-default", "use_attn_result"),
        ("bridge-llama-default", "use_attn_result"),
        ("hooked-ln", "use_attn_in"),
    ],
)
def test_flags_that_bypass_matrices(case: str, flag: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError

    model = build(case)
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(AttachError, match=flag):
        attach(model, n_subcomponents=5)
    assert "vpd" not in model.__dict__
    getattr(model, f"set_{flag}")(False)
    attach(model, n_subcomponents=5)


@pytest.mark.parametrize(("case", "refused"), [("native-ln", True), ("hooked-ln", False)])
def test_transformers_that_lose_the_cache_of_bridges(
    case: str, refused: bool, build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpd_lens.decomposition import attach as module
    from vpd_lens.errors import AttachError

    model = build(case)
    version = module.importlib.metadata.version
    monkeypatch.setattr(
        module.importlib.metadata,
        "version",
        lambda name: "5.24.0" if name == "transformers" else version(name),
    )
    if refused:
        with pytest.raises(AttachError, match=r"transformers<5\.24"):
            module.attach(model, n_subcomponents=5)
        assert "vpd" not in model.__dict__
    else:
        module.attach(model, n_subcomponents=5)


def test_adapters_even_while_they_are_zero(build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError

    class Adapted(nn.Module):
        """What peft puts around a linear module; its second factor starts at zero."""

        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.a = nn.Linear(base_layer.in_features, 2, bias=False)
            self.b = nn.Linear(2, base_layer.out_features, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.b(self.a(x))

    model = build("bridge-llama-default")
    q = model.blocks[0].attn.q
    q.set_original_component(Adapted(q.original_component))
    with pytest.raises(AttachError, match=r"blocks\.0\.attn\.q carries an adapter"):
        attach(model, n_subcomponents=5)


@pytest.mark.parametrize("case", CASES)
def test_sites_that_do_not_exist(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError, ConfigError

    model = build(case)
    with pytest.raises(AttachError, match=r"matches no site.*blocks\.0\.attn\.q"):
        attach(model, sites="no_such_matrix")
    with pytest.raises(AttachError, match=r"No site named \['blocks.9.attn.q'\]"):
        attach(model, sites=["blocks.0.attn.q", "blocks.9.attn.q"])
    with pytest.raises(ConfigError, match="match no site"):
        attach(model, n_subcomponents={"no_such_matrix": 4})
    assert not any(".vpd" in name for name in model.hook_dict)


@pytest.mark.parametrize("case", CASES)
def test_selecting_sites_by_pattern_list_and_unembed(
    case: str, build: Callable[..., nn.Module]
) -> None:
    from vpd_lens.decomposition.attach import attach, remove

    model = build(case)
    before = model(tokens())
    for select, expected in [
        (r"blocks\.1\.attn\.[qk]$", ["blocks.1.attn.q", "blocks.1.attn.k"]),
        (["blocks.1.mlp.out", "blocks.0.attn.o"], ["blocks.0.attn.o", "blocks.1.mlp.out"]),
        (["unembed"], ["unembed"]),
    ]:
        attach(model, sites=select, n_subcomponents=5)
        assert list(model.vpd.layout.names) == expected
        ones = torch.ones(model.vpd.layout.total)
        with model.vpd.masked(ones):
            assert torch.equal(model(tokens()), before)
        with model.vpd.masked("zero"):
            assert not torch.equal(model(tokens()), before)
        remove(model)


class Packed(nn.Linear):
    """What 4-bit loading leaves of a linear layer: its weight packed into bytes `[n, 1]`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.dense = linear
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


def test_quantised_weights(build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError

    model = build("bridge-llama-default")
    for part in (model.blocks[0].attn._modules["q"], model.blocks[1].mlp._modules["in"]):
        part.set_original_component(Packed(part.original_component))
    with pytest.raises(
        AttachError, match=r"(?s)2 of 14.*blocks\.0\.attn\.q: .*quantised.*blocks\.1\.mlp\.in"
    ):
        attach(model, n_subcomponents=5)
    assert "vpd" not in model.__dict__


@pytest.mark.parametrize("case", CASES)
def test_self_check_finds_a_wrong_weight(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError
    from vpd_lens.sites import find_sites

    model = build(case)
    right, wrong = find_sites(model, ["blocks.0.attn.q", "blocks.1.attn.o"])
    weight = wrong.weight + 0.01
    wrong.read_weight = lambda: weight
    with pytest.raises(AttachError, match=r"1 of 2 sites.*\n.*blocks\.1\.attn\.o: x W \+ b"):
        attach(model, sites=[right, wrong], n_subcomponents=5)
    assert "vpd" not in model.__dict__


@pytest.mark.parametrize("case", CASES)
def test_hook_points_that_do_not_exist(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach, remove
    from vpd_lens.errors import InputError

    model, x = attach(build(case), n_subcomponents=5), tokens()
    name = "blocks.0.mlp.in.vpd.hook_maks"
    hooks = [(name, lambda value, hook: value)]
    meant = r"no hook point .*hook_maks'; did you mean blocks\.0\.mlp\.in\.vpd\.hook_mask\?"
    with pytest.raises(InputError, match=meant):
        model.run_with_hooks(x, fwd_hooks=hooks)
    with pytest.raises(InputError, match=meant), model.hooks(hooks):
        pass
    with pytest.raises(InputError, match=meant):
        model.run_with_cache(x, names_filter=[name])
    expected = model(x)
    right = [(name.replace("maks", "mask"), lambda value, hook: value)]
    assert torch.equal(model.run_with_hooks(x, fwd_hooks=right), expected)
    remove(model)
    assert "run_with_hooks" not in model.__dict__
