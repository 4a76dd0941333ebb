"""The notebooks agree with their sources, and say nothing of the machine they ran on. `notebooks/` itself runs them."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
_OF_A_MACHINE = re.compile(r"/(?:home|root|Users|work|opt|tmp|workspace|var/folders)/|[A-Z]:\\\\|site-packages")


def test_there_are_five() -> None:
    assert [path.stem[:2] for path in SOURCES] == ["01", "02", "03", "04", "05"]
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source_executed(source: Path) -> None:
    written = jupytext.read(source)
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(executed)
    assert [(c.cell_type, c.source) for c in executed.cells] == [(c.cell_type, c.source) for c in written.cells], (
        "run notebooks/execute.py"
    )
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    # Every notebook asserts something, and draws its own figures.
    assert any("assert " in cell.source for cell in code)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        text = output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text"))
        assert not _OF_A_MACHINE.search(text), text
