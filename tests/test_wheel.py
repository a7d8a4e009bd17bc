"""A wheel needs no checkout: settings, step notebooks and compiled definitions travel inside it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from conftest import ROOT, Project


def test_the_wheel_carries_settings_notebooks_and_definitions(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    project = Project(tmp_path / "unused")
    project.env["PYTHONPATH"] = str(tmp_path / "site")
    settings = project.cli("settings")
    assert settings.returncode == 0 and "train.epochs" in settings.stdout, settings.stderr
    cost = project.cli("cost", "endpoint")  # from the prices that are bundled
    assert cost.returncode == 0 and "ml.c5.large" in cost.stdout, cost.stderr
    where = "import skin_lesion.settings as s; print(s.project_root())"
    found = subprocess.run([sys.executable, "-c", where], env=project.env, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(tmp_path / "site/skin_lesion/project")
    assert project.cli("data", "sample", "--out", "tiny", "--lesions", "24").returncode == 0
    root = project.work / "root"
    (root / "processing/input").mkdir(parents=True)
    (project.work / "tiny").rename(root / "processing/input/raw")
    project.env["SKIN_LESION_ROOT"] = str(root)
    step = project.cli("step", "prepare")
    assert step.returncode == 0, step.stderr
    assert (root / "processing/output/table/split_proof.json").exists()


def test_the_source_distribution_makes_the_same_wheel(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t"]
    subprocess.run([*build, "sdist", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*build, "wheel", "-d", tmp_path / "here"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        packed.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("skin_lesion-*/"))
    assert not {"runs", "data", "site", ".venv"} & {p.name for p in source.iterdir()}
    subprocess.run([*build, "wheel", "-d", tmp_path / "there"], cwd=source, check=True, capture_output=True)
    here, there = (zipfile.ZipFile(next((tmp_path / name).glob("*.whl"))) for name in ("here", "there"))
    names = {i.filename for i in here.infolist()}
    assert {i.filename: i.CRC for i in here.infolist()} == {i.filename: i.CRC for i in there.infolist()}
    for pattern in ("settings.ini", "nbs/steps/*.ipynb", "pipelines/*", "pipelines/definitions/*.json", "nbs/*/*.json", "nbs/*/*.html"):  # fmt: skip
        carried = [p for p in ROOT.glob(pattern) if p.is_file()]
        assert carried and {f"skin_lesion/project/{p.relative_to(ROOT).as_posix()}" for p in carried} <= names


def test_onnx_runtime_is_told_not_to_report_its_use():
    """Before anything of the package can import it; what somebody has set stays."""
    code = "import os, skin_lesion; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for value, environ in (("1", {}), ("0", {"ORT_DISABLE_TELEMETRY": "0"})):
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)} | environ
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == value


@pytest.mark.slow
def test_the_wheel_alone_trains_and_serves_by_the_steps_of_the_release(tmp_path):
    """An environment that holds the wheel and what it depends on, and a folder outside of the checkout."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    if not all(shutil.which(tool) for tool in ("uv", "curl")):
        pytest.skip("uv or curl is not on this machine")
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    shutil.copy(ROOT / "requirements.lock", tmp_path / "dist")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"UV_LINK_MODE": "hardlink", "PYTHONNOUSERSITE": "1"}
    for step in jobs["test"]["steps"]:
        if name := step.get("name"):
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    where = [tmp_path / "empty" / "bin" / "python", "-c", "import skin_lesion; print(skin_lesion.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path / "empty"))
