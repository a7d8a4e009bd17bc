"""One space for the tuning job and for this machine, and (slow) a search that is killed and goes on."""

import copy
import json
import re
import signal
import subprocess

import pandas as pd
import pytest

from skin_lesion.cloud.compile import unsafe_jobs, validate
from skin_lesion.execution.definition import PipelineError, plan
from skin_lesion.execution.local import load_definition
from skin_lesion.execution.parameters import coerce, read_hyperparameters, read_parameters
from skin_lesion.settings import load_settings, project_file
from skin_lesion.training.space import read_space

DEFINITION = load_definition("search")
TUNE = next(s["Arguments"] for s in DEFINITION["Steps"] if s["Type"] == "Tuning")


def test_the_tuning_job_searches_the_stated_space():
    settings = load_settings(environ={})
    config, stated = TUNE["HyperParameterTuningJobConfig"], read_space(settings)
    numbers = {r["Name"]: r for r in config["ParameterRanges"]["ContinuousParameterRanges"]}
    choices = {r["Name"]: r["Values"] for r in config["ParameterRanges"]["CategoricalParameterRanges"]}
    assert numbers.keys() | choices.keys() == stated.keys() and not numbers.keys() & choices.keys()
    for name, found in stated.items():
        kind = type(settings[f"train.{name}"].value)
        if found.scale == "one of":
            assert tuple(map(kind, choices[name])) == found.values
        else:
            ends = tuple(kind(numbers[name][end]) for end in ("MinValue", "MaxValue"))
            scale = {"Logarithmic": "log", "Linear": "linear"}[numbers[name]["ScalingType"]]
            assert (scale, ends) == found
    assert config["ResourceLimits"]["MaxNumberOfTrainingJobs"] == settings["search.trials"].value


def test_what_is_searched_and_what_is_fixed_are_the_parameters_of_the_step():
    takes = read_parameters(project_file("nbs", "steps", "20_train.ipynb"))
    fixed = TUNE["TrainingJobDefinition"]["StaticHyperParameters"]
    searched = read_space(load_settings(environ={}))
    assert fixed.keys() | searched.keys() == takes.keys() and not fixed.keys() & searched.keys()


def test_the_test_part_is_no_channel_of_the_tuning_job():
    channels = {c["ChannelName"] for c in TUNE["TrainingJobDefinition"]["InputDataConfig"]}
    assert channels == {"train", "validation", "table"}


def test_a_hyperparameter_that_sagemaker_adds_is_no_parameter_of_the_step(tmp_path):
    (tmp_path / "input/config").mkdir(parents=True)
    given = {"_tuning_objective_metric": "chosen_balanced_accuracy", "epochs": "2"}
    (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(given))
    takes = read_parameters(project_file("nbs", "steps", "20_train.ipynb"))
    assert coerce(read_hyperparameters(tmp_path), takes) == {"epochs": 2}


def test_here_a_tuning_step_is_refused_with_what_to_use_instead():
    with pytest.raises(PipelineError, match="step tune: .*skin-lesion search --trials N"):
        plan(DEFINITION)


@pytest.mark.parametrize(
    "path, value, problem",
    [
        (["TrainingJobDefinition", "EnableNetworkIsolation"], None, "no network isolation"),
        (["TrainingJobDefinition", "OutputDataConfig", "KmsKeyId"], None, "no KMS key on its outputs"),
        (["TrainingJobDefinition", "VpcConfig"], None, "no private network"),
        (["HyperParameterTuningJobConfig", "ResourceLimits", "MaxParallelTrainingJobs"], "2", "Invalid type"),
        (["HyperParameterTuningJobConfig", "Strategy"], None, 'Missing required parameter in .*: "Strategy"'),
    ],
)
def test_a_planted_fault_of_a_tuning_job_is_found(path, value, problem):
    changed = copy.deepcopy(DEFINITION)
    arguments = next(s["Arguments"] for s in changed["Steps"] if s["Type"] == "Tuning")
    for key in path[:-1]:
        arguments = arguments[key]
    arguments.pop(path[-1])
    if value is not None:
        arguments[path[-1]] = value
    found = unsafe_jobs(changed) + validate(changed)
    assert len(found) == 1
    assert re.search(problem, found[0]), found


@pytest.mark.parametrize(
    "line", ["", "log 0 1", "log 1 0.1", "linear 1", "one of 0.1", "one of 0.1, 0.1", "around 0.1", "log a b"]
)
def test_a_line_that_is_no_range_is_refused(line):
    with pytest.raises(ValueError, match=f"search.learning_rate = '{line}' is no range of train.learning_rate"):
        read_space(load_settings({"search.learning_rate": line}, environ={}))


@pytest.mark.slow
def test_a_killed_search_goes_on_and_trains_nothing_twice(finished):
    words = ["search", "--trials", "3", *(w for w in finished.tiny_run() if w.startswith("--set=train"))]
    words += ["--set=search.batch_size=one of 8, 16", "--set=search.ema_decay=one of 0, 0.5"]
    first = subprocess.Popen(
        finished.command(*words), cwd=finished.work, env=finished.env, stdout=subprocess.PIPE, text=True
    )
    seen = []
    for line in first.stdout:
        seen.append(line)
        if line.startswith("trial 1:"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert any(line.startswith("trial 0: validation balanced accuracy") for line in seen)

    done = finished.cli(*words, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    begun = [
        line.split(": ", 1)[1] for line in [*seen, *done.stdout.splitlines()] if re.match(r"trial \d+: --set", line)
    ]
    assert begun[1].strip() == begun[2].strip(), "the trial that was killed is done first"
    (folder,) = (finished.work / "runs/latest/search").resolve().iterdir()
    table = pd.read_csv(folder / "search.csv")
    assert len(table) == 3 and (table.state == "complete").all()
    assert table.validation_balanced_accuracy.is_monotonic_decreasing
    assert not list(folder.rglob("*.safetensors")) and not [p for p in folder.rglob("test") if p.is_dir()]
    best = (folder / "best.txt").read_text().split()
    told = json.loads(finished.cli("settings", "--json", *best).stdout)
    assert told["train.learning_rate"]["value"] == pytest.approx(table.learning_rate[0])

    again = finished.cli(*words)
    assert again.returncode == 0 and "--set train." not in again.stdout.split("trials in")[0]
