"""Captured lines become tables; every line that does not is counted and named, and nothing ends the reading."""

import base64
import json
import os
from datetime import UTC, datetime, timedelta

import cv2
import numpy as np
import pandas as pd
import pytest
import requests
from conftest import Served, colours_package

from skin_lesion.monitoring.capture import record
from skin_lesion.monitoring.captures import LABELS, NUMBERS, Captures, Seen
from skin_lesion.monitoring.properties import PROPERTIES, image_properties
from skin_lesion.monitoring.reference import fit_reference, save_reference

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
CLASSES = ["MEL", "NV"]
ANSWER = {"diagnosis": "NV", "decision": "NV", "malignant": 0.2, "probabilities": {"MEL": 0.2, "NV": 0.8}}
PICTURE = {"properties": dict.fromkeys(PROPERTIES, 1.0), "features": [0.0, 1.0], "age": 54}


def line(event="a", at=NOW - timedelta(hours=3), pictures=1, version="v1", **answer):
    answers = [ANSWER | answer] * pictures
    said = {"predictions": answers, "ms": 20.0, "model": {"version": version}}
    return json.dumps(record("image/jpeg", None, [PICTURE] * pictures, said, event, at))


def write(folder, lines, hour="2026/03/02/09", name="a.jsonl"):
    place = folder / "skin-lesion/AllTraffic" / hour
    place.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (place / name).write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogateescape"))


def read(folder, **options):
    captures = Captures(folder, CLASSES, 2, now=NOW, **options)
    pieces = list(captures)
    return captures, [event for piece in pieces for event in piece.rows.event_id]


BAD = {
    "truncated": ["[" * 200_000, line()[:300], "", "{", "\udcff\udcfe", '{"captureData": '],
    "foreign": [
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        '{"captureData": null, "eventMetadata": {}}',
        line().replace("properties", "other"),
        line().replace('\\"NV\\": 0.8', '\\"BKL\\": 0.8'),
        line().replace("0.8}", '\\"much\\"}'),
        line().replace("[0.0, 1.0]", "[0.0]"),
        line().replace("[0.0, 1.0]", "7"),
        line().replace('"inferenceTime": "2026-03-02T09:00:00Z"', '"inferenceTime": "yesterday"'),
        line().replace('\\"version\\": \\"v1\\"', '\\"version\\": {}').replace('\\"model\\"', '\\"models\\"'),
        line(pictures=0),
        line().replace('\\"malignant\\": 0.2', '\\"malignant\\": Infinity'),
        line().replace('\\"malignant\\": 0.2', '\\"malignant\\": 1e300'),
        line().replace('\\"NV\\": 0.8', '\\"NV\\": NaN'),
        line().replace('\\"NV\\": 0.8', '\\"NV\\": 8'),
        line().replace('"age\\": 54', '"age\\": [54]'),
        line().replace("2026-03-02T09:00:00Z", "0001-01-01T00:00:00+23:00"),
        json.dumps(record("image/jpeg", b"JPEG", [PICTURE], {"predictions": []}, "b", NOW)),
        # as AWS captures a request of JSON
        json.dumps(
            {
                "captureData": {
                    "endpointInput": {"data": '{"image": "abc"}', "encoding": "JSON"},
                    "endpointOutput": {"data": '{"predictions": [1]}', "encoding": "JSON"},
                },
                "eventMetadata": {"eventId": "b", "inferenceTime": "2026-03-02T09:00:00Z"},
            }
        ),
    ],
    "future": [line("b", NOW + timedelta(minutes=6)), line("b", NOW + timedelta(days=400))],
}


@pytest.mark.parametrize("reason, bad", [(reason, bad) for reason, each in BAD.items() for bad in each])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, reason, bad):
    write(tmp_path, [line("a"), bad, line("c")])
    captures, events = read(tmp_path, aside=tmp_path / "aside")
    assert events == ["a", "c"]
    assert captures.counts[reason] == 1 and captures.counts["requests"] == 2, captures.counts
    [noted] = [json.loads(text) for text in (tmp_path / "aside").read_text().splitlines()]
    assert noted == {"file": "skin-lesion/AllTraffic/2026/03/02/09/a.jsonl", "line": 2, "reason": reason}


def test_times_of_other_zones_are_the_same_moments(tmp_path):
    write(
        tmp_path,
        [line("a"), line("b").replace("09:00:00Z", "11:00:00+02:00"), line("c").replace("09:00:00Z", "09:00:00")],
    )
    [piece] = Captures(tmp_path, CLASSES, 2, now=NOW)
    assert piece.rows["at"].nunique() == 1 and str(piece.rows["at"].dtype).endswith("UTC]")


def test_every_line_is_accounted_for(tmp_path):
    lines = (
        [line(f"e{i}") for i in range(50)] + [bad for each in BAD.values() for bad in each] + [line("e7"), line("e9")]
    )
    order = np.random.default_rng(1).permutation(len(lines))
    write(tmp_path, [lines[i] for i in order])
    captures, events = read(tmp_path)
    assert sorted(events) == sorted(f"e{i}" for i in range(50))
    found = {k: captures.counts[k] for k in (*BAD, "duplicate", "requests")}
    assert found == {k: len(v) for k, v in BAD.items()} | {"duplicate": 2, "requests": 50}
    assert sum(found.values()) == len(lines)


def test_a_file_that_comes_twice_counts_once(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, [line(f"e{i}") for i in range(30)], name=name)
    captures, events = read(tmp_path, aside=tmp_path / "aside")
    assert len(events) == 30 and captures.counts["duplicate"] == 30
    noted = [json.loads(text) for text in (tmp_path / "aside").read_text().splitlines()]
    assert {n["file"][-7:] for n in noted} == {"b.jsonl"} and [n["line"] for n in noted] == list(range(1, 31))


