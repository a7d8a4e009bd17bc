"""What the tests of the local engine share: a program that stands for the steps, a project to run it in, and its states."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from test_definition import get, join, processing

from skin_lesion.execution.definition import local_path
from skin_lesion.execution.engine import run

# A step's program. It notes its start, does what its options say, and leaves an output made of its inputs.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
name, root, work = sys.argv[1], Path(os.environ["SKIN_LESION_ROOT"]), Path(os.environ["TEST_WORK"])
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
hyper = root/"input/config/hyperparameters.json"
if hyper.exists(): options |= {f"--{k}": v for k, v in json.loads(hyper.read_text()).items()}
with open(work/"began", "a") as f: f.write(f"{name} {time.time()}\\n")
print(f"{name} begins", flush=True)
def stop(number, frame):
    (root/"checkpoints").mkdir(exist_ok=True)
    (root/"checkpoints/stopped").write_text("1")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if "--child" in options: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
if "--checkpoint" in options:
    steps = root/"checkpoints/steps"
    done = int(steps.read_text()) if steps.exists() else 0
    print(f"from {done}", flush=True)
    for i in range(done, 40):
        steps.write_text(str(i + 1))
        time.sleep(float(options["--checkpoint"]))
time.sleep(float(options.get("--sleep", 0)))
if "--fail" in options:
    (root/"output").mkdir(exist_ok=True)
    (root/"output/failure").write_text(options["--fail"])
    sys.exit(1)
if "--kill-times" in options and len([l for l in open(work/"began") if l.startswith(name + " ")]) <= int(options["--kill-times"]):
    os.kill(os.getpid(), signal.SIGKILL)
made = root/("model" if hyper.exists() else "processing/output/out")
if "--fill" in options: (made/"out.bin").write_bytes(bytes(int(options["--fill"])))
if options.get("--leave") != "nothing":
    files = sorted(p for folder in (root/"processing/input", root/"input/data") for p in folder.glob("*/*"))
    (made/"out.txt").write_text(name + "".join(p.read_text() for p in files if p.suffix == ".txt"))
    (made/"score.json").write_text(options.get("--score", '{"m": 1}'))
    if "--package" in options:
        (made/"model.json").write_text(json.dumps({"provenance": {"git_commit": options["--package"]}}))
        (made/"evaluation.json").write_text('{"balanced_accuracy": {"low": 0.6}}')
"""

ENGINE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from engine_project import Project
result = Project(sys.argv[2]).run(json.loads(sys.argv[3]), **json.loads(sys.argv[4]))
sys.exit(result.exit_code)
"""


class Project:
    """A working folder with a program that stands for all steps, and a notebook a step, which the cache reads."""

    def __init__(self, work):
        self.work, self.root = Path(work), Path(work) / "runs"
        os.environ["TEST_WORK"] = str(self.work)

    def make(self):
        (self.work / "program.py").write_text(PROGRAM)
        raw = local_path("s3://bucket/raw", self.root)
        raw.mkdir(parents=True)
        (raw / "raw.txt").write_text("raw")
        return self

    def notebook(self, words):
        file = self.work / f"{words[2]}.ipynb"
        if not file.exists():
            self.write_notebook(words[2], "1 + 1")
        return file

    def write_notebook(self, name, *sources):
        cells = [
            {"cell_type": "code", "source": s, "metadata": {}, "outputs": [], "execution_count": None, "id": f"c{i}"}
            for i, s in enumerate(sources)
        ]
        (self.work / f"{name}.ipynb").write_text(
            json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        )

    def command(self, words):
        assert words[:2] == ["skin-lesion", "step"]
        return [sys.executable, str(self.work / "program.py"), *words[2:]]

    def run(self, pipeline, **options):
        return run(pipeline, root=self.root, command=self.command, notebook=self.notebook, **options)

    def engine(self, pipeline, **options):
        """The same in a process of its own, to be killed."""
        words = [
            sys.executable,
            "-c",
            ENGINE,
            str(Path(__file__).parent),
            str(self.work),
            json.dumps(pipeline),
            json.dumps(options),
        ]
        return subprocess.Popen(words, stdout=open(self.work / "engine.log", "ab"), stderr=subprocess.STDOUT)

    def began(self):
        file = self.work / "began"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def new_project(tmp_path, monkeypatch):
    """The fixture `project` of the modules that test the engine."""
    monkeypatch.setenv("TEST_WORK", str(tmp_path))
    return Project(tmp_path).make()


RAW = "s3://bucket/raw"


def step(name, *inputs, cached=False, **options):
    """A Processing step; options go to the program."""
    arguments = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    extra = {"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}} if cached else {}
    return processing(name, inputs or [RAW], arguments, **extra)


def training(name, channel, cached=False, **hyperparameters):
    checkpoints = join("/", "s3://bucket", get("Execution.PipelineExecutionId"), "checkpoints")
    return {
        "Name": name,
        "Type": "Training",
        "Arguments": {
            "AlgorithmSpecification": {"ContainerEntrypoint": ["skin-lesion", "step"], "ContainerArguments": [name]},
            "HyperParameters": hyperparameters,
            "InputDataConfig": [{"ChannelName": "train", "DataSource": {"S3DataSource": {"S3Uri": channel}}}],
            "OutputDataConfig": {"S3OutputPath": join("/", "s3://bucket", get("Execution.PipelineExecutionId"))},
            "CheckpointConfig": {"S3Uri": checkpoints, "LocalPath": "/opt/ml/checkpoints"},
        },
        **({"CacheConfig": {"Enabled": True, "ExpireAfter": "P1D"}} if cached else {}),
    }


def statuses(execution):
    return {s["StepName"]: s["StepStatus"] for s in execution.state["PipelineExecutionSteps"]}


def hits(execution):
    return {s["StepName"] for s in execution.state["PipelineExecutionSteps"] if "CacheHitResult" in s}


def wait_for(moment, seconds=30):
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.02)


def processes(work):
    """The processes of steps of a project that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("SKIN_LESION_ROOT", "").startswith(str(work))
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found
