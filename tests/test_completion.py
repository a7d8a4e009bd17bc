"""The tab key in real shells: what `skin-lesion completion` prints is sourced, and something is typed."""

import os
import pty
import shutil
import subprocess
import sys
import time

import pytest

RUN = "20260301T090000-1a2b"


def installed(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    return shell


@pytest.fixture
def typist(project):
    """A project with one run, and an environment whose PATH has `skin-lesion`."""
    (project.work / "runs" / RUN).mkdir(parents=True)
    (project.work / "runs" / RUN / "steps.json").write_text("{}")
    command = project.work / "bin" / "skin-lesion"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom skin_lesion.cli import main\nmain(prog_name='skin-lesion')\n")
    command.chmod(0o755)
    project.env["PATH"] = f"{command.parent}{os.pathsep}{project.env['PATH']}"
    return project


def shell(project, *words):
    done = subprocess.run(words, env=project.env, cwd=project.work, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def in_bash(project, typed):
    words = typed.split(" ")
    script = """source <(skin-lesion completion bash)
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_skin_lesion_completion skin-lesion; printf '%s\\n' "${COMPREPLY[@]}"; complete -p skin-lesion"""
    *offered, registered = shell(project, "bash", "-c", script, "bash", *words)
    assert "_skin_lesion_completion skin-lesion" in registered
    return offered


def in_fish(project, typed):
    lines = shell(project, installed("fish"), "-c", "skin-lesion completion fish | source; complete -C $argv[1]", typed)
    return [line.partition("\t")[0] for line in lines]


@pytest.mark.parametrize("offers", [in_bash, in_fish])
def test_commands_options_settings_pipelines_and_runs_are_offered(typist, offers):
    assert set(offers(typist, "skin-lesion co")) == {"compile", "completion", "cost"}
    assert offers(typist, "skin-lesion run tr") == ["training"]
    assert "--resume" in offers(typist, "skin-lesion run training --")
    assert offers(typist, "skin-lesion run training --resume 2026") == [RUN]
    assert offers(typist, "skin-lesion run training --set train.ep") == ["train.epochs="]
    assert offers(typist, "skin-lesion completion f") == ["fish"]


BASH = """source <(skin-lesion completion bash)
show() { printf '%s\\n' "$READLINE_LINE" >> SEEN; READLINE_LINE=; }; bind -x '"\\C-t": show'; touch SEEN
"""
ZSH = """autoload -Uz compinit && compinit -u -d dump
source <(skin-lesion completion zsh)
show() { print -r -- "$BUFFER" >> SEEN; BUFFER= }; zle -N show; bindkey '^T' show; bindkey '^I' complete-word; touch SEEN
"""


@pytest.mark.parametrize("words, startup", [("bash --rcfile bashrc -i", BASH), ("zsh -d -i", ZSH)], ids=["bash", "zsh"])
def test_what_is_typed_is_completed_and_a_setting_waits_for_its_value(typist, words, startup):
    """In a terminal, as line editors want it: the tab key, then Ctrl-T writes down the line as it stands."""
    seen, program = typist.work / "seen", installed(words.split()[0])
    (typist.work / ("bashrc" if program == "bash" else ".zshrc")).write_text(startup.replace("SEEN", str(seen)))
    env = typist.env | {"ZDOTDIR": str(typist.work), "TERM": "xterm"}
    outer, inner = pty.openpty()
    process = subprocess.Popen(words.split(), stdin=inner, stdout=inner, stderr=inner, env=env, cwd=typist.work, start_new_session=True)  # fmt: skip
    os.close(inner)
    os.set_blocking(outer, False)

    def wait(done):
        end, said = time.monotonic() + 60, b""
        while not done():
            try:
                said += os.read(outer, 65536)
            except BlockingIOError:
                time.sleep(0.02)
            assert process.poll() is None and time.monotonic() < end, said

    try:
        wait(seen.exists)
        typed = ["compl", "run tr", f"run training --resume {RUN[:4]}", "run training --set train.ep", "completion f"]
        for at, begun in enumerate(typed, 1):
            os.write(outer, f"skin-lesion {begun}\t\x14".encode())
            wait(lambda at=at: seen.read_text().count("\n") == at)
    finally:
        process.kill()
        process.wait()
        os.close(outer)
    lines = [line.removeprefix("skin-lesion ") for line in seen.read_text().splitlines()]
    whole = ["completion ", "run training ", f"run training --resume {RUN} ", "run training --set train.epochs="]
    assert lines == [*whole, "completion fish "]