def test_ids_are_remembered_in_fixed_memory():
    seen = Seen()
    before = len(seen.bits)
    assert sum(seen.add(f"e{i}") for i in range(100_000)) == 0
    assert all(seen.add(f"e{i}") for i in range(0, 100_000, 97))
    assert len(seen.bits) == before


def test_times_are_held_to_the_second_and_hours_outside_are_not_opened(tmp_path):
    for hour in (6, 7, 8, 9):
        at = NOW.replace(hour=hour)
        write(tmp_path, [line(f"{hour}", at), line(f"{hour}+", at + timedelta(minutes=59))], f"2026/03/02/{hour:02}")
    (tmp_path / "skin-lesion/AllTraffic/2026/03/02/03").mkdir()
    (tmp_path / "skin-lesion/AllTraffic/2026/03/02/03/a.jsonl").write_text("no line of ours")
    captures, events = read(tmp_path, since=NOW.replace(hour=7, minute=59), until=NOW.replace(hour=9))
    assert events == ["7+", "8", "8+"]
    assert captures.counts["truncated"] == 0, "the hour 3 was opened"


def test_a_file_without_an_hour_and_one_that_cannot_be_read(tmp_path):
    (tmp_path / "loose.jsonl").write_text(line("a"))
    (tmp_path / "folder.jsonl").mkdir()
    captures, events = read(tmp_path, aside=tmp_path / "aside")
    assert events == ["a"] and captures.counts["unreadable"] == 1
    assert json.loads((tmp_path / "aside").read_text())["file"] == "folder.jsonl"


def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("skin_lesion.monitoring.captures.MAX_LINE", 5_000)
    write(tmp_path, [line("a"), "x" * 20_000, line("c")])
    captures, events = read(tmp_path)
    assert events == ["a", "c"] and captures.counts["truncated"] == 1


def test_tables_have_a_bounded_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("skin_lesion.monitoring.captures.ROWS", 10)
    write(tmp_path, [line(f"e{i}", pictures=3) for i in range(11)])
    pieces = list(Captures(tmp_path, CLASSES, 2, now=NOW))
    assert [len(p.rows) for p in pieces] == [12, 12, 9]
    assert {*NUMBERS, *LABELS} <= set(pieces[0].rows) and pieces[0].rows.ms.notna().sum() == 4


def test_other_versions_and_refused_pictures_are_counted(tmp_path):
    mixed = json.loads(line("m", pictures=2))
    said = json.loads(mixed["captureData"]["endpointOutput"]["data"])
    said["predictions"][1] = {"error": "no picture"}
    mixed["captureData"]["endpointOutput"]["data"] = json.dumps(said)
    write(tmp_path, [line("a"), line("b", version="v2"), json.dumps(mixed)])
    captures, events = read(tmp_path, version="v1")
    assert events == ["a", "m"] and captures.counts["other version"] == 1 and dict(captures.versions) == {"v2": 1}
    assert captures.counts["refused pictures"] == 1


@pytest.mark.parametrize("pictures", [False, True])
def test_what_the_server_captures_is_what_the_monitor_reads(tmp_path, pictures):
    """From a request to a row: the properties and the projected features of the very square that the network saw."""
    package, rng = colours_package(tmp_path / "package"), np.random.default_rng(1)
    squares = rng.integers(60, 200, (80, 32, 32, 3), dtype=np.uint8)
    numbers = pd.DataFrame([image_properties(s) for s in squares])
    features = squares.mean(axis=(1, 2))
    reference = fit_reference(numbers, pd.DataFrame({"sex": ["male", "female"] * 40}), features, np.arange(80))
    save_reference(reference, package)
    words = ["--capture", str(tmp_path / "kept"), f"--set=serving.capture_pictures={str(pictures).lower()}"]
    with Served(package, *words) as server:
        png = cv2.imencode(".png", squares[0][:, :, ::-1])[1].tobytes()
        sent = {"images": [{"image": base64.b64encode(x).decode(), "sex": "male", "age": 40} for x in (png, png)]}
        answered = requests.post(server.url + "/invocations", json=sent)
        assert answered.status_code == 200, answered.text
    [piece] = Captures(tmp_path / "kept", ["MEL", "NV", "AK"], reference.axes.shape[1])
    assert len(piece.rows) == 2 and piece.rows.picture.tolist() == [0, 1] and piece.rows.sex.tolist() == ["male"] * 2
    assert piece.rows.pictured.tolist() == [pictures] * 2 and piece.rows.ms[0] > 0
    for name, value in image_properties(squares[0]).items():
        np.testing.assert_allclose(piece.rows[name][0], value, atol=1e-4)
    np.testing.assert_allclose(piece.projected[0], reference.project(features[:1])[0], atol=1e-3)
    assert piece.rows.event_id[0] == answered.json()["request_id"]


def test_a_package_without_a_reference_is_served_and_its_lines_are_foreign(tmp_path):
    package = colours_package(tmp_path / "package")
    with Served(package, "--capture", str(tmp_path / "kept")) as server:
        data = np.full((32, 32, 3), 120, np.uint8)
        png = cv2.imencode(".png", data)[1].tobytes()
        assert requests.post(server.url + "/invocations", png, headers={"Content-Type": "image/png"}).status_code == 200
    captures = Captures(tmp_path / "kept", ["MEL", "NV", "AK"], 2)
    assert list(captures) == [] and captures.counts["foreign"] == 1


def test_reading_needs_no_right_to_write(tmp_path):
    write(tmp_path, [line("a")])
    os.chmod(tmp_path, 0o500)
    try:
        assert read(tmp_path)[1] == ["a"]
    finally:
        os.chmod(tmp_path, 0o700)
