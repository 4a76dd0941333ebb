"""Write the notebooks anew from their sources, executed: ``python notebooks/execute.py [NAME ...]``.

The sources are the ``.py`` files (jupytext, percent format); edit those. Figures and times in the notebooks are those
of the machine this runs on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("[0-9]*.py"))


def execute(source: Path) -> float:
    """Run one notebook in a new kernel and write it beside its source; return the seconds it took."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    began = time.perf_counter()
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute(cwd=str(HERE))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # random ones would change with every run
        cell.metadata = {}
        if cell.cell_type == "code":
            # What other packages log is of this machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # nbclient notes the Python it ran.
    notebook.metadata["language_info"] = {"name": "python"}
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    return time.perf_counter() - began


if __name__ == "__main__":
    for path in [HERE / f"{Path(name).stem}.py" for name in sys.argv[1:]] or SOURCES:
        print(f"{path.stem}: {execute(path):.0f} s", flush=True)
