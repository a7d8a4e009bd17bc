"""Calibration, gate and subgroups by numbers; the step `evaluate` as a process, on drawn lesions and a small real graph."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.images import load_square
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import prove_split, split_table
from skin_lesion.data.unknown import write_unknown
from skin_lesion.evaluation import calibration as c
from skin_lesion.evaluation.conformal import prediction_sets
from skin_lesion.evaluation.gate import compare_with_champion, gate, number_for_gate
from skin_lesion.evaluation.metrics import calibration_error, not_estimable
from skin_lesion.evaluation.model_card import model_card
from skin_lesion.evaluation.subgroups import age_band, subgroups
from skin_lesion.evaluation.unknown import Unknown
from skin_lesion.monitoring.reference import load_reference
from skin_lesion.serving.package import lesion_hash, pack
from skin_lesion.serving.predictor import Graph

SIZE = 32


def labelled(n=3000, classes=4, shares=None, temperature=1.0, seed=0):
    """Logits, labels drawn from their softmax at the temperature and the class shares."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    p = c.at_prevalence(c.probabilities(logits, temperature), shares)
    return logits, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.5])
@pytest.mark.parametrize("shares", [None, [0.7, 0.1, 0.1, 0.1]])
def test_the_temperature_is_found(temperature, shares):
    logits, y = labelled(shares=shares, temperature=temperature)
    assert c.fit_temperature(logits, y, class_shares=shares) == pytest.approx(temperature, rel=0.12)


def test_logit_shares_are_divided_out():
    """A model that learned with the data's frequencies and one that learned equal ones give the same two probabilities."""
    shares = np.array([0.7, 0.1, 0.1, 0.1])
    equal, _ = labelled()
    prior = equal + np.log(shares)
    np.testing.assert_allclose(c.probabilities(prior, 1, shares), c.probabilities(equal), atol=1e-12)
    np.testing.assert_allclose(
        c.at_prevalence(c.probabilities(prior, 1, shares), shares), c.probabilities(prior), atol=1e-12
    )
    _, y = labelled(shares=shares)
    assert c.fit_temperature(prior, y, shares, shares) == pytest.approx(1, rel=0.1)


def test_temperature_does_not_change_decisions_and_lowers_the_error():
    logits, y = labelled(temperature=3)
    found = c.compare_calibration(logits, y, c.fit_calibration(logits, y, np.arange(len(y))))
    assert found["method"] == "temperature" and found["after"] == found["methods"]["temperature"]
    assert found["after"]["ece"] < 0.03 < found["before"]["ece"]
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    assert (c.probabilities(logits, 3).argmax(1) == logits.argmax(1)).all()
    assert found["before"]["ece"] == pytest.approx(calibration_error(c.probabilities(logits), y)[0])


def test_a_perfect_validation_set_does_not_give_certainty():
    y = np.arange(40) % 4
    assert c.fit_temperature(5 * np.eye(4)[y], y) >= 0.05


def test_age_bands_and_groups_of_few_lesions():
    assert age_band(pd.Series([29, 30, 44, 45, 59, 60, 74, 75, 100.0])).tolist() == [
        "0 to 29",
        "30 to 44",
        "30 to 44",
        "45 to 59",
        "45 to 59",
        "60 to 74",
        "60 to 74",
        "75 and over",
        "75 and over",
    ]
    y = np.repeat([0, 1], 30)
    p = np.eye(2)[y] * 0.8 + 0.1
    rows = pd.DataFrame(
        {"sex": ["male"] * 28 + ["female"] * 2 + ["male"] * 10 + ["female"] * 15 + [None] * 5, "age": np.nan}
    )
    found = {(g["factor"], g["group"]): g for g in subgroups(rows, p, y, np.arange(60), ("MEL", "NV"), 20)}
    assert found["sex", "male"]["melanoma_sensitivity"]["value"] == 1
    assert found["sex", "female"]["melanoma_sensitivity"] == not_estimable("2 melanomas; 10 are needed")
    assert found["sex", "female"]["balanced_accuracy"]["reason"] == "1 classes with 10 lesions; 2 are needed"
    assert found["sex", "unknown"]["melanoma_auc"]["value"] is None
    assert found["age", "unknown"]["lesions"] == 60
    tone = subgroups(rows.assign(skin_tone="V"), p, y, np.arange(60), ("MEL", "NV"), 20)
    assert ("skin_tone", "V") in {(g["factor"], g["group"]) for g in tone}


