"""The choice of a calibration, the cost of mistakes, and teachers: by numbers, and in a package as it is served."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from test_training import shards  # noqa: F401

from skin_lesion.data.shards import Shards
from skin_lesion.evaluation import calibration as c
from skin_lesion.evaluation.conformal import coverage_band, fit_sets
from skin_lesion.evaluation.costs import care_costs, choose_threshold, cost_matrix, least_cost, suspicion
from skin_lesion.evaluation.metrics import calibration_error, sensitivity_at
from skin_lesion.serving.predictor import Predictor
from skin_lesion.training.folds import train_folds
from skin_lesion.training.loop import Recipe, Stopped, train
from skin_lesion.training.models import Classifier

CPU = torch.device("cpu")


def labelled(n, classes, seed=0, shares=None):
    """Logits, and labels drawn from their softmax at the class shares."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, classes))
    p = c.at_prevalence(c.probabilities(logits), shares)
    return logits, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_vector_scaling_is_chosen_where_a_class_is_wrong_and_not_where_none_is(seed):
    logits, y = labelled(1500, 5, seed)
    assert c.fit_calibration(2 * logits, y, np.arange(1500))["method"] == "temperature"
    found = c.fit_calibration(logits * [1, 1, 3, 1, 1], y, np.arange(1500))
    assert found["method"] == "vector" and found["held_out"]["vector"] < found["held_out"]["temperature"]
    assert found["vector"]["scale"][2] == pytest.approx(1 / 3, rel=0.3)


def test_vector_scaling_puts_prevalence_in_as_the_temperature_does():
    shares = np.array([0.6, 0.2, 0.1, 0.1])
    logits, y = labelled(4000, 4, shares=shares)
    found = c.fit_vector(logits, y, class_shares=shares)
    np.testing.assert_allclose(found["scale"], 1, atol=0.15)
    np.testing.assert_allclose(found["bias"], 0, atol=0.2)


def test_images_of_one_lesion_do_not_make_a_difference_certain():
    """The same images, counted as lesions of one and of forty: the error of the gain grows, and the choice falls back."""
    logits, y = labelled(600, 4)
    uneven = logits * [1, 1, 1.6, 1]
    alone = c.fit_calibration(uneven, y, np.arange(600))["held_out"]
    same = np.tile(np.arange(600), 40)
    many = c.fit_calibration(uneven[same], y[same], same)["held_out"]
    assert many["standard_error"] == pytest.approx(alone["standard_error"], rel=0.25)


def test_the_error_of_exact_probabilities_is_in_its_range():
    inside = []
    for seed in range(20):
        logits, y = labelled(400, 4, seed)
        p = c.probabilities(logits)
        found = c.error_if_calibrated(p)
        inside.append(found["low"] <= calibration_error(p, y)[0] <= found["high"])
    assert sum(inside) >= 16


def test_the_coverage_band_holds_what_the_method_gives():
    """One class, thresholds of 40 lesions tested on 60: as often inside as was said."""
    low, high = coverage_band([40], [60], 0.9)
    rng, inside = np.random.default_rng(0), []
    for _ in range(400):
        p = np.column_stack([rng.random(100), np.zeros(100)])
        threshold = fit_sets(p[:40], np.zeros(40, int), np.arange(40), 0.9)[0]
        inside.append(low <= (p[40:, 0] >= threshold).mean() <= high)
    assert 0.92 <= np.mean(inside) <= 0.99


