"""`attach`: the cache inside the model object, and its way out again."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvembed import ConfigError, attach, attached, detach

from ._lab import BLOCK, Lab, random_ids, run, tokens

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = random_ids(3 * BLOCK + 3)


def test_generate_goes_through_the_cache(lab: Lab, model: Any) -> None:
    expected = tokens(run(model, PROMPT))
    cached = attach(model, store=lab.store(), block_size=BLOCK, progress=False)
    try:
        for _ in range(2):
            assert tokens(run(model, PROMPT)) == expected
        assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        assert attached(model) is cached
        assert cached.hf_model is model
        # What is passed through goes to transformers, not round in circles.
        with pytest.warns(UserWarning, match="use_cache=False"):
            assert tokens(run(model, PROMPT, use_cache=False)) == expected
        with pytest.raises(ConfigError, match="attached already"):
            attach(model)
    finally:
        detach(model)
    assert attached(model) is None
    assert "generate" not in vars(model)
    assert tokens(run(model, PROMPT)) == expected
    with pytest.raises(ConfigError, match="nothing is attached"):
        detach(model)


def test_copies_pickles_and_saved_models_are_plain(lab: Lab, model: Any, tmp_path: Path) -> None:
    expected = tokens(run(model, PROMPT))
    cached = attach(model, store=lab.store(), block_size=BLOCK, progress=False)
    try:
        run(model, PROMPT)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path / "saved")
        calls = cached.usage
        others: list[Any] = [twin, again, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")]
        for other in others:
            assert attached(other) is None
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.0)
            assert tokens(run(other, PROMPT)) == expected
            assert other.generate.__self__ is other
        assert cached.usage is calls
    finally:
        detach(model)


def test_the_signature_is_that_of_transformers(lab: Lab, model: Any) -> None:
    import inspect

    before = inspect.signature(model.generate)
    attach(model, store=lab.store(), block_size=BLOCK)
    try:
        assert inspect.signature(model.generate) == before
    finally:
        detach(model)
