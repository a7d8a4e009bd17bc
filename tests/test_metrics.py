"""Our metrics against the official ISIC scorer, scikit-learn and a bootstrap written the slow way."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from skin_lesion.evaluation import metrics as m

pytestmark = pytest.mark.filterwarnings("ignore")  # of the official scorer and scikit-learn
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC")


def draw(n_lesions=200, seed=0, classes=7, ties=False):
    rng = np.random.default_rng(seed)
    lesions = np.repeat([f"L{i}" for i in range(n_lesions)], rng.integers(1, 4, n_lesions))
    per_lesion = np.r_[np.arange(classes), rng.choice(classes, n_lesions - classes)]
    y = per_lesion[np.unique(lesions, return_inverse=True)[1]]
    logits = rng.normal(size=(len(y), classes)) * 1.5 + 2 * np.eye(classes)[y]
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    if ties:
        p[::5] = 1 / classes
        p[1::7] = 0
        p[1::7, :2] = 0.5
        p = (p * 64).round() / 64 + 1e-12
        p /= p.sum(1, keepdims=True)
    return p, y, lesions


def official(p, y, classes):
    scorer = pytest.importorskip("isic_challenge_scoring.classification")
    truth = pd.DataFrame(np.eye(len(classes))[y], columns=classes)
    weights = pd.DataFrame({"score_weight": 1.0, "validation_weight": 1.0}, index=truth.index)
    return scorer.ClassificationScore(
        truth, pd.DataFrame(p, columns=classes), weights, scorer.ClassificationMetric.BALANCED_ACCURACY
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equal_to_the_official_scorer(seed):
    p, y, lesions = draw(seed=seed)
    want = official(p, y, CLASSES)
    ours = m.score(p, y, lesions, CLASSES, bootstrap=20, min_lesions=1)
    assert ours["balanced_accuracy"]["value"] == pytest.approx(want.overall, abs=1e-6)
    assert ours["macro_auc"]["value"] == pytest.approx(want.macro_average["auc"], abs=1e-6)
    assert ours["macro_average_precision"]["value"] == pytest.approx(want.macro_average["ap"], abs=1e-6)
    pairs = dict(
        auc="auc",
        average_precision="ap",
        sensitivity_at_half="sensitivity",
        specificity_at_half="specificity",
        f1_at_half="dice",
    )
    for i, name in enumerate(CLASSES):
        for our_name, their_name in pairs.items():
            assert ours["per_class"][name][our_name]["value"] == pytest.approx(
                want.per_category.iloc[i][their_name], abs=1e-6
            ), (name, our_name)


@pytest.mark.parametrize("ties", [False, True])
def test_official_scores_follow_the_scorer_even_in_ties(ties):
    p, y, _ = draw(ties=ties)
    want, ours = official(p, y, CLASSES), m.official_scores(p, y, CLASSES)
    assert ours["balanced_accuracy"] == pytest.approx(want.overall, abs=1e-6)
    for i, name in enumerate(CLASSES):
        for key, value in ours["per_class"][name].items():
            assert value == pytest.approx(want.per_category.iloc[i][key], abs=1e-6), (name, key)
    if ties:
        assert m.from_confusion(m.confusion(p, y))["balanced_accuracy"][0] != pytest.approx(want.overall, abs=1e-6)


def test_official_scores_without_a_class_and_with_nothing_called():
    """The scorer as a whole fails on an absent class, so its parts are asked."""
    theirs = pytest.importorskip("isic_challenge_scoring.metrics")
    from isic_challenge_scoring.confusion import create_binary_confusion_matrix

    p, y, _ = draw()
    p, y = np.minimum(p[y != 5], 0.45), y[y != 5]
    ours = m.official_scores(p, y, CLASSES)
    truth = pd.DataFrame(np.eye(7)[y], columns=CLASSES)
    want = theirs.balanced_multiclass_accuracy(
        truth, pd.DataFrame(p, columns=CLASSES), pd.Series(1.0, index=truth.index)
    )
    assert ours["balanced_accuracy"] == pytest.approx(want, abs=1e-6)
    assert ours["per_class"]["DF"]["auc"] is None
    for c, name in enumerate(CLASSES):
        cm = create_binary_confusion_matrix(y == c, p[:, c] > 0.5)
        for key in ("sensitivity", "specificity", "dice"):
            assert ours["per_class"][name][key] == pytest.approx(getattr(theirs, f"binary_{key}")(cm)), (name, key)


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_metrics_equal_scikit_learn(ties):
    p, y, lesions = draw(seed=3, ties=ties)
    w = m.lesion_weights(lesions, 5)
    s = m.statistics(p, y, w)
    called = p.argmax(1)
    for b in range(len(w)):
        assert (m.confusion(p, y, w)[b] == sk.confusion_matrix(y, called, labels=range(7), sample_weight=w[b])).all()
        for c in range(7):
            if not w[b][y == c].any():
                continue
            assert s["auc"][b, c] == pytest.approx(sk.roc_auc_score(y == c, p[:, c], sample_weight=w[b]))
            assert s["average_precision"][b, c] == pytest.approx(
                sk.average_precision_score(y == c, p[:, c], sample_weight=w[b])
            )
            assert s["f1"][b, c] == pytest.approx(sk.f1_score(y == c, called == c, sample_weight=w[b]))
            assert s["specificity"][b, c] == pytest.approx(sk.recall_score(y != c, called != c, sample_weight=w[b]))
        assert s["log_loss"][b] == pytest.approx(
            sk.log_loss(y, np.maximum(p, 1e-12), labels=range(7), sample_weight=w[b])
        )


def test_a_weighted_resample_is_the_resample():
    """Weights and copies of rows must agree for every metric, ties included, or the bootstrap is of something else."""
    p, y, lesions = draw(n_lesions=60, seed=4, ties=True)
    w = m.lesion_weights(lesions, 30)
    fast = m.statistics(p, y, w)
    for b in range(len(w)):
        rows = np.repeat(np.arange(len(y)), w[b].astype(int))
        slow = m.statistics(p[rows], y[rows], np.ones((1, len(rows))))
        for name in fast:
            np.testing.assert_allclose(fast[name][b], slow[name][0], atol=1e-12, err_msg=name)


def test_whole_lesions_are_drawn():
    lesions = np.array(["a", "b", "a", "c", "b"])
    w = m.lesion_weights(lesions, 500)
    assert (w[0] == 1).all()
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 1] == w[:, 4]).all()
    assert (w[1:, 0] + w[1:, 1] + w[1:, 3] == 3).all()
    assert w[1:].mean() == pytest.approx(1, abs=0.1)
    assert (w == m.lesion_weights(lesions, 500)).all() and (w != m.lesion_weights(lesions, 500, seed=2)).any()


def test_interval_agrees_with_a_naive_bootstrap_and_is_wider_than_one_over_images():
    p, y, lesions = draw(n_lesions=150, seed=5)
    p, y, lesions = np.repeat(p, 4, 0), np.repeat(y, 4), np.repeat(lesions, 4)
    ours = m.score(p, y, lesions, CLASSES, bootstrap=1000)["balanced_accuracy"]
    rng, images = np.random.default_rng(9), {}
    for i, name in enumerate(lesions):
        images.setdefault(name, []).append(i)
    names = list(images)
    naive = []
    for _ in range(400):
        rows = np.concatenate([images[names[i]] for i in rng.integers(len(names), size=len(names))])
        naive.append(np.mean([(p[rows].argmax(1) == c)[y[rows] == c].mean() for c in np.unique(y[rows])]))
    low, high = np.quantile(naive, [0.025, 0.975])
    assert abs(ours["low"] - low) < 0.015 and abs(ours["high"] - high) < 0.015
    single = m.score(p, y, np.arange(len(y)), CLASSES, bootstrap=500)["balanced_accuracy"]
    assert single["high"] - single["low"] < 0.7 * (ours["high"] - ours["low"])


def test_interval_covers_the_truth():
    """Of 95% intervals of a known accuracy, near 95% hold it."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        correct = np.repeat(rng.random(120) < 0.8, 2)
        y = np.tile([0, 1], 120)
        p = np.eye(2)[np.where(correct, y, 1 - y)]
        got = m.interval(m.from_confusion(m.confusion(p, y, m.lesion_weights(np.arange(240) // 2, 300)))["accuracy"])
        held += got["low"] <= 0.8 <= got["high"]
    assert 0.89 <= held / 200 <= 0.99


def test_calibration_error_and_risk_coverage_by_hand():
    p, y, _ = draw(seed=6)
    conf, right, ece = p.max(1), p.argmax(1) == y, 0
    for k in range(15):
        inside = (conf > k / 15) & (conf <= (k + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - conf[inside].mean())
    assert m.calibration_error(p, y)[0] == pytest.approx(ece)
    order = np.argsort(-conf)
    risk = (~right[order]).cumsum() / np.arange(1, len(y) + 1)
    coverage, ours, area = m.risk_coverage(p, y)
    np.testing.assert_allclose(ours[0], risk)
    assert area[0] == pytest.approx(risk.mean()) and coverage[0][-1] == 1
    perfect = np.eye(7)[y]
    brier, loss = m.proper_scores(perfect, y)
    assert brier[0] == loss[0] == 0 and m.calibration_error(perfect, y)[0] == 0


def test_too_few_lesions_are_not_estimable():
    p, y, lesions = draw(seed=7)
    keep = y != 6
    out = m.score(p[keep], y[keep], lesions[keep], CLASSES, bootstrap=50, min_lesions=1)
    assert out["per_class"]["VASC"]["auc"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "0 lesions of this class; 1 are needed",
    }
    present = sk.balanced_accuracy_score(y[keep], p[keep].argmax(1))
    assert out["balanced_accuracy"]["value"] == pytest.approx(present)
    few = m.score(p, y, lesions, CLASSES, bootstrap=50, min_lesions=10_000)
    assert all(d["sensitivity"]["value"] is None for d in few["per_class"].values())
    json.dumps(out, allow_nan=False), json.dumps(few, allow_nan=False)


def test_paired_difference_is_narrower_than_two_intervals():
    p, y, lesions = draw(seed=8)
    q = 0.9 * p + 0.1 / 7
    q[:, 0] += 0.05
    q /= q.sum(1, keepdims=True)
    got = m.paired_difference(p, q, y, lesions)
    a, b = (m.score(x, y, lesions, CLASSES, bootstrap=300)["balanced_accuracy"] for x in (p, q))
    assert got["value"] == pytest.approx(a["value"] - b["value"])
    assert got["high"] - got["low"] < 0.6 * (a["high"] - a["low"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda p, y, g: (p[:-1], y, g), "must be"),
        (lambda p, y, g: (np.log(p), y, g), "softmax"),
        (lambda p, y, g: (np.where(p == p.max(), np.nan, p), y, g), "softmax"),
        (lambda p, y, g: (p, y - 1, g), "labels go from -1"),
        (lambda p, y, g: (p[:0], y[:0], g[:0]), "N of 1 or more"),
    ],
)
def test_wrong_input_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        m.score(*change(*draw()), CLASSES, bootstrap=2)


def test_a_thousand_resamples_of_1500_images_take_seconds():
    p, y, lesions = draw(n_lesions=750, seed=10)
    start = time.process_time()
    m.score(p, y, lesions, CLASSES, bootstrap=1000)
    assert time.process_time() - start < 20
