"""The endpoint: SageMaker's contract, every format, every refusal, overload, shutdown, and a worker that is killed."""

import base64
import csv
import io
import json
import os
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from bodies import B64, BMP, BOMB, JPEG, PNG, array, damaged, picture, raw
from conftest import Served, colours_package
from PIL import Image

ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(colours_package(tmp_path_factory.mktemp("server") / "package")) as served:
        yield served


def ask(server, body, kind="image/png", path="/invocations", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(server.url + path, body, headers={"Content-Type": kind, **headers}, timeout=30)


# The contract


def test_health_and_what_batch_transform_asks(server):
    answer = requests.get(server.url + "/ping")
    assert answer.status_code == 200 and answer.json()["model"]["architecture"] == "colours"
    parameters = requests.get(server.url + "/execution-parameters").json()
    assert parameters["BatchStrategy"] == "MULTI_RECORD" and parameters["MaxPayloadInMB"] == 6
    assert parameters["MaxConcurrentTransforms"] >= 1


@pytest.mark.parametrize(("body", "kind"), [(PNG, "image/png"), (JPEG, "image/jpeg"), (BMP, "image/bmp")])
def test_pictures(server, body, kind):
    answer = ask(server, body, kind)
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/json"
    said = answer.json()
    assert said["request_id"] == answer.headers["X-Request-Id"] and "Research use only" in said["notice"]
    assert (
        set(said["model"]) == {"architecture", "version", "dataset", "synthetic"}
        and len(said["model"]["version"]) == 12
    )
    [one] = said["predictions"]
    assert one["decision"] == one["diagnosis"] == "MEL" and not one["reasons"] and "explanation" not in one
    assert list(one["probabilities"]) == ["MEL", "NV", "AK"] and sum(one["probabilities"].values()) == pytest.approx(1)
    assert one["malignant"] == one["probabilities"]["MEL"] and one["actinic_keratosis"] == one["probabilities"]["AK"]
    assert (one["quality"]["width"], one["quality"]["height"]) == (60, 45)


def test_json_one_and_several_in_their_order(server):
    one = ask(server, json.dumps({"image": B64, "age": 54.5, "sex": "female", "site": None}), "application/json").json()
    alone = ask(server, PNG).json()
    assert one["predictions"] == alone["predictions"]
    colours = [(200, 90, 90), (90, 200, 90), (90, 90, 200)]
    images = [{"image": base64.b64encode(picture(c)).decode()} for c in colours]
    several = ask(server, json.dumps({"images": images, "explain": True}), "application/json; charset=utf-8").json()
    assert [p["diagnosis"] for p in several["predictions"]] == ["MEL", "NV", "AK"]
    for prediction in several["predictions"]:
        assert Image.open(io.BytesIO(base64.b64decode(prediction["explanation"]))).size == (32, 32)


def test_arrays_are_answered_as_the_files_are(server):
    pixels = np.asarray(Image.open(io.BytesIO(PNG)))
    for sent in (pixels, np.stack([pixels, pixels[::-1]])):
        out = io.BytesIO()
        np.save(out, sent)
        said = ask(server, out.getvalue(), "application/x-npy").json()["predictions"]
        assert said[0] == ask(server, PNG).json()["predictions"][0] and len(said) == (1 if sent.ndim == 3 else 2)


def test_json_lines_in_and_out_keep_their_places(server):
    lines = [json.dumps({"image": B64}), "{broken", json.dumps({"image": B64, "age": 200}), json.dumps({"image": B64})]
    answer = ask(server, "\n".join(lines), "application/jsonlines", Accept="application/jsonlines")
    assert answer.headers["Content-Type"] == "application/jsonlines"
    said = [json.loads(line) for line in answer.text.splitlines()]
    assert ["error" in line for line in said] == [False, True, True, False]
    assert "not valid JSON" in said[1]["error"] and "0 to 120" in said[2]["error"]
    assert said[0]["model"] == said[3]["model"] and said[0]["diagnosis"] == "MEL"
    assert ask(server, "{}\n[]\n", "application/jsonlines").status_code == 400


def test_csv_is_the_isic_format(server):
    images = {"images": [{"image": B64, "name": "ISIC_1, left"}, {"image": B64}]}
    answer = ask(server, json.dumps(images), "application/json", Accept="text/csv")
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert answer.headers["Content-Type"] == "text/csv" and rows[0] == ["image", "MEL", "NV", "AK"]
    assert [row[0] for row in rows[1:]] == ["ISIC_1, left", "image_2"]
    assert [float(v) for v in rows[1][1:]] == list(ask(server, PNG).json()["predictions"][0]["probabilities"].values())


def test_what_the_client_sends_along_comes_back(server):
    answer = ask(server, PNG, **{ATTRIBUTES: "trace=7; a=b", "X_Request_Id": "mine-1"})
    assert answer.headers[ATTRIBUTES] == "trace=7; a=b" and answer.json()["request_id"] == "mine-1"
    refused = ask(server, b"x", **{ATTRIBUTES: "trace=8", "X_Request_Id": "not ours!"})
    assert refused.status_code == 400 and refused.headers[ATTRIBUTES] == "trace=8"
    assert len(refused.json()["request_id"]) == 32
    for wrong in ("a" * 1025, "ü".encode("latin1"), "ü".encode()):
        assert ask(server, PNG, **{ATTRIBUTES: wrong}).status_code == 400


def test_explain_for_pictures_is_asked_in_the_address(server):
    shown = ask(server, PNG, path="/invocations?explain=true").json()["predictions"][0]
    assert Image.open(io.BytesIO(base64.b64decode(shown["explanation"]))).format == "PNG"
    assert ask(server, PNG, path="/invocations?explain=maybe").status_code == 400


# Refusals


@pytest.mark.parametrize(
    ("body", "kind", "accept", "status", "reason"),
    [
        (b"", "image/png", "*/*", 400, "empty"),
        (b"hello", "image/png", "*/*", 400, "not an image"),
        (picture(format="GIF"), "image/png", "*/*", 400, "GIF; it must be a JPEG, PNG or BMP"),
        (PNG[:300], "image/png", "*/*", 400, "damaged or truncated"),
        (BOMB, "image/png", "*/*", 400, "more than 50,000,000 pixels"),
        (PNG, "text/plain", "*/*", 415, "'text/plain' is not known"),
        (PNG, "image/png", "text/html", 406, "cannot be met"),
        (b"{", "application/json", "*/*", 400, "not valid JSON"),
        (b"[" * 90_000, "application/json", "*/*", 400, "not valid JSON"),
        (b"7", "application/json", "*/*", 400, "must be an object"),
        (b'{"images": []}', "application/json", "*/*", 400, "at least one"),
        (b'{"images": [{"image": "@@"}]}', "application/json", "*/*", 400, "images[0]"),
        (json.dumps({"image": B64, "age": -1}), "application/json", "*/*", 400, "age must be"),
        (json.dumps({"image": B64, "age": True}), "application/json", "*/*", 400, "age must be"),
        (json.dumps({"image": B64, "sex": "F"}), "application/json", "*/*", 400, "sex must be one of"),
        (json.dumps({"image": B64, "colour": 1}), "application/json", "*/*", 400, "unknown key 'colour'"),
        (json.dumps({"image": B64, "explain": "yes"}), "application/json", "*/*", 400, "explain must be"),
        (array(dtype=np.float32), "application/x-npy", "*/*", 400, "float32"),
        (b"{}\n" * 2001, "application/jsonlines", "*/*", 413, "2,001 pictures"),
        (json.dumps({"images": [0] * 2001}), "application/json", "*/*", 413, "2,001 pictures"),
        (array((2001, 16, 16, 3)), "application/x-npy", "*/*", 413, "2,001 pictures"),
        (array((4, 4)), "application/x-npy", "*/*", 400, "must be (N, H, W, 3)"),
        (array()[:-7], "application/x-npy", "*/*", 400, "were sent"),
        (array().replace(b"(2, 40, 50, 3)", b"(2000000,90,3)"), "application/x-npy", "*/*", 400, "shape"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "application/x-npy", "*/*", 400, "not an array"),
    ],
)
def test_refusals_say_why(server, body, kind, accept, status, reason):
    answer = ask(server, body, kind, Accept=accept)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"] and answer.json()["request_id"]


def test_bodies_over_the_limit_are_refused_before_they_are_read(server):
    assert ask(server, bytes(7 << 20)).status_code == 413
    parts = (bytes(1 << 20) for _ in range(9))
    assert requests.post(server.url + "/invocations", parts, headers={"Content-Type": "image/png"}).status_code == 413
    started = time.monotonic()
    head = b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n\r\n"
    assert raw(server, head, end=False).startswith(b"HTTP/1.1 413") and time.monotonic() - started < 5


def test_other_addresses_and_methods(server):
    assert requests.get(server.url + "/invocations").status_code == 405
    assert "Not Found" in requests.get(server.url + "/admin").json()["error"]
    assert ask(server, PNG, Content_Encoding="gzip").status_code == 415
    page = requests.get(server.url + "/")
    assert (
        page.headers["Content-Type"].startswith("text/html")
        and "default-src 'none'" in page.headers["Content-Security-Policy"]
    )
    description = requests.get(server.url + "/openapi.json").json()
    sent = set(description["paths"]["/invocations"]["post"]["requestBody"]["content"])
    assert sent == {
        "image/jpeg",
        "image/png",
        "image/bmp",
        "application/json",
        "application/jsonlines",
        "application/x-npy",
    }


def test_neither_picture_nor_patient_is_logged(server):
    request = {"image": B64, "age": 54, "sex": "female", "site": "left-knee-secret", "name": "Jane-Doe"}
    wanted = ask(server, json.dumps(request), "application/json", X_Request_Id="logged-1")
    assert wanted.status_code == 200
    time.sleep(0.2)
    [line] = [line for line in server.lines if line.get("request_id") == "logged-1"]
    assert line["status"] == 200 and line["pictures"] == 1
    text = json.dumps(server.lines)
    assert not any(word in text for word in ("left-knee-secret", "Jane-Doe", "female", B64[:40]))


# Malformed bodies


def test_malformed_bodies_get_a_reason_and_nothing_else(server):
    rng, session, statuses = random.Random(1), requests.Session(), {}
    for _ in range(400):
        body, kind = damaged(rng)
        answer = session.post(server.url + "/invocations", body, headers={"Content-Type": kind})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 415), (answer.status_code, answer.text)
        assert answer.status_code == 200 or len(answer.json()["error"]) > 10
    assert statuses[400] > 150 and statuses.get(415, 0) > 5
    assert ask(server, PNG).status_code == 200
    assert not [line for line in server.lines if line["event"] in ("error", "worker ended")]


