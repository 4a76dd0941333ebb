"""`kvembed.plots`: what is drawn, that it shows itself, and that nothing global is touched."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import ConfigError, KVStore, Usage, plots
from kvembed._testing import keys_of, put_all, random_chain

if TYPE_CHECKING:
    from pathlib import Path

COLD = Usage(prompt_tokens=2000, completion_tokens=8, ttft_s=5.0, total_s=6.0)
WARM = Usage(
    prompt_tokens=2010, completion_tokens=8, cached_tokens_by_tier={"disk": 1500, "cpu": 490}, ttft_s=0.2, saved_s=4.9
)
PREPARED = Usage(prompt_tokens=2000, total_s=5.0)  # of a document: nothing was generated


def texts(figure: Any) -> list[str]:
    (ax,) = figure.axes
    return [note.get_text() for note in ax.texts]


def png(figure: Any) -> bytes:
    data, about = figure._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert about["image/png"]["width"] > 300
    return data["image/png"]


def test_time_to_first_token() -> None:
    figure = plots.ttft([PREPARED, COLD, WARM], labels=["doc", "cold", "warm"])
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cold", "warm"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([5.0, 0.2, 0.2 + 4.9])  # the last one hollow: without the cache
    assert not ax.patches[-1].get_fill()
    assert texts(figure) == ["5.00 s", "0.20 s, without the cache ≈ 5.10 s"]
    png(figure)


def test_no_calls() -> None:
    assert texts(plots.ttft([PREPARED])) == ["nothing was generated yet"]
    assert texts(plots.tokens([])) == ["no calls yet"]


def test_tokens_by_tier() -> None:
    figure = plots.tokens([COLD, WARM])
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [2000, 490, 1500, 20]
    assert [bar.get_hatch() for bar in ax.patches] == [None, "//", "..", None]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cpu", "disk", "computed"]
    png(figure)


def test_the_store(tmp_path: Path) -> None:
    with KVStore(tmp_path / "store") as store:
        assert texts(plots.growth(store)) == ["nothing is on disk yet"]
        assert texts(plots.hit_rates(store)) == ["no calls logged yet"]
        assert texts(plots.written(store)) == ["nothing written yet"]
        chain = random_chain(5)
        put_all(store, chain)
        store.touch(keys_of(chain))
        store.flush()
        grown = store.growth()
        assert len(grown) == 5
        assert [nbytes for _, nbytes in grown] == sorted(nbytes for _, nbytes in grown)
        assert grown[-1][1] == sum(model.nbytes for model in store.stats().models)
        assert grown == sorted(grown)
        for figure in (plots.growth(store), plots.hit_rates(store), plots.written(store)):
            png(figure)
        curve = store.hit_curve()
        (ax,) = plots.hit_rates(curve).axes
        assert len(ax.lines[0].get_xdata()) == len(curve.budgets)


def test_a_store_in_memory_has_no_growth() -> None:
    with KVStore(max_disk_bytes=None) as store:
        assert store.growth() == []


def test_axes_of_ones_own_are_drawn_into() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.ttft([COLD], ax=left) is figure
    assert plots.tokens([COLD], ax=right) is figure
    assert left.patches
    assert right.patches


def test_labels_must_be_as_many_as_calls() -> None:
    with pytest.raises(ConfigError, match="2 calls but 1 labels"):
        plots.tokens([COLD, WARM], labels=["one"])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvembed\[notebook\]'"):
        plots.tokens([COLD])


def test_importing_it_loads_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = (
        "import sys; from kvembed import plots, Usage; assert 'matplotlib' not in sys.modules;"
        "plots.tokens([Usage(prompt_tokens=3)])._repr_mimebundle_();"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