@pytest.mark.parametrize(
    "low, sensitivity, difference, passed",
    [
        (0.5, 0.5, 0, True),
        (0.499, 0.5, 0, False),
        (0.5, 0.499, 0, False),
        (0.5, 0.5, -0.01, True),
        (0.5, 0.5, -0.011, False),
        (0.9, 0.9, -1, False),
    ],
)
def test_the_gate_is_its_three_rules(low, sensitivity, difference, passed):
    evaluation = {
        "balanced_accuracy": {"low": low},
        "melanoma_sensitivity": {"value": sensitivity},
        "champion": {"version": 2, "difference": difference},
    }
    verdict = gate(evaluation, 0.5, 0.5, 0.01)
    assert verdict["passed"] == passed and len(verdict["reasons"]) == (0 if passed else 1)


def test_nothing_measured_never_passes():
    worst = number_for_gate(not_estimable("no melanoma"))
    evaluation = {
        "balanced_accuracy": {"low": 0.9},
        "melanoma_sensitivity": worst,
        "champion": {"version": None, "difference": 0.0},
    }
    verdict = gate(evaluation, 0.5, 0.5, 0.01)
    assert not verdict["passed"] and "no melanoma" in verdict["reasons"][0]


def test_the_champion_is_asked_only_about_lesions_new_to_it():
    lesions, y = np.repeat(np.arange(40), 2), np.repeat(np.arange(40) % 2, 2)
    good, bad = np.eye(2)[y] * 0.8 + 0.1, np.full((80, 2), [0.9, 0.1])
    unseen = lesions < 20
    q = np.where(unseen[:, None], bad, good)  # remembers what it was trained on
    found = compare_with_champion(4, good, q, unseen, y, lesions, 0.01, 50)
    assert found["lesions"] == 20 and found["difference"] == 0.5 and found["margin_left"] == pytest.approx(0.51)
    assert compare_with_champion(4, good, q, lesions < 5, y, lesions, 0.01, 50)["margin_left"] < 0
    assert compare_with_champion(4, good, None, None, y, lesions, 0.01)["difference"] == 0
    assert compare_with_champion(4, bad, good, unseen, y, lesions, 0.01, 50)["margin_left"] < 0


# The step