def test_garbage_instead_of_http(server):
    rng = random.Random(2)
    head = b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(PNG)
    for k in range(200):
        data = bytearray(head + PNG[:50])
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if k % 10 == 0:
            data = bytearray(rng.randbytes(300))
        answer = raw(server, bytes(data))
        assert answer == b"" or re.match(rb"HTTP/(0.9|1.0|1.1) 4", answer), answer[:200]
    for line in (
        b"\r\n" * 50,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2_000 + b"\r\n",
    ):
        assert raw(server, line)[9:10] in (b"", b"4")
    assert requests.get(server.url + "/ping").status_code == 200
    assert not [line for line in server.lines if line["event"] in ("error", "worker ended")]


def test_clients_that_stop_in_the_middle_cost_nothing(server):
    head = b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\nabc"
    host, port = server.address.split(":")
    stuck = [socket.create_connection((host, int(port))) for _ in range(100)]
    for connection in stuck:
        connection.sendall(head)
    started = time.monotonic()
    assert ask(server, PNG).status_code == 200 and time.monotonic() - started < 2
    stuck[0].settimeout(20)
    assert stuck[0].recv(1000).startswith(b"HTTP/1.1 408")
    for connection in stuck:
        connection.close()


# Load, shutdown and death


@pytest.fixture(scope="module")
def slow_package(tmp_path_factory):
    return colours_package(tmp_path_factory.mktemp("slow") / "package", slow=True)