def package(folder, calibration):
    """A graph whose logits are the mean colours over 100, in a package."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "hundred"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("hundred", onnx.TensorProto.FLOAT, [1], [100.0]),
    ]
    kind = [
        helper.make_tensor_value_info(n, t, s) for n, t, s in (("images", 2, ["n", 4, 4, 3]), ("logits", 1, ["n", 3]))
    ]
    graph = helper.make_graph(nodes, "mean", kind[:1], kind[1:], constants)
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx"
    )
    model = {"classes": ["MEL", "NV", "BCC"], "image_size": 4, "calibration": calibration}
    third = [1 / 3] * 3
    (folder / "model.json").write_text(json.dumps(model | {"logit_shares": third, "class_shares": third}))
    return Predictor(folder)


def test_the_predictor_applies_what_was_chosen_and_reads_older_packages(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    logits = images.mean((1, 2)) / 100
    vector = {"scale": [2.0, 1.0, 0.5], "bias": [0.3, -0.3, 0.0]}
    chosen = {"method": "vector", "temperature": 2.0, "vector": vector}
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    by_vector = softmax(logits * vector["scale"] + vector["bias"])
    for name, calibration, expected in (
        ("vector", chosen, by_vector),
        ("temperature", chosen | {"method": "temperature"}, softmax(logits / 2)),
        ("older", {"temperature": 2.0}, softmax(logits / 2)),
    ):
        np.testing.assert_allclose(
            package(tmp_path / name, calibration).probabilities(images), expected, atol=1e-5, err_msg=name
        )
    with pytest.raises(ValueError, match="use the version that made the package"):
        package(tmp_path / "newer", {"method": "isotonic"}).probabilities(images)


def test_the_operating_point_costs_least_and_the_dear_mistake_moves_it():
    classes = ("MEL", "NV", "BCC", "BKL", "AK")
    logits, y = labelled(800, 5)
    p, points = c.probabilities(logits), []
    for price in (2, 50):
        costs = cost_matrix(classes, price, 2)
        point = choose_threshold(p, y, classes, costs)
        cost = lambda t, costs=costs: care_costs(suspicion(p, classes) >= t, y, classes, costs).sum()
        assert cost(point) <= min(map(cost, np.linspace(0, 1, 301)))
        points.append(point)
    assert points[1] < points[0]
    assert (least_cost(p, cost_matrix(classes, 50, 2)) == 0).sum() > (
        least_cost(p, cost_matrix(classes, 2, 2)) == 0
    ).sum()
    benign = ("NV", "BKL")
    assert (
        choose_threshold(np.tile([0.5, 0.5], (4, 1)), np.array([0, 1, 0, 1]), benign, cost_matrix(benign, 20, 5)) >= 0
    )


def test_sensitivity_at_a_specificity_is_the_best_point_of_the_curve():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    scores = (rng.normal(size=300) + truth).round(1)  # with ties
    best = max((scores[truth] >= t).mean() for t in [*np.unique(scores), np.inf] if (scores[~truth] < t).mean() >= 0.9)
    assert sensitivity_at(scores, truth)[0] == pytest.approx(best)


@pytest.fixture
def dealt(shards, tmp_path):  # noqa: F811
    """Shards, recipe and folds in which every class is in each training part."""
    training, validation = (Shards(shards / part) for part in ("train", "validation"))
    number = training.rows.groupby("diagnosis").cumcount().to_numpy()
    return training, validation, training.classes, Recipe(1, 16, warmup_epochs=0, ema_decay=0.0), number % 2


def test_a_fold_that_was_stopped_goes_on_and_one_that_is_done_is_left_alone(dealt, tmp_path, monkeypatch):
    training, validation, classes, recipe, fold = dealt
    go = lambda folder, recipe=recipe: train_folds(
        "mobilenetv2_050", False, training, validation, classes, recipe, fold, folder, device=CPU
    )
    straight, calls = go(tmp_path / "straight"), []
    from skin_lesion.training import folds

    def stops(*words, **options):
        calls.append(words)
        if len(calls) == 2:
            raise Stopped("told to stop")
        return train(*words, **options)

    monkeypatch.setattr(folds, "train", stops)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped")
    again = go(tmp_path / "stopped")
    assert len(calls) == 3, "the first fold was trained once"
    np.testing.assert_array_equal(again.left_out, straight.left_out)
    with pytest.raises(ValueError, match="another recipe"):
        go(tmp_path / "stopped", replace(recipe, epochs=2))
    shutil.rmtree(tmp_path / "stopped" / "fold-1")
    go(tmp_path / "stopped")
    assert len(calls) == 4


def test_a_student_says_what_it_is_taught(dealt, tmp_path):
    """Taught that everything is the second class, it says so; the labels alone say otherwise."""
    training, validation, classes, recipe, _ = dealt
    recipe = replace(recipe, epochs=3, learning_rate=0.003, imbalance="none")
    targets = np.zeros((len(training), len(classes)), np.float32)
    targets[:, 1] = 1
    model = Classifier("mobilenetv2_050", len(classes))
    history = train(model, training, validation, classes, recipe, tmp_path / "taught", CPU, targets)
    one_class_for_all = 1 / validation.rows.diagnosis.nunique()
    assert history.validation_balanced_accuracy.iloc[-1] == pytest.approx(one_class_for_all)
    assert history.train_loss.iloc[-1] < 1 < history.validation_loss.iloc[-1]
    with pytest.raises(ValueError, match="another targets"):
        train(model, training, validation, classes, recipe, tmp_path / "taught", CPU)
