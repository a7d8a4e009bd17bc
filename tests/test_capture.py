"""Data capture: SageMaker's format and folders, sampled, rotated, encrypted, and never in the way of a request."""

import base64
import io
import json
import re
import threading
import time
from datetime import UTC, datetime

import numpy as np
import pytest
import requests
from conftest import Served, colours_package
from PIL import Image

from skin_lesion.monitoring.capture import Capture, record

AT = datetime(2026, 3, 1, 9, 30, 5, tzinfo=UTC)
LINE = record("image/jpeg", None, [{"width": 600}], {"predictions": []}, "r", AT)


def picture():
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(90, 200, (60, 60, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def lines(folder):
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().splitlines()]


def test_the_format_is_sagemakers(tmp_path):
    capture = Capture(str(tmp_path), "skin-lesion")
    capture.put(LINE)
    capture.close()
    [path] = tmp_path.rglob("*.jsonl")
    assert re.fullmatch(
        r"skin-lesion/AllTraffic/2026/03/01/09/30-05-[0-9a-f-]{36}\.jsonl", path.relative_to(tmp_path).as_posix()
    )
    [line] = lines(tmp_path)
    assert set(line) == {"captureData", "eventMetadata", "eventVersion"} and line["eventVersion"] == "0"
    assert line["eventMetadata"] == {"eventId": "r", "inferenceTime": "2026-03-01T09:30:05Z"}
    for part, mode in (("endpointInput", "INPUT"), ("endpointOutput", "OUTPUT")):
        assert set(line["captureData"][part]) == {"observedContentType", "mode", "data", "encoding"}
        assert line["captureData"][part]["mode"] == mode


@pytest.mark.parametrize("pictures", [False, True])
def test_the_server_captures_and_leaves_the_picture_out_unless_told(tmp_path, pictures):
    package, png = colours_package(tmp_path / "package"), picture()
    words = ["--capture", str(tmp_path / "kept"), f"--set=serving.capture_pictures={str(pictures).lower()}"]
    with Served(package, *words) as server:
        sent = {"image": base64.b64encode(png).decode(), "age": 54, "site": "back", "name": "Jane Doe"}
        asked = requests.post(server.url + "/invocations", json=sent | {"explain": True}).json()
        refused = requests.post(server.url + "/invocations", b"x", headers={"Content-Type": "image/png"})
        assert refused.status_code == 400
    [line] = lines(tmp_path / "kept")
    assert line["eventMetadata"]["eventId"] == asked["request_id"]
    said, given = (json.loads(line["captureData"]["endpointOutput"]["data"]), line["captureData"]["endpointInput"])
    assert said["predictions"][0]["probabilities"] == asked["predictions"][0]["probabilities"]
    assert "explanation" not in said["predictions"][0] and said["model"] == asked["model"]
    if pictures:
        assert given["encoding"] == "BASE64" and json.loads(base64.b64decode(given["data"]))["image"] == sent["image"]
    else:
        kept = json.loads(given["data"])["pictures"][0]
        assert (kept["age"], kept["site"], kept["width"]) == (54, "back", 60)
        assert sent["image"][:60] not in json.dumps(line) and "Jane" not in json.dumps(line)


def test_a_share_of_the_requests_is_kept(tmp_path):
    capture = Capture(str(tmp_path), "e", share=0.25)
    kept = sum(capture.wanted() for _ in range(4000))
    assert 850 < kept < 1150
    assert not any(Capture(str(tmp_path), "e", share=0).wanted() for _ in range(100))
    capture.close()


def test_files_end_by_size_and_by_time(tmp_path):
    size = len(json.dumps(LINE)) + 1
    capture = Capture(str(tmp_path / "size"), "e", max_bytes=10 * size)
    for _ in range(25):
        capture.put(LINE)
    capture.close()
    assert sorted(len(p.read_text().splitlines()) for p in (tmp_path / "size").rglob("*.jsonl")) == [5, 10, 10]
    capture = Capture(str(tmp_path / "time"), "e", max_seconds=0.2)
    capture.put(LINE)
    end = time.monotonic() + 5
    while not lines(tmp_path / "time") and time.monotonic() < end:
        time.sleep(0.05)
    assert len(lines(tmp_path / "time")) == 1 and capture.written == 1
    assert not list(tmp_path.rglob("*.part"))
    capture.close()


def test_a_place_that_hangs_costs_records_and_never_a_request(tmp_path):
    capture, hang = Capture(str(tmp_path), "e", limit=10, max_bytes=1), threading.Event()
    capture.write = lambda key, data: hang.wait(20)
    started = time.monotonic()
    for _ in range(1000):
        capture.put(LINE)
    assert time.monotonic() - started < 1 and capture.lost >= 980
    hang.set()
    capture.close()
    assert capture.lost + capture.written == 1000


def test_what_waits_has_a_bound_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("skin_lesion.monitoring.capture.MAX_WAITING", 100_000)
    (tmp_path / "kept").touch()
    capture = Capture(str(tmp_path / "kept"), "e", max_seconds=0.1)
    picture = record("image/png", bytes(20_000), [], {}, "p", AT)
    for _ in range(20):
        capture.put(lambda: picture, held=20_000)
        time.sleep(0.02)
    assert capture.lost >= 15  # not all 20, which are less than `limit`
    (tmp_path / "kept").unlink()
    end = time.monotonic() + 5
    while not capture.written and time.monotonic() < end:
        time.sleep(0.05)
    capture.put(picture)
    capture.close()
    assert capture.lost + capture.written == 21 and 2 <= capture.written == len(lines(tmp_path))
    huge = Capture(str(tmp_path / "huge"), "e")
    huge.put(picture, held=200_000)  # alone it is taken, however large
    huge.close()
    assert huge.written == 1


def test_a_place_that_comes_back_gets_what_waited(tmp_path):
    (tmp_path / "kept").touch()
    capture = Capture(str(tmp_path / "kept"), "e", max_seconds=0.2)
    for _ in range(5):
        capture.put(LINE)
    time.sleep(0.6)
    assert capture.written == 0 and capture.lost == 0
    (tmp_path / "kept").unlink()
    capture.close()
    assert (capture.written, capture.lost, len(lines(tmp_path))) == (5, 0, 5)


def test_a_place_that_cannot_be_written_to_fails_no_request(tmp_path):
    (tmp_path / "file").touch()
    package = colours_package(tmp_path / "package")
    with Served(package, "--capture", str(tmp_path / "file" / "below")) as server:
        for _ in range(5):
            answer = requests.post(server.url + "/invocations", picture(), headers={"Content-Type": "image/png"})
            assert answer.status_code == 200
        text = requests.get(server.url + "/metrics").text
        assert "skin_lesion_capture_written 0.0" in text and "skin_lesion_capture_lost 0.0" in text


def test_to_s3_with_our_key(moto, tmp_path):
    import boto3

    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="kept", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    capture = Capture("s3://kept/capture/", "skin-lesion", kms_key="alias/skin-lesion")
    capture.put(LINE)
    capture.close()
    [found] = s3.list_objects_v2(Bucket="kept")["Contents"]
    assert found["Key"].startswith("capture/skin-lesion/AllTraffic/2026/03/01/09/")
    stored = s3.get_object(Bucket="kept", Key=found["Key"])
    assert json.loads(stored["Body"].read()) == LINE
    assert (stored["ServerSideEncryption"], stored["SSEKMSKeyId"]) == ("aws:kms", "alias/skin-lesion")
    gone = Capture("s3://nowhere/capture", "skin-lesion")
    gone.put(LINE)
    gone.close(20)
    assert (gone.written, gone.lost) == (0, 1)


def test_wrong_places_and_shares_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no bucket"):
        Capture("s3://", "e")
    with pytest.raises(ValueError, match="capture_share = 2"):
        Capture(str(tmp_path), "e", share=2)