def test_waiting_requests_share_a_run(server):
    body = json.dumps({"images": [{"image": B64}] * 40})
    assert len(ask(server, body, "application/json").json()["predictions"]) == 40
    text = requests.get(server.url + "/metrics").text
    assert 'skin_lesion_requests_total{status="200"}' in text and "skin_lesion_batch_size_bucket" in text
    runs = {
        line.split()[0]: float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("skin_lesion_batch_size_")
    }
    assert runs["skin_lesion_batch_size_sum"] > runs["skin_lesion_batch_size_count"]


def test_overload_is_refused_at_once_and_what_was_taken_is_answered(slow_package):
    with Served(slow_package, SKIN_LESION_SERVING_BATCH="1", SKIN_LESION_SERVING_QUEUE="4") as server:
        with ThreadPoolExecutor(30) as clients:
            answers = list(clients.map(lambda k: ask(server, PNG), range(90)))
        shed = [a for a in answers if a.status_code != 200]
        assert {a.status_code for a in shed} == {429} and 4 <= len(answers) - len(shed) < 90
        assert all(a.headers["Retry-After"] == "1" and "try again" in a.json()["error"] for a in shed)
        quick = sorted(a.elapsed.total_seconds() for a in shed)[len(shed) // 2]
        assert quick < max(a.elapsed.total_seconds() for a in answers if a.status_code == 200)
        assert ask(server, PNG).status_code == 200


def test_a_request_over_its_deadline_gets_503(slow_package):
    with Served(slow_package, SKIN_LESION_SERVING_BATCH="1", SKIN_LESION_SERVING_DEADLINE="1") as server:
        body = json.dumps({"images": [{"image": B64}] * 400})
        answer = ask(server, body, "application/json")
        assert answer.status_code == 503 and "within 1 s" in answer.json()["error"] and answer.headers["Retry-After"]
        assert ask(server, PNG).status_code == 200  # what nobody waits for is not run


def test_sigterm_answers_all_that_was_accepted(slow_package):
    server = Served(slow_package, SKIN_LESION_SERVING_BATCH="1")
    with ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(ask, server, PNG) for _ in range(40)]
        time.sleep(0.15)
        started = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - started < 30
        assert [a.result().status_code for a in answers] == [200] * 40
    assert server.line("draining") and any(a.result().headers.get("Connection") == "close" for a in answers)
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/ping")


