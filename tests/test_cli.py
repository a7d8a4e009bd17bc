"""The command line's own promises: quick help, refusals that a person understands."""

import subprocess
import time

from click.testing import CliRunner

from skin_lesion.cli import main


def test_help_answers_within_a_second(project):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = project.cli("--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "skin-lesion run training" in done.stdout
    assert min(seconds) < 1, seconds


def test_help_imports_nothing_heavy(project):
    code = "import sys; sys.argv=['skin-lesion', '--help']\nfrom skin_lesion.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'sagemaker', 'pandas', 'numpy', 'boto3', 'papermill') if m in sys.modules])"
    done = subprocess.run([project.command()[0], "-c", code], env=project.env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_of_a_command_is_no_refusal():
    for words in (["run"], ["data"], ["data", "download"]):
        done = CliRunner().invoke(main, [*words, "--help"])
        assert done.exit_code == 0 and "Error" not in done.output, done.output


def test_settings_say_where_they_come_from(project):
    (project.work / "settings.ini").write_text("[train]\nepochs = 5\n")
    project.env["SKIN_LESION_TRAIN_SEED"] = "9"
    lines = project.cli("settings", "--set", "train.batch_size=8").stdout.splitlines()
    found = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert found["train.epochs"] == ["5", str(project.work / "settings.ini")]
    assert found["train.seed"] == ["9", "$SKIN_LESION_TRAIN_SEED"]
    assert found["train.batch_size"] == ["8", "--set"]
    assert found["train.optimizer"] == ["adamw", "settings.ini"]


def test_refusals_name_the_remedy(project):
    cases = {
        ("settings", "--set", "train.epoch=3"): "no setting 'train.epoch'",
        ("settings", "--set", "train.epochs=three"): "must be a whole number",
        ("settings", "--set", "train.epochs"): "key=value",
        ("run", "trainning"): "there is experiments, monitoring, search, training",
        ("run", "training", "--dataset", "ham10000"): "--data-dir",
        ("run", "training", "--dataset", "ham1000", "--data-dir", "."): "ham10000",
        ("run", "training", "--resume", "nothing"): "no run",
        ("predict", "missing.tar.gz", "."): "no model package",
        ("data", "check", "ham10000", "."): "HAM10000_metadata.csv",
        ("step", "prepar"): "prepare",
    }
    for words, expected in cases.items():
        done = project.cli(*words)
        assert done.returncode != 0 and expected in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr, words
