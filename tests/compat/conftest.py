from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .builders import (
    boot,
    has_hooked_transformer,
    hooked,
    make_tokenizer,
    native,
    save_architecture,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.compat)


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    """`build("bridge-llama-processed")`, `build("native-ln")`, `build("hooked-rms")`: a new model.

    Saved architectures are written on first use. HookedTransformer cases skip the test where
    TransformerLens no longer has the class.
    """
    folder = tmp_path_factory.mktemp("models")

    def new(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        kind, name, *mode = case.split("-")
        if kind == "bridge":
            return boot(save_architecture(name, folder), *mode, dtype=dtype)
        if kind == "native":
            return native(name, dtype)
        if not has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        return hooked(name, dtype)

    return new


@pytest.fixture(scope="session")
def decomposed(build: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """`decomposed("native-ln")`: the model with 5 subcomponents at every site, made once.

    Leave it as it was found; tests that change a model build their own.
    """
    from vpd_lens.decomposition.attach import attach

    @cache
    def attached(case: str) -> nn.Module:
        return attach(build(case), sites="attn" if "mixtral" in case else "all", n_subcomponents=5)

    return attached


@pytest.fixture(scope="session")
def undecomposed(build: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """`undecomposed("native-ln")`: the same model as it was, made once; leave it so."""
    return cache(build)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer loaded from disk, as HookedTransformer wants it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
