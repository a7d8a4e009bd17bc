"""What the tests share: a copy of the project that they may edit, the real pictures, and one small run of the pipeline."""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import botocore.session
import pytest
from infra import TERRAFORM, flattened, init, run

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as the step runner sets it
# AWS's models of its services are read once, not for each of the many clients
botocore.session.create_loader = functools.cache(botocore.session.create_loader)

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
    "train.mix": "cutmix",
    "train.views": "2",
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
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    made = {"commit": git_commit(), "machine": machine, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    text = json.dumps({"figures": figures} | made, indent=1)
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
        (self.code / "nbs" / "serving").mkdir()
        for name in ("page.html", "openapi.json"):
            shutil.copy(ROOT / "nbs" / "serving" / name, self.code / "nbs" / "serving")
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


@pytest.fixture(scope="session")
def staged(tmp_path_factory):
    """A copy of what Terraform reads, with the Lambdas' zips, initialised."""
    if not shutil.which("terraform"):
        pytest.skip("terraform is not installed")
    root = tmp_path_factory.mktemp("account")
    ignore = shutil.ignore_patterns(".terraform*", "build", "*.tfstate*")
    shutil.copytree(TERRAFORM, root / "terraform", ignore=ignore)
    shutil.copytree(ROOT / "pipelines", root / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, TERRAFORM / "lambdas" / "build.py", root / "terraform" / "build"], check=True)
    init(root / "terraform", "-backend=false")
    return root / "terraform"


@pytest.fixture(scope="session")
def state(staged):
    """Staging, as `terraform test` made it; the test itself has passed."""
    done = run("terraform", "test", "-json", "-verbose", cwd=staged)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    problems = [line["@message"] for line in lines if line["@level"] == "error"]
    assert done.returncode == 0, "\n".join(problems) + done.stderr
    assert {line["test_run"]["run"] for line in lines if line["type"] == "test_run"} >= {
        "account",
        "refuses_bad_values",
    }
    return next(line["test_state"] for line in lines if line["type"] == "test_state")


@pytest.fixture(scope="session")
def resources(state):
    """All its resources."""
    return [r for r in flattened(state["root_module"]) if r["mode"] == "managed"]


# A graph that answers in a moment: the average colours, and the picture itself as maps.
COLOURS = """<ir_version: 10, opset_import: ["" : 18]>
colours (uint8[n, 32, 32, 3] images) => (float[n, 3] logits, float[n, 3] features, float[n, 3, 32, 32] maps) {
    x = Cast<to = 1>(images)
    axes = Constant<value_ints = [2, 3]>()
    maps = Transpose<perm = [0, 3, 1, 2]>(x)
    features = ReduceMean<keepdims = 0>(maps, axes)
    WORK
}"""
QUICK = "logits = Identity(features)"
SLOW = """one = Constant<value_ints = [1, 1]>()
    side = Constant<value_ints = [900, 900]>()
    all = ReduceMean<keepdims = 0>(features)
    mean = Reshape(all, one)
    wide = Expand(mean, side)
    much = MatMul(wide, wide)
    more = MatMul(much, wide)
    few = ReduceMean<keepdims = 0>(more)
    none = Constant<value_float = 0.0>()
    zero = Mul(few, none)
    logits = Add(features, zero)"""


def colours_package(folder: Path, slow: bool = False) -> Path:
    """A model package whose network is the graph above; `slow` costs some tens of milliseconds a run."""
    import onnx

    folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(COLOURS.replace("WORK", SLOW if slow else QUICK)), folder / "model.onnx")
    third = [1 / 3] * 3
    model = {"architecture": "colours", "dataset": "none", "synthetic": True, "classes": ["MEL", "NV", "AK"]}
    model |= {"image_size": 32, "calibration": {"temperature": 20.0}, "logit_shares": third, "class_shares": third}
    (folder / "model.json").write_text(json.dumps(model))
    return folder


class Served:
    """`skin-lesion serve` in a process of its own, and what it logs."""

    def __init__(self, package, *words, wait=True, **environ):
        command = [
            sys.executable,
            "-c",
            "from skin_lesion.cli import main; main()",
            "serve",
            *([str(package)] if package else []),
        ]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--host", "127.0.0.1", *words], stdout=subprocess.PIPE, text=True, env=env
        )
        self.lines, self.reader = [], threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.address = self.line("listening")["address"]
        self.url = "http://" + self.address
        if wait:
            self.line("ready")

    def _read(self):
        for text in self.process.stdout:
            self.lines.append(json.loads(text))

    def line(self, event, count=1, seconds=30):
        """The `count`-th line of that event, once it is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [line for line in self.lines if line["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            if self.process.poll() is not None and not self.reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no line {event} in {seconds} s: {self.lines[-5:]}")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        status = self.process.wait(40)
        self.reader.join(5)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def moto(monkeypatch):
    """A stand-in AWS on loopback, and the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    yield
    server.stop()
