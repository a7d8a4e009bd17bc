"""Diagnoses that come late, in part, twice or with two opinions; alarms that need the intervals apart; an honest estimate."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from skin_lesion.evaluation.calibration import at_prevalence
from skin_lesion.evaluation.metrics import score
from skin_lesion.monitoring import quality
from skin_lesion.monitoring.captures import Piece
from skin_lesion.monitoring.quality import (
    CONFLICTING,
    UNKNOWN,
    Estimate,
    Judged,
    Labels,
    check_estimate,
    compare_quality,
    read_labels,
)

CLASSES, SHARES = ["MEL", "NV", "BKL"], [0.15, 0.65, 0.2]
AT = datetime(2026, 3, 1, 9, tzinfo=UTC)


def label(event, data):
    return json.dumps(
        {"groundTruthData": {"data": data, "encoding": "CSV"}, "eventMetadata": {"eventId": event}, "eventVersion": "0"}
    )


def written(folder, lines, hour="2026/03/09/14"):
    place = folder / hour
    place.mkdir(parents=True, exist_ok=True)
    (place / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captured(events, pictures=1, at=AT):
    rows = [{"event_id": e, "picture": n, "at": at} for e in events for n in range(pictures)]
    p = np.tile(np.array([[0.6, 0.3, 0.1]], np.float32), (len(rows), 1))
    return Piece(pd.DataFrame(rows), p, np.zeros((len(rows), 2), np.float32))


def clinic(n, seed, sharp=2.0, wrong=0.0):
    """Answers that are calibrated, and diagnoses of which a share is drawn anew."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3)) * sharp
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    y = (at_prevalence(p, SHARES).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return p, np.where(rng.random(n) < wrong, rng.integers(3, size=n), y)


def joined(p, y):
    labels = Labels({f"e{i}": [int(c)] for i, c in enumerate(y)}, {}, Counter())
    rows = pd.DataFrame({"event_id": list(labels.of), "picture": 0, "at": AT})
    return Judged(labels).add(Piece(rows, p.astype(np.float32), np.zeros((len(y), 2))))


@pytest.fixture(scope="module")
def baseline():
    p, y = clinic(1500, 0)
    return score(p, y, np.arange(1500), CLASSES, at_prevalence(p, SHARES), 300)


@pytest.mark.parametrize(
    "lines, known, counts",
    [
        (["MEL", "MEL"], [0], {"duplicate": 1}),
        (["MEL", "NV"], [CONFLICTING], {"conflicting": 1}),
        (["MEL", "NV", "MEL"], [CONFLICTING], {"conflicting": 1}),
        (["MEL,", ",NV"], [0, 1], {"partial": 0}),
        (["MEL,"], [0, UNKNOWN], {"partial": 1}),
        (["MEL", "MEL,NV,BKL"], [0, 1, 2], {"duplicate": 1}),
        (["NV,NV", "NV,MEL"], [1, CONFLICTING], {"duplicate": 1, "conflicting": 1}),
        (["", "BKL"], [2], {"partial": 0}),
        ([" NV "], [1], {}),
        (["wart"], [UNKNOWN], {"not a class": 1}),
    ],
)
def test_labels_of_one_event(tmp_path, lines, known, counts):
    found = read_labels(written(tmp_path, [label("a", data) for data in lines]), CLASSES)
    assert found.of == {"a": known}
    assert {k: found.counts[k] for k in counts} == counts and found.counts["labels"] == len(lines)


def test_bad_lines_are_counted(tmp_path):
    lines = [label("a", "MEL"), label("b", "NV")[:50], "[]", "3", '{"groundTruthData": {"data": 3}}', label("c", "NV")]
    found = read_labels(written(tmp_path, lines), CLASSES)
    assert set(found.of) == {"a", "c"}
    assert (found.counts["truncated"], found.counts["foreign"]) == (1, 3)


def test_late_labels_join_old_captures_and_the_delay_is_known(tmp_path):
    written(tmp_path, [label("a", "MEL"), label("gone", "NV")], "2026/03/09/09")
    written(tmp_path, [label("b", "NV"), label("a", "MEL")], "2026/04/20/09")
    judged = Judged(read_labels(tmp_path, CLASSES))
    for piece in (captured(["a", "x"]), captured(["y"]), captured(["b"], at=AT + timedelta(days=10))):
        judged.add(piece)
    assert dict(zip(judged.events, judged.y)) == {"a": 0, "b": 1}
    assert judged.counts() | {"judged": 2, "unmatched": 1, "duplicate": 1} == judged.counts()
    assert judged.delay() == {"median": 24.0, "p90": pytest.approx(36.8), "longest": 40.0}


def test_a_file_alone_tells_no_delay(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(label("a", "MEL"))
    judged = Judged(read_labels(path, CLASSES)).add(captured(["a"]))
    assert judged.count == 1 and judged.delay() is None


def test_each_picture_of_a_request_has_its_own_label(tmp_path):
    found = read_labels(written(tmp_path, [label("a", "MEL,,BKL"), label("b", "NV")]), CLASSES)
    judged = Judged(found).add(captured(["a", "b"], pictures=3))
    assert judged.y == [0, 2, 1] and judged.counts()["unmatched"] == 0


def test_no_more_labelled_pictures_are_kept_than_fit(monkeypatch):
    monkeypatch.setattr(quality, "MOST", 100)
    p, y = clinic(2000, 1)
    judged = joined(p, y)
    assert judged.count == 2000 and len(judged.y) == len(judged.p) == len(judged.events) == 100
    kept = [int(e[1:]) for e in judged.events]
    assert judged.y == [y[i] for i in kept]
    assert 700 < np.mean(kept) < 1300, "the kept are not drawn from all"


def test_without_change_few_windows_alarm(baseline):
    alarms = [compare_quality(joined(*clinic(200, seed)), baseline, SHARES)[0].alarm for seed in range(1, 21)]
    assert sum(a.any() for a in alarms) <= 3, [a[a].index.tolist() for a in alarms]


@pytest.mark.parametrize(
    "change, metric", [(dict(wrong=0.35), "accuracy"), (dict(wrong=0.35), "macro_auc"), (dict(sharp=0.8), "accuracy")]
)
def test_a_model_that_got_worse_alarms(baseline, change, metric):
    table, _ = compare_quality(joined(*clinic(400, 9, **change)), baseline, SHARES)
    assert table.alarm[metric] and table.high[metric] < table.base_low[metric]


def test_overconfidence_alone_alarms_by_the_calibration_error(baseline):
    p, y = clinic(1500, 3)
    sure = p**4 / (p**4).sum(axis=1, keepdims=True)
    table, _ = compare_quality(joined(sure, y), baseline, SHARES)
    assert table[table.alarm].index.tolist() == ["ece"]


def test_better_than_the_baseline_is_no_alarm(baseline):
    table, _ = compare_quality(joined(*clinic(400, 4, sharp=6.0)), baseline, SHARES)
    assert table.low["accuracy"] > table.base_high["accuracy"] and not table.alarm.any()


def test_a_class_that_the_baseline_could_not_estimate_never_alarms(baseline):
    less = json.loads(json.dumps(baseline))
    less["per_class"]["MEL"]["sensitivity"] = {"value": None, "low": None, "high": None, "reason": "2 lesions"}
    table, _ = compare_quality(joined(*clinic(400, 9, wrong=0.35)), less, SHARES)
    assert not table.alarm["sensitivity MEL"] and table.alarm["accuracy"]


def test_too_few_labels_decide_nothing(baseline):
    with pytest.raises(ValueError, match="12 labelled pictures are too few"):
        compare_quality(joined(*clinic(12, 1)), baseline, SHARES)


def test_the_estimate_holds_while_the_model_is_calibrated_and_is_caught_when_it_is_not():
    holds = [check_estimate(joined(*clinic(500, seed)), SHARES)["holds"] for seed in range(40)]
    assert sum(holds) >= 34, sum(holds)
    off = check_estimate(joined(*clinic(500, 1, wrong=0.35)), SHARES)
    assert not off["holds"] and off["estimated"]["value"] > off["measured"] + 0.1
    assert off["estimated"]["estimated"] is True
    assert Estimate(SHARES).accuracy() is None and check_estimate(Judged(Labels({}, {}, Counter())), SHARES) is None
