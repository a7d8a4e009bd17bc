"""What the tests of the step runner share: a notebook of code cells that is run as a step, and its processes."""

import json
import os
import subprocess
import sys
import time

import nbformat.v4 as v4
import psutil

from skin_lesion.execution.step import FAILED, opt_ml

COMMAND = [sys.executable, "-m", "skin_lesion.execution.step"]


class Step:
    """A notebook of code cells, run in a root of its own."""

    def __init__(self, folder, parameters, *sources, tags=("parameters",), name="10_tiny"):
        self.root = folder / "root"
        self.root.mkdir()
        nb = v4.new_notebook(cells=[v4.new_code_cell(s) for s in (parameters, *sources)])
        nb.cells[0].metadata["tags"] = list(tags)
        self.notebook = folder / f"{name}.ipynb"
        self.notebook.write_text(json.dumps(nb))
        self.saved = self.root / "processing/output/report" / self.notebook.name

    def start(self, *args, **kw):
        env = {**os.environ, "SKIN_LESION_ROOT": str(self.root), **kw.pop("env", {})}
        return subprocess.Popen(
            [*COMMAND, str(self.notebook), *args],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **kw,
        )

    def run(self, *args, **kw):
        process = self.start(*args, **kw)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def config(self, path, content):
        file = opt_ml(self.root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    @property
    def failure(self):
        return (self.root / "output/failure").read_text()

    def states(self):
        return [
            c["metadata"]["papermill"]["status"]
            for c in json.loads(self.saved.read_text())["cells"]
            if c["cell_type"] == "code"
        ]


def fails(step, *texts, states, **kw):
    """The step ends with 1, says `texts` in all places, and keeps its notebook with `states`."""
    code, _, err = step.run(**kw)
    assert code == FAILED
    for text in texts:
        assert text in err and text in step.failure, err
    assert (step.root / "output/message").read_text() == step.failure
    assert str(step.saved) in err
    assert step.states() == states
    assert "This notebook is incomplete" in "".join(json.loads(step.saved.read_text())["cells"][0]["source"])


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def kernel_of(process):
    """The kernel of a runner once its notebook has written its process id."""
    return eventually(
        lambda: [p for p in psutil.Process(process.pid).children() if "ipykernel_launcher" in " ".join(p.cmdline())]
    )[0]


def running(step, **kw):
    """A runner whose notebook has arrived in its long cell, and its kernel."""
    process = step.start(**kw)
    kernel = kernel_of(process)
    assert eventually((step.root / "scratch/here").exists, 20), process.communicate(timeout=5)
    return process, kernel


HERE = 'import pathlib, time\npathlib.Path("here").touch()\ntime.sleep(120)'
