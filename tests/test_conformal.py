"""Prediction sets hold what they promise, lesions count once, and what cannot be promised is said."""

import numpy as np
import pytest

from skin_lesion.evaluation.conformal import (
    fit_abstention,
    fit_sets,
    measure_abstention,
    measure_sets,
    prediction_sets,
)


def draw(lesions, rng, shares=(0.6, 0.3, 0.1), alike=0.8):
    """Lesions with one to six pictures that resemble each other, and an over-confident model."""
    truth = rng.choice(len(shares), lesions, p=shares)
    of = np.repeat(np.arange(lesions), rng.integers(1, 7, lesions))
    noise = rng.normal(size=(lesions, len(shares)))[of] * alike + rng.normal(size=(len(of), len(shares))) * 0.5
    logits = 3 * (np.eye(len(shares))[truth[of]] + noise)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), truth[of], of.astype(str)


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("lesions", [60, 300])
def test_the_promise_is_kept_for_every_class(coverage, lesions):
    """Mean coverage of a picture of a new lesion over 400 validation sets, against a large fixed test set."""
    rng = np.random.default_rng(1)
    q, truth, of = draw(6000, rng)
    weight = 1 / np.bincount(of.astype(int))[of.astype(int)]
    found = np.zeros(3)
    for _ in range(400):
        sets = prediction_sets(q, fit_sets(*draw(lesions, rng), coverage))
        inside = sets[np.arange(len(q)), truth]
        found += [np.average(inside[truth == c], weights=weight[truth == c]) for c in range(3)]
    assert (found / 400 > coverage - 0.012).all(), found / 400
    if lesions == 300:
        assert found[0] / 400 < coverage + 0.04, "and not by sets that hold everything"


def test_pictures_counted_one_by_one_would_break_it():
    """One lesion with a thousand pictures must not set the threshold of its class."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.3, 0.9, 50)
    p = np.concatenate([p, np.full(1000, 0.95)])
    p, y = np.stack([p, 1 - p], 1), np.zeros(1050, int)
    lesions = np.array([f"L{min(i, 50)}" for i in range(1050)])
    by_lesion, by_picture = (fit_sets(p, y, of, 0.9)[0] for of in (lesions, np.arange(1050)))
    assert by_lesion < 0.45 < 0.9 < by_picture


def test_the_threshold_of_few_lesions_by_hand():
    p = np.array([[x, 1 - x] for x in (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)])
    y, lesions = np.zeros(9, int), np.arange(9)
    assert fit_sets(p, y, lesions, 0.9).tolist() == [0.2, 0], "9 lesions: none may be missed"
    assert fit_sets(p[:8], y[:8], lesions[:8], 0.9).tolist() == [0, 0], "8 are too few: always in the set"
    assert fit_sets(p, y, lesions, 0.8).tolist() == [0.4, 0], "2 of 10, the new one among them"


def test_a_set_is_never_empty_and_ties_are_inside():
    p = np.array([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33]])
    assert prediction_sets(p, [0.9, 0.9, 0.9]).sum(1).tolist() == [1, 1]
    assert prediction_sets(p, [0.5, 0.3, 0.21]).tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("coverage", [0, 1, -0.1, float("nan")])
def test_a_coverage_that_cannot_be_is_refused(coverage):
    with pytest.raises(ValueError, match="evaluate.coverage"):
        fit_sets(np.eye(2), np.arange(2), np.arange(2), coverage)


def test_measured_with_lesions_counting_once():
    sets = np.array([[True, False], [False, True], [False, True], [True, True]])
    found = measure_sets(sets, np.array([0, 0, 0, 1]), np.array(["a", "b", "b", "c"]), ("MEL", "NV"), 50, min_lesions=2)
    assert found["coverage"]["value"] == pytest.approx(2 / 3) and found["size"]["value"] == pytest.approx(4 / 3)
    assert found["per_class"]["MEL"]["coverage"]["value"] == 0.5
    assert found["per_class"]["NV"]["coverage"]["value"] is None and found["per_class"]["NV"]["lesions"] == 1


def test_abstention_takes_the_share_it_was_asked_for():
    p, y, lesions = draw(500, np.random.default_rng(3))
    below = fit_abstention(p, 0.1)
    assert np.mean(p.max(1) < below) == pytest.approx(0.1, abs=0.005)
    assert fit_abstention(p, 0) == p.max(1).min()
    found = measure_abstention(p, y, lesions, below, 200)
    assert found["accuracy_answered"]["value"] > found["accuracy_abstained"]["value"] + 0.1
    nothing = measure_abstention(p, y, lesions, 0.0, 20)
    assert nothing["share"]["value"] == 0 and nothing["accuracy_abstained"]["value"] is None
    with pytest.raises(ValueError, match="evaluate.abstain_share"):
        fit_abstention(p, 1)