def test_a_killed_worker_is_replaced_within_two_seconds_and_no_connection_is_refused(server):
    stop, failures, gaps = threading.Event(), [], []

    def load():
        last = time.monotonic()
        while not stop.is_set():
            try:
                assert ask(server, PNG).status_code == 200
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
            except requests.ConnectionError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    ready = len([line for line in server.lines if line["event"] == "ready"])
    os.kill(server.line("ready", ready)["pid"], signal.SIGKILL)
    server.line("ready", ready + 1)
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert server.line("worker ended")["status"] == -9
    assert max(gaps) < 2 and len(failures) <= 4 and not any("refused" in reason for reason in failures), (
        max(gaps),
        failures,
    )


def test_several_workers_share_the_port_and_their_numbers(slow_package):
    def figures():
        lines = [line.split() for line in requests.get(server.url + "/metrics").text.splitlines()]
        return {line[0]: float(line[1]) for line in lines if line[0].startswith("skin_lesion")}

    with Served(slow_package, "--workers", "2", SKIN_LESION_SERVING_BATCH="1") as server:
        pids = [server.line("ready", n)["pid"] for n in (1, 2)]
        for _ in range(20):
            assert ask(server, PNG).status_code == 200
        assert figures()['skin_lesion_requests_total{status="200"}'] == 20
        with ThreadPoolExecutor(1) as client:
            many = client.submit(ask, server, json.dumps({"images": [{"image": B64}] * 400}), "application/json")
            end = time.monotonic() + 10
            while figures()["skin_lesion_waiting_pictures"] == 0 and time.monotonic() < end:
                time.sleep(0.1)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert isinstance(many.exception(), requests.ConnectionError)
        server.line("ready", 4)
        now = figures()
        assert now["skin_lesion_waiting_pictures"] == 0  # nothing waits in a worker that is gone
        assert now['skin_lesion_requests_total{status="200"}'] == 20


def test_a_folder_that_is_no_package_ends_the_server_with_a_reason(tmp_path, project):
    (tmp_path / "empty").mkdir()
    done = project.cli("serve", tmp_path / "empty")
    assert done.returncode == 1 and "no model.json" in done.stderr and "Traceback" not in done.stderr
    package = colours_package(tmp_path / "package")
    (package / "model.onnx").write_bytes(b"no graph")
    server = Served(package, wait=False)
    assert server.process.wait(30) == 1 and server.line("failed")["error"]


def test_serve_alone_reads_where_sagemaker_puts_the_model(tmp_path):
    colours_package(tmp_path / "model")
    with Served(None, SKIN_LESION_ROOT=str(tmp_path)) as server:
        assert ask(server, PNG).json()["predictions"][0]["diagnosis"] == "MEL"
