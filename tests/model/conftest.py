"""Fixtures of the model side's tests: the three tiny families, a lab, and plain runs that are made once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ._lab import Lab, run_full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAMILIES = ("llama", "mistral", "gemma3")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    # Tiny models gain nothing from threads, and lose much where other programs use the processor too.
    before = torch.get_num_threads()
    # `make test` gives each of its processes one thread: real models have to be exact with several too.
    torch.set_num_threads((os.cpu_count() or 1) if getattr(request.module, "ALL_THREADS", False) else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def makers(tiny_llama: Any, tiny_mistral: Any, tiny_gemma3: Any) -> dict[str, Callable[..., Any]]:
    """The factory of each family, by name."""
    return dict(zip(FAMILIES, (tiny_llama, tiny_mistral, tiny_gemma3), strict=True))


@pytest.fixture(scope="session")
def models(makers: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """One model of each family, shared by all tests that leave it as it is."""
    return {name: make() for name, make in makers.items()}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    """Each family in turn: full attention, sliding, and both mixed. Not to be changed."""
    return models[request.param]


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    """The tiny llama. Not to be changed."""
    return models["llama"]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Stores and cached models that are closed and checked after the test."""
    lab = Lab(tmp_path)
    yield lab
    lab.finish()


@pytest.fixture(scope="session")
def plain() -> Callable[..., Any]:
    """Run a plain model with `_lab.run_full`; each different run is made once."""
    memo: dict[Any, Any] = {}

    def call(model: Any, ids: torch.Tensor, new: int = 12) -> Any:
        key = (id(model), tuple(ids[0].tolist()), new)
        if key not in memo:
            memo[key] = model, run_full(model, ids, new)  # the model too: it keeps the id from being used again
        return memo[key][1]

    return call
