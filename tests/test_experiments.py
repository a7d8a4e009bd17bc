"""Several networks as one pipeline: its definition, the step that compares them, and (slow) the whole of it."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from skin_lesion.cloud.compile import compile_pipeline, unsafe_jobs, validate
from skin_lesion.execution.definition import plan
from skin_lesion.execution.local import definition_for, load_definition, run_parameters
from skin_lesion.serving.package import pack, unpack
from skin_lesion.settings import load_settings
from skin_lesion.training.models import ARCHITECTURES


def trained(definition):
    return {
        s["Name"]: s["Arguments"]["HyperParameters"]["architecture"]
        for s in definition["Steps"]
        if s["Type"] == "Training"
    }


def test_another_list_is_compiled_and_every_step_has_its_network(tmp_path):
    committed = load_definition("experiments")
    assert definition_for("experiments", load_settings(environ={})) == committed
    settings = load_settings({"experiments.architectures": "mobilenetv2, resnet18.a1_in1k"}, environ={})
    definition = definition_for("experiments", settings)
    assert trained(definition) == {"train-mobilenetv2": "mobilenetv2", "train-resnet18-a1-in1k": "resnet18.a1_in1k"}
    steps, values = plan(definition, run_parameters(settings, definition, tmp_path, tmp_path, tmp_path))
    assert steps[-1].name == "compare" and steps[-1].waits_for == {"package-mobilenetv2", "package-resnet18-a1-in1k"}
    assert values["ExperimentsArchitectures"] == "mobilenetv2, resnet18.a1_in1k"
    with pytest.raises(ValueError, match="ExperimentsArchitectures = 'mobilenetv2, resnet18.a1_in1k' must be one of"):
        plan(committed, {"ExperimentsArchitectures": "mobilenetv2, resnet18.a1_in1k"})


@pytest.mark.slow
def test_all_named_architectures_are_one_pipeline_within_the_limits_of_sagemaker():
    listed = ",".join(ARCHITECTURES)
    definition = json.loads(
        compile_pipeline("experiments", load_settings({"experiments.architectures": listed}, environ={}))
    )
    assert list(trained(definition).values()) == list(ARCHITECTURES) and len(ARCHITECTURES) > 11
    assert unsafe_jobs(definition) == [] and validate(definition) == [] and len(definition["Steps"]) <= 50
    *_, package, compare = definition["Steps"]
    [packages] = compare["Arguments"]["ProcessingInputs"]
    place = package["Arguments"]["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]["Std:Join"]["Values"]
    assert packages["S3Input"]["S3Uri"]["Std:Join"]["Values"] == place[:-1], "the folder of all packages"
    assert "CacheConfig" not in package and len(compare["DependsOn"]) == len(ARCHITECTURES)


@pytest.mark.parametrize("listed", ["", "a,a", "a_b,a.b", ",".join(f"n{i}" for i in range(17))])
def test_a_list_that_makes_no_steps_of_its_own_is_refused(listed):
    with pytest.raises(ValueError, match="experiments.architectures = .* must name 1 to 16 architectures, each once"):
        compile_pipeline("experiments", load_settings({"experiments.architectures": listed}, environ={}))


def test_a_setting_without_a_part_in_the_pipeline_is_refused(tmp_path):
    settings = load_settings({"train.architecture": "resnet50"}, environ={})
    with pytest.raises(ValueError, match=r"train.architecture \(--set\) has no part in this pipeline"):
        run_parameters(settings, load_definition("experiments"), tmp_path, tmp_path, tmp_path)
    run_parameters(settings, load_definition("training"), tmp_path, tmp_path, tmp_path)


def compare(project, root, architectures):
    words = ["compare", "--architectures", architectures, "--rounds", "5", "--threads", "1"]
    return subprocess.run(
        [sys.executable, "-m", "skin_lesion.execution.step", *words],
        env=os.environ | project.env | {"SKIN_LESION_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_table_names_what_each_package_reaches_and_costs(finished, tmp_path):
    """Two packages of one run; the second says that it is another network, and one picture's worth smaller."""
    package = finished.work / "runs/latest/model.tar.gz"
    inputs = tmp_path / "root/processing/input/packages"
    (inputs / "first").mkdir(parents=True)
    shutil.copy(package, inputs / "first" / "model.tar.gz")
    folder = unpack(package, tmp_path / "second")
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | {"architecture": "mobilenetv3_small_050"}))
    (folder / "model.safetensors").unlink()
    pack(folder, inputs / "second" / "model.tar.gz")

    done = compare(finished, tmp_path / "root", "mobilenetv3_small_050,mobilenetv2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = tmp_path / "root/processing/output/experiments"
    small, large = json.loads((out / "experiments.json").read_text())["networks"]
    assert (small["architecture"], large["architecture"]) == ("mobilenetv3_small_050", "mobilenetv2")
    evaluation = json.loads((finished.work / "runs/latest/evaluation.json").read_text())
    for key in ("balanced_accuracy", "melanoma_sensitivity", "ece"):
        assert small[key] == large[key] == evaluation[key]
    assert small["parameters_m"] < 1 < large["parameters_m"] and 0 < small["gflops"] < large["gflops"]
    assert large["package_mb"] == package.stat().st_size / 1e6 > small["package_mb"]
    assert large["train_images_per_second"] > 0 and large["latency_ms"] > 0
    table = pd.read_csv(out / "experiments.csv")
    assert table.architecture.tolist() == ["mobilenetv3_small_050", "mobilenetv2"]
    assert (table.balanced_accuracy_low <= table.balanced_accuracy).all()
    assert "SYNTHETIC" in next((tmp_path / "root/processing/output/report").glob("45_compare.ipynb")).read_text()


@pytest.mark.slow
def test_the_pipeline_trains_two_networks_on_one_split_and_compares_them(project):
    assert project.cli("data", "sample", "--out", "tiny", "--lesions", "40").returncode == 0
    words = project.tiny_run(
        "--data-dir", "tiny", "--set=experiments.architectures=mobilenetv2_035,mobilenetv3_small_050"
    )
    words = ["run", "experiments", *(w for w in words[2:] if "train.architecture" not in w)]
    done = project.cli(*words, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = project.work / "runs/latest"
    names = [row["architecture"] for row in json.loads((run / "experiments.json").read_text())["networks"]]
    assert names == ["mobilenetv2_035", "mobilenetv3_small_050"]
    assert not (run / "model.tar.gz").exists() and not (run / "evaluation.json").exists()
    assert {"20_train-mobilenetv2-035.ipynb", "30_evaluate-mobilenetv3-small-050.ipynb", "45_compare.ipynb"} <= {
        p.name for p in (run / "notebooks").iterdir()
    }
    page = (run / "report/index.html").read_text()
    assert "The networks" in page and "mobilenetv3_small_050" in page and "data:image/png" in page

    again = project.cli(*words)
    assert again.returncode == 0, again.stderr[-2000:]
    steps = json.loads((run.parent / "latest/steps.json").read_text())["PipelineExecutionSteps"]
    packed = {s["StepName"] for s in steps if "CacheHitResult" not in s}
    assert packed == {"package-mobilenetv2-035", "package-mobilenetv3-small-050"} and len(steps) == 8
    assert (run.parent / "latest/experiments.csv").exists()
