"""JupyterLab as the workbench: hooks, the merge of notebooks, and a step by hand on the inputs of a run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

BIN = Path(sys.executable).parent
for tool in ("git", "make"):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not on this machine", allow_module_level=True)


class Checkout:
    """A git repository with the project's Makefile and hooks, for a person whose PATH has no environment in it."""

    def __init__(self, folder):
        self.folder, self.home = folder / "code", folder / "home"
        (self.folder / "nbs").mkdir(parents=True)
        self.home.mkdir()
        outside = os.pathsep.join(
            p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nbdev-merge").exists()
        )
        self.env = os.environ | {"HOME": str(self.home), "PATH": outside, "GIT_CONFIG_NOSYSTEM": "1"}
        for name in ("Makefile", ".gitattributes", ".gitignore", "pyproject.toml", "settings.ini"):
            shutil.copy(ROOT / name, self.folder)
        self.run("git", "init", "-q", "-b", "main")
        for key, value in {"name": "test", "email": "test@example.org"}.items():
            self.run("git", "config", f"user.{key}", value)
        self.make("hooks")

    def run(self, *words, code=0):
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def make(self, target):
        return self.run("make", "-o", "install", f"BIN={BIN}", target)

    def commit(self, notebook):
        nbformat.write(notebook, self.folder / "nbs" / "a.ipynb")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "change")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def notebook(first="a = 1", second="b = 2", answer="1", count=1):
    output = new_output("execute_result", {"text/plain": answer}, execution_count=count)
    return new_notebook(
        cells=[
            new_code_cell(first, id="first", execution_count=count, outputs=[output], metadata={"tags": [f"t{count}"]}),
            new_code_cell("", id="between"),
            new_code_cell(second, id="second", execution_count=count + 1),
        ]
    )


def merged(checkout, ours, theirs, code):
    """Both branches leave the same notebook, and are merged."""
    checkout.commit(notebook())
    checkout.run("git", "switch", "-qc", "theirs")
    checkout.commit(theirs)
    checkout.run("git", "switch", "-q", "main")
    checkout.commit(ours)
    checkout.run("git", "merge", "-q", "theirs", code=code)
    return nbformat.read(checkout.folder / "nbs" / "a.ipynb", as_version=4)


def test_two_branches_that_ran_one_notebook_and_changed_other_cells_merge(checkout):
    ours, theirs = notebook(first="a = 3", answer="3", count=7), notebook(second="b = 4", answer="5", count=9)
    found = merged(checkout, ours, theirs, code=0)
    assert [c.source for c in found.cells] == ["a = 3", "", "b = 4"]
    assert found.cells[0].outputs[0].data["text/plain"] == "3" and found.cells[0].metadata.tags == ["t7"]
    assert checkout.run("git", "status", "--porcelain") == ""


def test_two_branches_that_changed_one_cell_leave_a_notebook_that_opens_and_shows_both(checkout):
    found = merged(checkout, notebook(first="a = 3", count=7), notebook(first="a = 4", count=9), code=1)
    nbformat.validate(found)
    text = "\n".join(c.source for c in found.cells)
    assert "a = 3" in text and "a = 4" in text and "<<<<<<<" in text
    assert "AA nbs/a.ipynb" in (status := checkout.run("git", "status", "--porcelain")) or "UU nbs/a.ipynb" in status


def test_the_hooks_can_be_installed_twice_and_leave_nothing_to_commit(checkout):
    checkout.commit(notebook())
    checkout.make("hooks")
    assert checkout.run("git", "status", "--porcelain") == ""
    config = (checkout.home / ".jupyter" / "jupyter_server_config.py").read_text()
    assert config.count("pre_save_hook = nbdev_clean_jupyter") == 1


def contents(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def by_hand(project, name, work, **parameters):
    """Executes a step notebook as Jupyter does, some parameters changed, on the inputs of the last run."""
    found = nbformat.read(next((ROOT / "nbs" / "steps").glob(f"*_{name}.ipynb")), as_version=4)
    cell = next(c for c in found.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    env = {k: v for k, v in project.env.items() if k != "SKIN_LESION_ROOT"}
    env["SKIN_LESION_RUN"] = str(project.work / "runs" / "latest")
    client = NotebookClient(found, timeout=250, resources={"metadata": {"path": str(work)}})
    client.execute(env=env)
    return "".join(o.get("text", "") for c in found.cells for o in c.get("outputs", []))


def test_a_step_by_hand_reads_the_run_and_leaves_it_as_it_was(finished, tmp_path):
    before = contents(finished.work / "runs")
    text = by_hand(finished, "register", tmp_path)
    assert f"register with the inputs that it had in run {(finished.work / 'runs' / 'latest').resolve().name}" in text
    assert contents(finished.work / "runs") == before


@pytest.mark.slow
def test_a_parameter_is_changed_by_hand(finished, tmp_path):
    before = contents(finished.work / "runs")
    text = by_hand(finished, "train", tmp_path, architecture="mobilenetv2", pretrained=False, epochs=3, batch_size=16)
    assert "epochs = 2" in text and "epoch=2 train_loss" in text  # the run's, and ours
    assert contents(finished.work / "runs") == before


@pytest.mark.slow
def test_make_lab_opens_the_notebooks_and_cleans_what_it_saves(checkout, finished):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = {"open_browser": False, "port": port, "token": "t", "allow_root": True, "ip": "127.0.0.1"}
    (checkout.home / ".jupyter" / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": options}))
    (checkout.folder / "runs").symlink_to(finished.work / "runs")
    checkout.commit(notebook())
    words = ["make", "-o", "install", f"BIN={BIN}", "lab"]
    lab = subprocess.Popen(words, cwd=checkout.folder, env=checkout.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip

    def ask(path, value=None):
        body = value and json.dumps(value).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body, {"Authorization": "token t"}, method="PUT" if value else "GET")  # fmt: skip
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    try:
        for _ in range(300):
            try:
                ask("api/status")
                break
            except (urllib.error.URLError, ConnectionError):
                assert lab.poll() is None, lab.stdout.read()
                time.sleep(0.1)
        opened = ask("api/contents/a.ipynb")
        cell = opened["content"]["cells"][0]
        cell["execution_count"], cell["metadata"] = 77, {"tags": ["parameters"], "scrolled": True}
        ask("api/contents/a.ipynb", {"type": "notebook", "format": "json", "content": opened["content"]})
        environ = Path(f"/proc/{server_of(lab.pid)}/environ").read_text().split("\0")
        assert f"SKIN_LESION_RUN={checkout.folder / 'runs' / 'latest'}" in environ
    finally:
        os.killpg(lab.pid, 15)
        lab.wait(30)
    saved = json.loads((checkout.folder / "nbs" / "a.ipynb").read_text())["cells"][0]
    assert saved["execution_count"] is None and saved["metadata"] == {"tags": ["parameters"]}


def server_of(pid):
    """The process of JupyterLab below make."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return children[-1]
