"""Three hundred random cases of a fixed seed; see `random_cases`."""

from __future__ import annotations

import pytest

from .random_cases import draw, run_cases


@pytest.mark.parametrize("part", range(10))
def test_random_cases(part: int) -> None:
    cases = draw(300, seed=2026)[30 * part : 30 * part + 30]
    assert list(run_cases(cases)) == []
