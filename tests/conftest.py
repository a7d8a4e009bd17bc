"""What the tests share: a copy of the project that they may edit, the real pictures, and one small run of the pipeline."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as the step runner sets it

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
# the smallest run that goes through every line: 32 px, one pass, a handful of lesions
TINY = {
    "data.image_size": "32",
    "train.architecture": "mobilenetv2",
    "train.pretrained": "false",
    "train.epochs": "2",
    "train.batch_size": "16",
    "train.warmup_epochs": "0",
    "train.ema_decay": "0.5",
    "evaluate.bootstrap": "50",
    "evaluate.min_lesions": "2",
    "gate.balanced_accuracy_low": "0",
    "gate.melanoma_sensitivity": "0",
}


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets."""
    if not DATA.is_dir():
        pytest.skip("the real pictures (../shared/data) are not on this machine")
    return DATA


def keep(name, figures):
    """Prints the figures and writes them, with what they were measured on, to bench/NAME.json."""
    import torch  # here, because most tests do without

    from skin_lesion.training.provenance import git_commit

    cpu = next(
        (line.split(": ")[1] for line in open("/proc/cpuinfo") if "model name" in line), platform.processor()
    ).strip()
    machine = {"processor": cpu, "threads": torch.get_num_threads()}
    text = json.dumps({"figures": figures, "commit": git_commit(), "machine": machine}, indent=1)
    (ROOT / "bench" / f"{name}.json").write_text(text + "\n")
    print(f"\n{name}: {json.dumps(figures, indent=1)}")


class Project:
    """A copy of the project's files and a working folder, for tests that edit or break something."""

    def __init__(self, folder: Path):
        self.code, self.work = folder / "code", folder / "work"
        self.work.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("skin_lesion", "pipelines", "nbs/steps"):
            shutil.copytree(ROOT / name, self.code / name, ignore=ignore)
        shutil.copy(ROOT / "settings.ini", self.code)
        self.env = os.environ | {"PYTHONPATH": str(self.code), "SKIN_LESION_COMMIT": "test", "OMP_NUM_THREADS": "1"}

    def command(self, *words) -> list[str]:
        return [sys.executable, "-c", "from skin_lesion.cli import main; main()", *map(str, words)]

    def cli(self, *words, **options) -> subprocess.CompletedProcess:
        """Runs `skin-lesion` with the words, in the working folder."""
        options = {"cwd": self.work, "env": self.env, "capture_output": True, "text": True, "timeout": 280} | options
        return subprocess.run(self.command(*words), **options)

    def tiny_run(self, *words, **settings) -> list[str]:
        """The words of a tiny training run on a tiny sample."""
        pairs = TINY | {name.replace("__", "."): value for name, value in settings.items()}
        return ["run", "training", *words, *(f"--set={name}={value}" for name, value in pairs.items())]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project in which one tiny run of the training pipeline has ended green."""
    project = Project(tmp_path_factory.mktemp("finished"))
    made = project.cli("data", "sample", "--out", "tiny", "--lesions", "40")
    assert made.returncode == 0, made.stderr
    done = project.cli(*project.tiny_run("--data-dir", "tiny"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    project.output = done.stdout
    return project
