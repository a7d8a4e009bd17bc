"""Each guide is executed as a person would, and says what its committed outputs say, times and numbers apart."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

GUIDES = {p.stem: p for p in sorted((ROOT / "nbs" / "guides").glob("*.ipynb"))}
CODE = [n for n, p in GUIDES.items() if '"cell_type": "code"' in p.read_text()]
QUICK = {"own_data", "read_report"}  # seconds; none of them trains, serves or compiles
# the outputs of these are the same each time but for numbers and paths
SAME = {"extend", "notebook_jobs", "own_data", "sagemaker", "studio", "troubleshooting"}


def said(notebook):
    """The text that a notebook shows, a cell an entry, numbers as # and spaces as one."""
    texts = []
    for cell in notebook.cells:
        parts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])]
        texts.append(
            re.sub(
                r"\s+", " ", re.sub(r"\d{8}T\d{6}-[0-9a-f]{4}|[0-9a-f]{12,}|\d[\d.,:T+-]*", "#", " ".join(parts))
            ).strip()
        )
    return texts


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CODE])
def test_the_guide_runs(name, request, tmp_path, monkeypatch):
    committed = nbformat.read(GUIDES[name], as_version=4)
    code = [c.source for c in committed.cells if c.cell_type == "code"]
    for variable in [v for v in os.environ if v.startswith(("SKIN_LESION_", "AWS_"))]:
        monkeypatch.delenv(variable)
    if any("find_run" in source for source in code):  # a guide about the last run
        finished = request.getfixturevalue("finished")
        monkeypatch.setenv("SKIN_LESION_LOCAL_RUNS", str(finished.work / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where guides make what they need
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    executed = nbformat.read(GUIDES[name], as_version=4)
    NotebookClient(executed, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if name in SAME:
        assert said(executed) == said(committed)


def test_each_guide_is_left_out_where_notebooks_are_executed_as_they_are():
    """`make notebooks` runs none of them: they are run here, with what they need."""
    first = {n: nbformat.read(p, as_version=4).cells[0] for n, p in GUIDES.items()}
    assert {n for n, c in first.items() if c.cell_type == "raw" and "skip_exec: true" in c.source} >= SAME | QUICK


def test_each_guide_stands_in_the_list_of_the_readme():
    linked = re.findall(r"\(nbs/guides/(\w+)\.ipynb\)", (ROOT / "README.md").read_text())
    assert set(linked) == set(GUIDES)


def test_outputs_are_committed_and_small():
    for name, path in GUIDES.items():
        assert path.stat().st_size < 200_000, name
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert not cells or any(c.outputs for c in cells), name
        assert "/work/" not in Path(path).read_text() and "/tmp/" not in Path(path).read_text(), name
