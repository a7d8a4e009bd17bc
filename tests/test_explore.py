"""The notebooks of nbs/explore, executed on a few pictures, and what their committed outputs say of all of them."""

import base64
import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import DATA, ROOT

EXPLORE = ROOT / "nbs" / "explore"
NAMES = ["01_eda", "02_baseline", "03_experiments"]
CLASSES = 7


def said(path):
    """What each code cell of a notebook printed."""
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return ["".join(o.text for o in c.outputs if o.output_type == "stream" and o.name == "stdout") for c in code]


def figures(path):
    """The dictionary that a notebook prints last."""
    return json.loads(said(path)[-1])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What one notebook has computed, the next one takes: pictures, copies, graph."""
    return tmp_path_factory.mktemp("explore")


def run(name, folder, data):
    """A notebook's figures, executed by papermill with `smoke`."""
    out = folder / f"{name}-{data.name}.ipynb"
    words = ["-m", "papermill", "--no-progress-bar", EXPLORE / f"{name}.ipynb", out]
    words += ["-p", "smoke", "True", "-p", "data_dir", data, "-p", "work_dir", folder / data.name]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("SYNTHETIC pictures" in "".join(said(out))) == (data != DATA)
    return figures(out)


@pytest.mark.slow  # it runs on real ones below, and the other two on drawn ones
def test_the_look_at_the_pictures_runs_on_drawn_ones(work):
    found = run("01_eda", work, work / "absent")
    assert found["classes"] == CLASSES and found["lesions"] < found["images"]
    assert found["leak"].keys() == {"drawn sample"} and found["leak"]["drawn sample"] > 0.5
    assert found["traps"].keys() == {
        "source",
        "age, sex, site",
        "what of these is missing",
        "nine numbers of the whole picture",
    }
    assert found["traps"]["nine numbers of the whole picture"] > 1 / CLASSES


def test_the_look_at_the_pictures_runs_on_real_ones(work, shared_data):
    found = run("01_eda", work, DATA)
    assert found["classes"] == CLASSES and found["images"] < 300
    assert round(found["leak"]["ISIC 2019"], 2) == 0.61  # of the whole tables
    assert found["missing"]["ISIC 2019"] == {"age": 437, "sex": 384, "site": 2631}
    assert -1 < found["skin_tone_fitzpatrick"] < 1 and "dx_type" in found["traps"]


def test_the_baseline_runs(work):
    found = run("02_baseline", work, work / "absent")
    assert found["leaked"]["by lesion"] == 0 and found["leaked"]["by picture (leaky)"] > 0.5
    assert found["leak_adds"]["nearest neighbour"][0] > 0
    assert all(value > 1 / CLASSES for by in found["balanced_accuracy"].values() for value, _, _ in by.values())


def test_the_experiments_run(work):
    found = run("03_experiments", work, work / "absent")
    rows = {row["what"]: row for row in found["rows"]}
    assert len(rows) == found["experiments"]
    base = rows["baseline: 64 px, weighted classes"]
    assert base["difference"] == [0, 0, 0] and base["verdict"] == "" and base["balanced_accuracy"][0] > 1 / CLASSES
    assert {row["verdict"] for row in rows.values()} <= {"", "helps", "hurts", "not shown"}


def test_the_committed_figures_are_those_of_the_whole_data_set():
    eda, baseline, experiments = (figures(EXPLORE / f"{name}.ipynb") for name in NAMES)
    assert (eda["images"], eda["lesions"]) == (10015, 7470) == (baseline["images"], 7470)
    assert eda["leak"] == {"HAM10000": 0.386, "ISIC 2019": 0.606} and eda["pairs_of_two_lesions"] == 16
    assert baseline["leaked"]["by lesion"] == 0
    for adds in baseline["leak_adds"].values():  # a leak flatters, and more than chance
        assert adds[1] > 0
    bench = json.loads((ROOT / "bench" / "imbalance_full.json").read_text())["figures"]
    assert baseline["test_split"]["fine_tuned"] == bench["logit_adjustment"]["test"]["balanced_accuracy"]
    assert (baseline["test_split"]["images"], baseline["test_split"]["lesions"]) == (1501, 1122)
    assert experiments["images"] == 10015
    base = next(row for row in experiments["rows"] if row["what"].startswith("baseline"))
    assert base["balanced_accuracy"] == pytest.approx(
        baseline["balanced_accuracy"]["logistic regression"]["by lesion"], abs=0.003
    )


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed_and_small(name):
    path = EXPLORE / f"{name}.ipynb"
    assert path.stat().st_size < 400_000 and "/work/" not in path.read_text()
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    pictures = [o.data["image/jpeg"] for o in outputs if "image/jpeg" in o.get("data", {})]
    assert pictures and max(len(base64.b64decode(p)) for p in pictures) < 100_000
    assert f"(nbs/explore/{name}.ipynb)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_nbdev_test_leaves_them_out(name):
    assert "skip_exec: true" in nbformat.read(EXPLORE / f"{name}.ipynb", as_version=4).cells[0].source
