"""The unknown score: what is planted is found, no lesion judges itself, and it survives its file and odd inputs."""

import subprocess
import sys

import numpy as np
import pytest

from skin_lesion.data.images import load_square
from skin_lesion.data.splits import LeakError
from skin_lesion.data.unknown import KINDS, write_unknown
from skin_lesion.evaluation.metrics import ranking
from skin_lesion.evaluation.unknown import FILE, Unknown, _folds, fit_reference, fit_unknown, measure_unknown, signs

D, C = 60, 4
CENTRES = np.random.default_rng(0).normal(size=(C, D)) * 2
LAYER = np.linalg.pinv(CENTRES) * 4
EMPTY = np.zeros((0, D)), np.zeros((0, C))


def known(lesions, seed):
    """Features, logits, classes and lesions of two pictures a lesion."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.integers(0, C, lesions), 2)
    x = CENTRES[y] + np.repeat(rng.normal(size=(lesions, D)), 2, axis=0) + 0.5 * rng.normal(size=(2 * lesions, D))
    return x, x @ LAYER, y, np.repeat([f"{seed}-{i}" for i in range(lesions)], 2)


def planted(n, seed):
    """Pictures from elsewhere."""
    x = 2 * np.random.default_rng(seed).normal(size=(n, D))
    return x, x @ LAYER


@pytest.fixture(scope="module")
def fitted():
    validation = known(150, 1)
    return validation, fit_unknown(*validation, *planted(30, 2))


def test_the_planted_unknown_is_found(fitted):
    _, model = fitted
    test, others = known(150, 3), planted(100, 4)
    a, b = model.score(*test[:2]), model.score(*others)
    assert ((0 <= a) & (a <= 1)).all() and ((0 <= b) & (b <= 1)).all()
    assert ranking(np.r_[a, b], np.r_[a * 0, b * 0 + 1] > 0)[0][0] > 0.97
    assert (b > model.threshold).mean() > 0.9 > 0.15 > (a > model.threshold).mean()


def test_a_fifth_diagnosis_that_nobody_left_out_is_found(fitted):
    """No calibration saw it, so this is what the score is for."""
    _, model = fitted
    rng = np.random.default_rng(5)
    x = 2 * rng.normal(size=D) + rng.normal(size=(100, D))
    assert (model.score(x, x @ LAYER) > model.threshold).mean() > 0.8


def test_calibrated_on_the_left_out_classes_alone():
    validation, others = known(150, 1), planted(100, 4)
    model = fit_unknown(*validation, *EMPTY)
    assert (model.score(*others) > model.threshold).mean() > 0.8


def test_calibration_is_a_probability_at_equal_priors():
    """Half known, half unknown: in each half of the scores the share of unknown pictures is about the mean score."""
    validation = known(300, 1)
    near = lambda n, seed: (
        CENTRES[0] + 1.25 * np.random.default_rng(seed).normal(size=(n, D)),
        (CENTRES[0] + 1.25 * np.random.default_rng(seed).normal(size=(n, D))) @ LAYER,
    )
    model = fit_unknown(*(v[validation[2] == 0] for v in validation), *near(400, 2))  # one class: nothing is left out
    test = known(800, 3)
    a, b = model.score(*(v[test[2] == 0] for v in test[:2])), model.score(*near(len(test[2][test[2] == 0]), 4))
    scores, truth = np.r_[a, b], np.r_[a * 0, b * 0 + 1]
    for part in (scores > 0.5, scores <= 0.5):
        assert abs(scores[part].mean() - truth[part].mean()) < 0.08


def test_a_known_picture_never_meets_its_own_lesion():
    lesions = np.array([f"L{i // 3}" for i in range(120)])
    fold = _folds(lesions)
    assert set(fold) == {0, 1, 2, 3, 4} and np.bincount(fold).max() <= 2 * np.bincount(fold).min()
    assert all(len(set(fold[lesions == lesion])) == 1 for lesion in lesions)
    assert sorted(set(_folds(lesions[:9]))) == [0, 1, 2], "no more folds than lesions"


def test_test_lesions_in_the_reference_are_refused(fitted):
    validation, model = fitted
    reference = validation[0], validation[2], validation[3]
    test = known(60, 3)
    mixed = (*test[:3], np.r_[validation[3][:1], test[3][1:]])
    with pytest.raises(LeakError, match="1 lesions of the test pictures"):
        measure_unknown(model, reference, mixed, planted(20, 4), tuple("ABCD"), 20)


def test_intervals_and_what_is_not_estimable(fitted):
    validation, model = fitted
    reference, test = (validation[0], validation[2], validation[3]), known(60, 3)
    few = test[2] != 3
    few[np.flatnonzero(~few)[:4]] = True  # two lesions of class D
    test = tuple(v[few] for v in test)
    found = measure_unknown(model, reference, test, planted(5, 4), tuple("ABCD"), 100, min_lesions=5)
    assert found["per_class"]["D"]["value"] is None and "2 lesions" in found["per_class"]["D"]["reason"]
    for name in "ABC":
        assert 0.9 < found["per_class"][name]["low"] <= found["per_class"][name]["value"] <= 1
    assert (
        found["mean"]["low"]
        <= found["mean"]["value"]
        == pytest.approx(np.mean([found["per_class"][c]["value"] for c in "ABC"]))
    )
    assert found["not_dermoscopic"]["value"] > 0.9
    none = measure_unknown(model, reference, test, planted(4, 4), tuple("ABCD"), 20, min_lesions=5)
    assert none["not_dermoscopic"]["reason"] == "4 pictures; 5 are needed"
    assert measure_unknown(model, reference, test, EMPTY, tuple("ABCD"), 20)["not_dermoscopic"]["value"] is None


def test_it_survives_its_file(fitted, tmp_path):
    _, model = fitted
    model.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [FILE]
    again, x = Unknown.load(tmp_path), planted(50, 6)
    np.testing.assert_allclose(again.score(*x), model.score(*x), atol=1e-4)
    assert again.threshold == model.threshold
    assert again.score(np.float32(x[0]), np.float32(x[1])).shape == (50,) and again.score(*EMPTY).shape == (0,)
    with pytest.raises(FileNotFoundError, match="train again"):
        Unknown.load(tmp_path / "elsewhere")


def test_serving_it_needs_no_heavy_import(fitted, tmp_path):
    fitted[1].save(tmp_path)
    code = (
        "import sys; from skin_lesion.evaluation.unknown import Unknown; import skin_lesion.evaluation.conformal;"
        f"Unknown.load({str(tmp_path)!r}); print([m for m in ('sklearn', 'torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("case", ["constant", "one feature", "more features than pictures", "one class", "huge"])
def test_odd_inputs_give_finite_scores(case):
    x, logits, y, lesions = known(40, 1)
    others = planted(20, 2)
    if case == "constant":
        x, others = np.ones_like(x), (np.ones_like(others[0]), others[1])
    if case == "one feature":
        x, others = x[:, :1], (others[0][:, :1], others[1])
    if case == "more features than pictures":
        x, others = np.tile(x, 3), (np.tile(others[0], 3), others[1])
    if case == "one class":
        y = np.zeros_like(y)
    if case == "huge":
        others = others[0] * 1e12, others[1] * 1e3
    model = fit_unknown(x, logits, y, lesions, *others)
    for features, values in ((x, logits), others):
        assert np.isfinite(model.score(features, values)).all()
    assert (model.weights >= 0).all() and np.isfinite(model.threshold)


def test_what_cannot_be_fitted_is_refused():
    x, logits, y, lesions = known(10, 1)
    with pytest.raises(ValueError, match="1 lesions among the validation"):
        fit_unknown(x[:2], logits[:2], y[:2], lesions[:2], *EMPTY)
    with pytest.raises(ValueError, match="--unknown-dir"):
        fit_unknown(x, logits, np.zeros_like(y), lesions, *EMPTY)
    with pytest.raises(ValueError, match="not finite"):
        fit_unknown(x * np.nan, logits, y, lesions, *EMPTY)


def test_the_residual_is_what_lies_outside_the_axes():
    x = np.random.default_rng(1).normal(size=(400, D)) * np.r_[np.full(5, 10), np.full(D - 5, 0.1)] + 5
    mean, axes = fit_reference(x, 5)
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(axes.T @ axes, np.eye(5), atol=1e-9)
    found = signs(x, np.zeros((400, C)), mean, axes)
    np.testing.assert_allclose(found[:, 0], -np.log(C))
    outside = ((x - mean) @ (np.eye(D) - axes @ axes.T)) ** 2
    np.testing.assert_allclose(found[:, 1], np.log(outside.mean(1)), atol=1e-4)


# Drawn pictures


def test_drawn_pictures_are_pictures_of_every_kind(tmp_path):
    folder = write_unknown(tmp_path / "u", 12, seed=3)
    files = sorted(folder.glob("*.jpg"))
    assert sorted({f.name.split("_")[0] for f in files}) == sorted(KINDS) and len(files) == 12
    squares = np.stack([load_square(f, 64) for f in files])
    assert len({s.tobytes() for s in squares}) == 12
    content = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in sorted(write_unknown(tmp_path / "v", 12, seed=3).glob("*.jpg"))] == content
    assert [f.read_bytes() for f in sorted(write_unknown(tmp_path / "w", 12, seed=4).glob("*.jpg"))] != content


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "precious.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="something else"):
        write_unknown(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["precious.jpg"]
    folder = write_unknown(tmp_path / "u", 6)
    before = (folder / "unknown.json").stat().st_mtime_ns
    assert write_unknown(folder, 6) == folder and (folder / "unknown.json").stat().st_mtime_ns == before
    assert len(list(write_unknown(folder, 7).glob("*.jpg"))) == 7, "another number draws them anew"
