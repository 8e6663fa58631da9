"""The notebook runs from its first cell to its last, in a kernel of its own."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "jobs" / "notebooks" / "from_parquet_to_recommendations.ipynb"


@pytest.mark.slow
def test_the_notebook_recommends_what_users_like(monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.get("outputs")]
    assert len(saved) >= 6, "save it with its outputs"
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3").execute()
    share = notebook.cells[-1]["outputs"][0]["text"]
    assert share.endswith("of the user's group\n") and int(share.split("%")[0]) > 30  # by chance 10
