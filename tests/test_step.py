"""The strict step runner: real kernels, one fault a test."""

import json
import subprocess
import sys

import psutil
import pytest
from notebook_step import COMMAND, Step, eventually, fails

from skin_lesion.execution.step import FAILED, REFUSED

# A step that ends well


def test_green(tmp_path):
    step = Step(
        tmp_path,
        "word: str\nupto: int = 1",
        "for i in range(upto): print(word, i)",
        "import os, sys\nprint(os.getcwd(), sys.executable)",
    )
    step.config("/opt/ml/output/failure", "of an earlier attempt")
    code, out, err = step.run("--word", 'a "b"', "--upto=2")
    assert (code, err) == (0, ""), err
    assert "cell 3/4" in out and 'a "b" 0\na "b" 1\n' in out
    assert not (step.root / "output/failure").exists()
    assert f"{step.root}/scratch {sys.executable}\n" in out
    assert set(step.states()) == {"completed"}


def test_personal_jupyter_does_not_matter(tmp_path):
    home = tmp_path / "home"
    for folder in (".local/share/jupyter/kernels/python3", ".ipython/kernels/python3"):
        (home / folder).mkdir(parents=True)
        (home / folder / "kernel.json").write_text(
            '{"argv": ["/bin/false"], "display_name": "stale", "language": "python"}'
        )
    startup = home / ".ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("surprise = 1")
    (home / "rc.py").write_text("surprise = 1")
    step = Step(tmp_path, "a: int = 1", 'assert "surprise" not in globals()')
    code, _, err = step.run(env={"HOME": str(home), "PYTHONSTARTUP": str(home / "rc.py")})
    assert code == 0, err


def test_leaves_nothing_in_the_temporary_folder(tmp_path):
    (tmp_path / "t").mkdir()
    code, _, err = Step(tmp_path, "a: int = 1").run(env={"TMPDIR": str(tmp_path / "t")})
    assert code == 0, err
    assert list((tmp_path / "t").iterdir()) == []


def test_atexit_of_the_notebook_runs(tmp_path):
    step = Step(tmp_path, "a: int = 1", 'import atexit, pathlib\natexit.register(pathlib.Path("bye").touch)')
    assert step.run()[0] == 0
    assert (step.root / "scratch/bye").exists()


def test_control_thread_ends_before_its_sockets(tmp_path):
    """Jupyter alone closes them first, and now and then hangs or aborts."""
    slow = """
def slow(kernel):
    import pathlib, threading, time
    publish = kernel._publish_status_and_flush
    def late(*args):
        if threading.current_thread() is kernel.control_thread: time.sleep(0.5)
        publish(*args)
        if kernel.iopub_thread.thread.is_alive(): pathlib.Path(threading.current_thread().name).touch()
    kernel._publish_status_and_flush = late
slow(get_ipython().kernel)
assert "atexit" not in globals()"""
    step = Step(tmp_path, "a: int = 1", slow)
    assert step.run()[0] == 0
    assert (step.root / "scratch/Control").exists()


def test_children_of_the_notebook_end_with_it(tmp_path):
    step = Step(
        tmp_path,
        "a: int = 1",
        'import subprocess, pathlib\npathlib.Path("pid").write_text(str(subprocess.Popen(["sleep", "300"]).pid))',
    )
    assert step.run()[0] == 0
    pid = int((step.root / "scratch/pid").read_text())
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_training_layout(tmp_path):
    step = Step(
        tmp_path,
        'epochs: int = 1\nlearning_rate: float = 1.0\narchitecture: str = "a"\npretrained: bool = True',
        'import os, pathlib\n(pathlib.Path(os.environ["SKIN_LESION_ROOT"])/"model/m").write_text("m")',
        'assert (epochs, learning_rate, architecture, pretrained) == (3, 5e-4, "resnet50", False)',
        name="20_train",
    )
    step.config(
        "/opt/ml/input/config/hyperparameters.json",
        {"epochs": "3", "learning_rate": "0.0005", "architecture": '"resnet50"', "pretrained": "false"},
    )
    step.config("/opt/ml/input/config/resourceconfig.json", {})
    code, _, err = step.run()
    assert code == 0, err
    assert (step.root / "output/data/20_train.ipynb").exists()


# Refused before anything runs


@pytest.mark.parametrize(
    "args, text",
    [
        (["--epoch", "3"], "There is no parameter 'epoch', did you mean 'epochs'?"),
        (["--epochs", "3.5"], "--epochs '3.5' must be a whole number"),
        (["--epochs", "many"], "--epochs 'many' must be a whole number"),
        (["--rate", "nan"], "--rate 'nan' must be a number"),
        (["--fast", "yes"], "--fast 'yes' must be true or false"),
        (["--epochs", "1", "--epochs", "2"], "Parameter 'epochs' is given twice"),
        (["--epochs"], "--epochs has no value"),
        (["epochs=3"], "'epochs=3' is not an option"),
        ([], "Parameter 'data' has no default"),
    ],
)
def test_refused_parameters(tmp_path, args, text):
    step = Step(tmp_path, "data: str\nepochs: int = 1\nrate: float = 0.1\nfast: bool = False")
    code, out, err = step.run(*(["--data", "x"] if args else []), *args)
    assert code == REFUSED
    assert text in err and text in step.failure
    assert "cell" not in out and not step.saved.exists()


def test_refused_hyperparameter(tmp_path):
    step = Step(tmp_path, "epochs: int = 1")
    step.config("/opt/ml/input/config/hyperparameters.json", {"epochs": "1", "seed": "1"})
    code, _, err = step.run()
    assert code == REFUSED and "no parameter 'seed'" in err and "epochs (int)" in step.failure


