"""A step that is told to stop, killed or left alone, and what its runner logs meanwhile."""

import json
import os
import signal
import subprocess
import sys

import psutil
from notebook_step import COMMAND, HERE, Step, eventually, running

from skin_lesion.execution.logs import Lines

# Told to stop


def test_sigterm(tmp_path):
    step = Step(tmp_path, "a: int = 0", HERE, "a")
    process, kernel = running(step)
    process.terminate()
    out, err = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGTERM
    assert "tiny, cell 2: stopped by SIGTERM" in err and "stopped by SIGTERM" in step.failure
    assert not kernel.is_running()
    assert step.states() == ["completed", "failed", "pending"]


def test_sigterm_lets_the_notebook_write_a_checkpoint(tmp_path):
    handler = (
        'import signal, pathlib, time\ndef save(*_):\n    time.sleep(2); pathlib.Path("checkpoint").touch(); raise SystemExit(0)\n'
        "signal.signal(signal.SIGTERM, save)"
    )
    step = Step(tmp_path, "a: int = 0", handler, HERE, "a")
    process, kernel = running(step)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "stopped by SIGTERM" in step.failure
    assert (step.root / "scratch/checkpoint").exists()
    assert not kernel.is_running()


def test_kill_9_of_the_runner_ends_the_kernel(tmp_path):
    process, kernel = running(Step(tmp_path, "a: int = 0", HERE))
    process.kill()
    process.wait()
    psutil.wait_procs([kernel], timeout=5)
    assert not kernel.is_running() or kernel.status() == "zombie"


def test_death_of_the_engine_ends_runner_and_kernel(tmp_path):
    step = Step(tmp_path, "a: int = 0", HERE)
    engine = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys\n"
            'os.environ["SKIN_LESION_PARENT_PID"] = str(os.getpid())\nsubprocess.run(sys.argv[1:])',
            *COMMAND,
            str(step.notebook),
        ],
        env={**os.environ, "SKIN_LESION_ROOT": str(step.root)},
    )
    assert eventually((step.root / "scratch/here").exists, 20)
    (runner,) = psutil.Process(engine.pid).children()
    (kernel,) = runner.children()
    engine.kill()
    engine.wait()
    psutil.wait_procs([runner, kernel], timeout=5)
    for p in (runner, kernel):
        assert not p.is_running() or p.status() == "zombie"


# Logs


def test_logs_stream_as_lines(tmp_path):
    bar = (
        'import sys, time\nfor i in range(30):\n    sys.stderr.write(f"\\r{i}/30"); sys.stderr.flush(); time.sleep(.02)\n'
        'sys.stderr.write("\\n")\nprint("after", end="")'
    )
    step = Step(tmp_path, "a: int = 0", bar, HERE)
    process, _ = running(step)
    try:
        lines = [process.stdout.readline() for _ in range(4)]  # arrives while the last cell sleeps
        assert lines[2:] == ["after\n", "cell 3/3  import pathlib, time\n"]
    finally:
        process.terminate()
        _, err = process.communicate(timeout=15)
    shown = [s for s in err.splitlines() if "/30" in s]
    assert shown[-1] == "29/30" and len(shown) == 2


def test_lines_of_a_bar_that_ends_with_a_carriage_return(capsys):
    log = Lines(sys.stdout, every=0)
    for text in ("10%\r", "20%\r", "20%\r", "done\r\n", "\n", "half", " line"):
        log.write(text)
    log.end()
    assert capsys.readouterr().out.split("\n") == ["10%", "20%", "done", "", "half line", ""]


def test_saved_notebook_holds_a_bar_once(tmp_path):
    step = Step(
        tmp_path, "a: int = 0", 'import sys\nfor i in range(500): sys.stderr.write(f"\\r{i}/500"); sys.stderr.flush()'
    )
    assert step.run()[0] == 0
    outputs = json.loads(step.saved.read_text())["cells"][1]["outputs"]
    assert ["".join(o["text"]) for o in outputs] == ["499/500"]


def test_cost_of_an_empty_step(tmp_path):
    """The issue allows 2.5 s a step. Processor time, which other work on the machine does not lengthen; make bench shows the wall's."""
    before = os.times()
    assert Step(tmp_path, "a: int = 0").run()[0] == 0
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2.5