def linear_graph(folder, weights, bias):
    """Pictures averaged over 8 x 8 squares, then one linear layer: a real graph with the contract of the exported one."""
    folder.mkdir(parents=True, exist_ok=True)
    h, t = onnx.helper, onnx.TensorProto
    nodes = [
        h.make_node("Cast", ["images"], ["x"], to=t.FLOAT),
        h.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]),
        h.make_node("AveragePool", ["nchw"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        h.make_node("Flatten", ["pooled"], ["features"]),
        h.make_node("Gemm", ["features", "w", "b"], ["logits"]),
    ]
    graph = h.make_graph(
        nodes,
        "linear",
        [h.make_tensor_value_info("images", t.UINT8, ["n", SIZE, SIZE, 3])],
        [
            h.make_tensor_value_info("logits", t.FLOAT, ["n", len(bias)]),
            h.make_tensor_value_info("features", t.FLOAT, ["n", len(weights)]),
        ],
        [onnx.numpy_helper.from_array(np.float32(weights), "w"), onnx.numpy_helper.from_array(np.float32(bias), "b")],
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    return folder


def write_model(folder, shards, scale, extra=()):
    """A logistic regression on the training pictures, over-confident by `scale`."""
    train, classes = shards["train"], shards["train"].classes
    x = train[:].reshape(-1, SIZE // 8, 8, SIZE // 8, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(train), -1)
    y = train.rows.diagnosis.map(list(classes).index)
    mean = x.mean(0)
    fit = LogisticRegression(C=0.001, max_iter=300, class_weight="balanced").fit(x - mean, y)
    linear_graph(folder, scale * fit.coef_.T, scale * (fit.intercept_ - mean @ fit.coef_.T))
    shares = (np.bincount(y, minlength=len(classes)) / len(y)).tolist()
    model = {
        "architecture": "linear",
        "classes": list(classes),
        "image_size": SIZE,
        "dataset": "sample",
        "synthetic": True,
        "class_shares": shares,
        "logit_shares": [1 / len(classes)] * len(classes),
        "train_lesions": sorted({lesion_hash(i) for i in train.rows.lesion_id}),
        "provenance": {"git_commit": "c0ffee", "settings": {}},
    }
    (folder / "model.json").write_text(json.dumps(model | dict(extra)))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folders that prepare and train would leave, on 120 drawn lesions."""
    base = tmp_path_factory.mktemp("prepared")
    raw = write_sample(base / "raw", lesions=120, seed=1)  # a reference takes 50 validation pictures
    table, accounting = read_dataset("sample", raw)
    packed = pack_images(table, raw, SIZE, base / "work")
    pairs = near_duplicates(packed.fingerprints)
    table = split_table(table, pairs, 0.2, 0.3, 1)
    for part in ("train", "validation", "test"):
        write_shards(table[table.split == part], packed, base / part)
    (base / "table").mkdir()
    (base / "table" / "split_proof.json").write_text(json.dumps(prove_split(table, pairs)))
    (base / "table" / "accounting.json").write_text(json.dumps(accounting))
    shards = {part: Shards(base / part) for part in ("train", "validation", "test")}
    return base, shards


def make_root(folder, prepared, scale=5, champion=None, extra=()):
    base, shards = prepared
    inputs = folder / "processing" / "input"
    inputs.mkdir(parents=True)
    for part in ("validation", "test", "table"):
        (inputs / part).symlink_to(base / part)
    pack(write_model(folder / "made", shards, scale, extra), inputs / "model" / "model.tar.gz")
    write_unknown(inputs / "unknown", images=40)
    (inputs / "champion").mkdir()
    (inputs / "champion" / "champion.json").write_text(json.dumps({"version": None if champion is None else 3}))
    if champion is not None:
        pack(champion, inputs / "champion" / "model.tar.gz")
    return folder


def evaluate(root, **parameters):
    words = [word for k, v in parameters.items() for word in (f"--{k}", str(v))]
    return subprocess.run(
        [sys.executable, "-m", "skin_lesion.execution.step", "evaluate", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"SKIN_LESION_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )


@pytest.fixture(scope="module")
def evaluated(prepared, tmp_path_factory):
    root = make_root(tmp_path_factory.mktemp("root") / "a", prepared)
    done = evaluate(root, bootstrap=200, min_lesions=3, balanced_accuracy_low=0.99)
    assert done.returncode == 0, done.stderr
    out = root / "processing" / "output" / "evaluation"
    return root, json.loads((out / "evaluation.json").read_text()), done


def test_step_writes_what_the_gate_and_the_package_read(prepared, evaluated):
    root, evaluation, _ = evaluated
    out = root / "processing" / "output" / "evaluation"
    assert sorted(f.name for f in out.iterdir()) == [
        "calibration.json",
        "constraints.json",
        "evaluation.json",
        "predictions.parquet",
        "reference.safetensors",
        "statistics.json",
        "unknown.safetensors",
    ]
    for path in ("balanced_accuracy.low", "melanoma_sensitivity.value", "champion.difference", "champion.margin_left"):
        first, second = path.split(".")
        assert isinstance(evaluation[first][second], float), path
    assert evaluation["synthetic"] is True and evaluation["dataset"] == "sample"
    assert evaluation["images"] == len(prepared[1]["test"]) == np.sum(evaluation["confusion_matrix"])
    assert evaluation["test"]["content_hash"] == prepared[1]["test"].content_hash
    calibration = json.loads((out / "calibration.json").read_text())
    assert calibration["temperature"] == evaluation["calibration"]["temperature"] > 1.5
    assert evaluation["calibration"]["after"]["log_loss"] < evaluation["calibration"]["before"]["log_loss"]
    assert evaluation["gate"]["passed"] is False and "balanced accuracy" in evaluation["gate"]["reasons"][0]


def test_step_says_what_the_model_does_not_know(evaluated):
    root, evaluation, _ = evaluated
    out = root / "processing" / "output" / "evaluation"
    calibration = json.loads((out / "calibration.json").read_text())
    unknown = Unknown.load(out)
    assert calibration["unknown"]["threshold"] == unknown.threshold == evaluation["unknown"]["threshold"]
    assert "drawn by a program" in calibration["unknown"]["about"] and calibration["unknown"]["share"] == 0.05
    graph = Graph(root / "made")
    pages = np.stack([load_square(f, SIZE) for f in sorted((root / "processing/input/unknown").glob("document*"))])
    test = Shards(root / "processing/input/test")[:]
    page, known = (unknown.score(graph.features(x), graph.logits(x)) for x in (pages, test))
    assert np.median(page) > np.quantile(known, 0.9), "a printed page is less known than a lesion"
    assert evaluation["unknown"]["drawn"] and evaluation["unknown"]["not_dermoscopic"]["low"] > 0.5
    classes = evaluation["classes"]
    assert list(calibration["sets"]["thresholds"]) == classes and calibration["sets"]["coverage"] == 0.9
    assert calibration["abstain"]["confidence"] == evaluation["abstain"]["confidence"]
    found = pd.read_parquet(out / "predictions.parquet")
    sets = prediction_sets(found[classes].to_numpy(), list(calibration["sets"]["thresholds"].values()))
    inside = sets[np.arange(len(found)), found.diagnosis.map(classes.index)]
    by_lesion = pd.Series(inside).groupby(found.lesion_id.to_numpy()).mean().mean()
    assert evaluation["sets"]["coverage"]["value"] == pytest.approx(by_lesion)
    below = found[classes].max(axis=1) < calibration["abstain"]["confidence"]
    assert evaluation["abstain"]["share"]["value"] == pytest.approx(below.mean())


def test_an_empty_folder_of_unknown_pictures_is_refused(prepared, tmp_path):
    root = make_root(tmp_path / "d", prepared)
    for file in (root / "processing/input/unknown").glob("*.jpg"):
        file.unlink()
    done = evaluate(root)
    assert done.returncode != 0 and "skin-lesion data unknown" in done.stderr


def test_step_leaves_what_requests_will_be_compared_with(prepared, evaluated):
    root, evaluation, _ = evaluated
    out, rows = root / "processing" / "output" / "evaluation", prepared[1]["validation"].rows
    reference = load_reference(out)
    assert reference.images == len(rows) and reference.label_counts["decision"].sum() == len(rows)
    assert set(reference.labels["decision"]) <= {"abstain", *evaluation["classes"]}
    assert reference.counts["age"].sum() == rows.age.notna().sum()
    assert {"brightness", "skin_tone", "confidence", "malignant"} <= set(reference.counts)
    statistics = json.loads((out / "statistics.json").read_text())
    assert statistics["dataset"]["item_count"] == len(rows)
    constraints = {f["name"]: f for f in json.loads((out / "constraints.json").read_text())["features"]}
    assert set(constraints["sex"]["string_constraints"]["domains"]) == set(rows.sex.dropna())
    assert constraints["confidence"]["num_constraints"] == {"is_non_negative": True}


def test_predictions_give_the_reported_numbers(prepared, evaluated):
    root, evaluation, _ = evaluated
    found = pd.read_parquet(root / "processing" / "output" / "evaluation" / "predictions.parquet")
    classes = evaluation["classes"]
    assert found.columns.tolist() == ["image_id", "lesion_id", "diagnosis", *classes]
    np.testing.assert_allclose(found[classes].sum(axis=1), 1)
    right = found[classes].idxmax(axis=1) == found.diagnosis
    assert evaluation["balanced_accuracy"]["value"] == pytest.approx(right.groupby(found.diagnosis).mean().mean())
    assert set(found.image_id) == set(prepared[1]["test"].rows.image_id)


def test_the_model_card_is_made_of_a_real_run(evaluated):
    root, evaluation, _ = evaluated
    card = model_card(evaluation, json.loads((root / "made" / "model.json").read_text()))
    assert (
        "SYNTHETIC" in card and "c0ffee" in card and "Not passed" in card and evaluation["test"]["content_hash"] in card
    )


def test_a_champion_is_compared_on_what_it_has_not_seen(prepared, tmp_path):
    base, shards = prepared
    test_lesions = sorted(shards["test"].rows.lesion_id.unique())
    seen = [lesion_hash(i) for i in test_lesions[:3]]
    champion = write_model(
        tmp_path / "champion", shards, 1, {"calibration": {"temperature": 1.0}, "train_lesions": seen}
    )
    root = make_root(tmp_path / "b", prepared, champion=champion)
    done = evaluate(root, min_lesions=3)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "processing" / "output" / "evaluation" / "evaluation.json").read_text())["champion"]
    assert found["version"] == 3 and found["lesions"] == len(test_lesions) - 3
    assert found["difference"] == 0.0 and found["margin_left"] == 0.01  # the same decisions, at another temperature


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("no proof", "has no proof"),
        ("trained on the test", "lesions of the test pictures are among those"),
        ("other rows", "proof belongs to other rows"),
    ],
)
def test_a_leak_ends_the_step(prepared, tmp_path, fault, reason):
    base, shards = prepared
    extra = (
        {"train_lesions": [lesion_hash(shards["test"].rows.lesion_id.iloc[0])]}
        if fault == "trained on the test"
        else {}
    )
    root = make_root(tmp_path / "c", prepared, extra=extra)
    table = root / "processing" / "input" / "table"
    if fault != "trained on the test":
        table.unlink(), table.mkdir()
        proof = json.loads((base / "table" / "split_proof.json").read_text())
        if fault == "other rows":
            (table / "split_proof.json").write_text(json.dumps(proof | {"sha256": proof["sha256"] | {"test": "0"}}))
    done = evaluate(root)
    assert done.returncode != 0 and reason in done.stderr
    assert not (root / "processing" / "output" / "evaluation" / "evaluation.json").exists()
