"""The training pipeline as a user runs it: real processes, real notebooks, a tiny sample."""

import json
import shutil
import time

import numpy as np
import pandas as pd

from skin_lesion.data.images import load_square
from skin_lesion.serving.package import unpack
from skin_lesion.serving.predictor import Predictor


def steps(run):
    """The states of a run's steps, by name."""
    return {s["StepName"]: s for s in json.loads((run / "steps.json").read_text())["PipelineExecutionSteps"]}


def test_a_run_leaves_all_that_it_promises(finished):
    run = finished.work / "runs" / "latest"
    state = json.loads((run / "steps.json").read_text())
    assert state["PipelineExecutionStatus"] == "Succeeded"
    assert {n: s["StepStatus"] for n, s in steps(run).items()} == dict.fromkeys(
        [
            "prepare",
            "train",
            "evaluate",
            "gate",
            "register",
            next(n for n, s in steps(run).items() if s["StepType"] == "RegisterModel"),
        ],
        "Succeeded",
    )
    assert {p.name for p in (run / "notebooks").iterdir()} == {
        "10_prepare.ipynb", "20_train.ipynb", "30_evaluate.ipynb", "40_register.ipynb",
    }  # fmt: skip
    for name in ("report/index.html", "model.tar.gz", "evaluation.json", "split_proof.json"):
        assert (run / name).stat().st_size > 100, name
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["synthetic"] is True and evaluation["dataset"] == "sample"
    assert 0 <= evaluation["balanced_accuracy"]["low"] <= evaluation["balanced_accuracy"]["value"] <= 1
    assert "SYNTHETIC" in (run / "report" / "index.html").read_text()


def test_the_package_holds_what_serving_needs(finished, tmp_path):
    folder = unpack(finished.work / "runs/latest/model.tar.gz", tmp_path / "package")
    assert {"model.onnx", "model.safetensors", "model.json", "model_card.md", "evaluation.json"} <= {
        p.name for p in folder.iterdir()
    }
    model = json.loads((folder / "model.json").read_text())
    assert model["calibration"]["temperature"] > 0 and model["provenance"]["git_commit"] == "test"
    assert "research" in (folder / "model_card.md").read_text().lower()


def test_evaluation_measures_what_is_served(finished):
    """The probabilities that the evaluation kept are those that the package gives for the same files."""
    run = finished.work / "runs" / "latest"
    proof_rows = pd.read_parquet(next((finished.work / "runs/s3").rglob("evaluation/predictions.parquet")))
    predictor = Predictor(run / "model.tar.gz")
    images = finished.work / "tiny" / "images"
    files = [next(images.glob(f"{name}.*")) for name in proof_rows.image_id]
    names, p, refused = predictor.predict_files(files)
    assert not refused and names == proof_rows.image_id.tolist()
    assert np.abs(p - proof_rows[predictor.classes].to_numpy()).max() < 1e-4


def test_predict_writes_the_isic_format_and_names_what_it_left_out(finished, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(finished.work / "tiny" / "images", pictures)
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    done = finished.cli("predict", "runs/latest/model.tar.gz", pictures, "--out", tmp_path / "p.csv")
    assert done.returncode == 1 and "broken.jpg" in done.stderr and "SYNTHETIC" in done.stderr
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.columns.tolist() == ["image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC"]
    assert len(table) == len(list(pictures.iterdir())) - 1
    assert np.allclose(table.drop(columns="image").sum(axis=1), 1, atol=1e-5)
    by_version = finished.cli("predict", "1", next(iter(sorted(pictures.glob("*_*.jpg")))), "--out", tmp_path / "q.csv")
    assert by_version.returncode == 0, by_version.stderr


def test_a_second_run_takes_everything_from_the_cache(finished):
    first = steps((finished.work / "runs/latest").resolve())
    started = time.perf_counter()
    done = finished.cli(*finished.tiny_run("--data-dir", "tiny"))
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-2000:]
    second = steps((finished.work / "runs/latest").resolve())
    for name in ("prepare", "train", "evaluate", "register"):
        assert "CacheHitResult" in second[name], name
    assert seconds < 20, f"{seconds:.0f} s"
    assert (finished.work / "runs/latest/model.tar.gz").exists() and (
        finished.work / "runs/latest/report/index.html"
    ).exists()
    versions = json.loads(finished.cli("models", "--json").stdout)
    assert len(versions) == 1, "the same package is registered once"
    assert first.keys() == second.keys()


def test_editing_a_step_reruns_it_and_those_after_it(finished):
    notebook = finished.code / "nbs/steps/30_evaluate.ipynb"
    before = notebook.read_text()
    content = json.loads(before)
    content["cells"].append(
        {"cell_type": "code", "id": "added", "metadata": {}, "outputs": [], "execution_count": None, "source": "1"}
    )
    notebook.write_text(json.dumps(content))
    try:
        done = finished.cli(*finished.tiny_run("--data-dir", "tiny"))
    finally:
        notebook.write_text(before)
    assert done.returncode == 0, done.stderr[-2000:]
    hit = {n: "CacheHitResult" in s for n, s in steps((finished.work / "runs/latest").resolve()).items()}
    assert (hit["prepare"], hit["train"], hit["evaluate"], hit["register"]) == (True, True, False, False)


def test_a_model_below_the_gate_is_not_registered(finished):
    done = finished.cli(*finished.tiny_run("--data-dir", "tiny", gate__balanced_accuracy_low="0.999"))
    run = (finished.work / "runs/latest").resolve()
    state = json.loads((run / "steps.json").read_text())
    assert done.returncode == 1 and state["PipelineExecutionStatus"] == "Failed"
    assert "below the gate" in state["FailureReason"] and "register" not in steps(run)
    assert not (run / "model.tar.gz").exists() and (run / "report/index.html").exists()


def test_an_approved_version_is_the_champion_of_the_next_run(finished):
    approved = finished.cli("approve", "1", "--reason", "a test")
    assert approved.returncode == 0, approved.stderr
    done = finished.cli(*finished.tiny_run("--data-dir", "tiny"))
    assert done.returncode == 0, done.stdout[-2000:]
    evaluation = json.loads((finished.work / "runs/latest/evaluation.json").read_text())
    assert evaluation["champion"]["version"] == 1
    assert evaluation["champion"]["difference"] == 0, "the same model against itself, on lesions that neither has seen"


def test_serving_decodes_as_prepare_did(finished):
    shards = next((finished.work / "runs/s3").rglob("prepare/test"))
    from skin_lesion.data.shards import Shards

    held = Shards(shards)
    for i in range(0, len(held), 7):
        assert np.array_equal(held[i], load_square(finished.work / "tiny" / held.rows.path[i], held.image_size))
