"""The guides that nbdev-test leaves out, executed at their smallest size."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow  # two trainings
@pytest.mark.timeout(1200)
def test_from_drift_to_a_new_model(tmp_path):
    out = tmp_path / "done.ipynb"
    words = ["-m", "papermill", ROOT / "nbs/guides/drift_to_retrain.ipynb", out, "-p", "smoke", "True"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "SKIN_LESION_COMMIT": "test", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for cell in json.loads(out.read_text())["cells"] for o in cell.get("outputs", [])]
    said = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    assert "ALARM drift: " in said and "lasting" in said
    assert "started | retraining because of drift" in said and "ended | Version 2 " in said
    assert "not retrained: cool-down" in said
    assert sum("image/jpeg" in o.get("data", {}) for o in outputs) >= 2