def test_given_in_both_places(tmp_path):
    step = Step(tmp_path, "epochs: int = 1")
    step.config("/opt/ml/input/config/hyperparameters.json", {"epochs": "1"})
    code, _, err = step.run("--epochs", "1")
    assert code == REFUSED and "given twice" in err


@pytest.mark.parametrize(
    "parameters, tags, text",
    [
        ("a: int = 1", (), '0 cells tagged "parameters"'),
        ("a = 1", ("parameters",), "'a = 1' in the parameters cell is not annotated"),
        ("a: list = []", ("parameters",), "not annotated with one of int, float, bool, str"),
    ],
)
def test_refused_notebook(tmp_path, parameters, tags, text):
    step = Step(tmp_path, parameters, tags=tags)
    code, _, err = step.run()
    assert code == REFUSED and text in err


def test_unknown_step(tmp_path):
    done = subprocess.run([*COMMAND, "trian"], capture_output=True, text=True)
    assert done.returncode == REFUSED and "There is no step 'trian'. Steps are:" in done.stderr


# Strict where papermill is lax


def test_exception(tmp_path):
    fails(
        Step(tmp_path, "a: int = 0", "# a comment\nx = 1 / a", "a"),
        "tiny, cell 2: ZeroDivisionError: division by zero",
        "\n  x = 1 / a",
        states=["completed", "failed", "pending"],
    )


def test_reason_fits_and_leads(tmp_path):
    step = Step(tmp_path, "a: int = 0", 'raise ValueError("é" * 5000)')
    assert step.run()[0] == FAILED
    assert step.failure.startswith("tiny, cell 2: ValueError: éé")
    assert len((step.root / "output/message").read_bytes()) <= 1024


def test_exception_that_a_tag_allows(tmp_path):
    step = Step(tmp_path, "a: int = 0", "1 / a", "a")
    nb = json.loads(step.notebook.read_text())
    nb["cells"][1]["metadata"]["tags"] = ["raises-exception"]
    step.notebook.write_text(json.dumps(nb))
    code, _, err = step.run()
    assert code == FAILED and "cell 2: ZeroDivisionError" in err


@pytest.mark.parametrize(
    "source, text",
    [
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "the kernel died of SIGKILL. Often the machine has run out of memory",
        ),
        ("import ctypes\nctypes.string_at(0)", "the kernel died of SIGSEGV"),
        ("import os\nos._exit(0)", "the kernel ended itself with code 0"),
    ],
)
def test_dead_kernel(tmp_path, source, text):
    fails(Step(tmp_path, "a: int = 0", source, "a"), f"tiny, cell 2: {text}", states=["completed", "failed", "pending"])


@pytest.mark.parametrize(
    "source, text",
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0. Cells not executed after it: 1"),
        ("raise SystemExit", "SystemExit. Cells not executed after it: 1"),
        ("exit()", "exit() or quit() was called"),
        ("quit()", "exit() or quit() was called"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_early_exit(tmp_path, source, text):
    fails(Step(tmp_path, "a: int = 0", source, "a"), f"tiny, cell 2: {text}", states=["completed", "failed", "pending"])


def test_skipped_cell(tmp_path):
    step = Step(tmp_path, "a: int = 0", 'print("work")', "a")
    nb = json.loads(step.notebook.read_text())
    nb["cells"][1]["metadata"]["tags"] = ["skip-execution"]
    step.notebook.write_text(json.dumps(nb))
    code, _, err = step.run()
    assert code == FAILED and "cell 2: was not executed" in err


def test_empty_cells_are_no_fault(tmp_path):
    code, _, err = Step(tmp_path, "a: int = 0", "", "# only a comment").run()
    assert code == 0, err


OUTPUTS = {
    "ProcessingOutputConfig": {
        "Outputs": [
            {"OutputName": n, "S3Output": {"S3Uri": f"s3://b/{n}", "LocalPath": f"/opt/ml/processing/output/{n}"}}
            for n in ("table", "train", "report")
        ]
    }
}
WRITE = 'import os, pathlib\n(pathlib.Path(os.environ["SKIN_LESION_ROOT"])/"processing/output/{}").write_text("{}")'


def test_missing_output(tmp_path):
    step = Step(tmp_path, "a: int = 0", WRITE.format("table/t", "x"), WRITE.format("train/t", ""))
    step.config("/opt/ml/config/processingjobconfig.json", OUTPUTS)
    fails(step, f"every cell ran, but {step.root}/processing/output/train holds no file", states=["completed"] * 3)


def test_outputs_there(tmp_path):
    step = Step(tmp_path, "a: int = 0", WRITE.format("table/t", "x"), WRITE.format("train/t", "x"))
    step.config("/opt/ml/config/processingjobconfig.json", OUTPUTS)
    code, _, err = step.run()
    assert code == 0, err


def test_training_without_a_model(tmp_path):
    step = Step(tmp_path, "a: int = 0", name="20_train")
    code, _, err = step.run()
    assert code == FAILED and f"{step.root}/model holds no file" in err
    assert not (step.root / "output/message").exists()


def test_full_disk_keeps_the_last_whole_notebook(tmp_path):
    import resource

    step = Step(tmp_path, "a: int = 0", 'print("first")', 'print("x" * 2_000_000)', "a")
    code, _, err = step.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)))
    assert code == FAILED and "could not be saved" in err and "Is the disk full?" in step.failure
    assert "first" in json.dumps(json.loads(step.saved.read_text()))
    assert not list(step.saved.parent.glob("*.part"))
