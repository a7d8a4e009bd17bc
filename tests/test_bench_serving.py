"""The endpoint beside what one would write in an afternoon, under load, overload and abuse; figures in bench/serving.json."""

import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest
import requests
import torch
from bodies import BOMB, damaged, raw
from conftest import ROOT, Served, keep
from load_clients import Connection, closed_loop, message, open_loop, paced_loop
from PIL import Image
from plain_server import EAGER, ONNX, Plain
from safetensors.torch import save_file

from skin_lesion.data.images import load_square, read_squares
from skin_lesion.data.sample import write_sample
from skin_lesion.training.models import Classifier, export_graph, load_pretrained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SIZE, BATCH = 128, 16
CLASSES = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC"]

# A runtime's median milliseconds for one image and for sixteen, in a process of its own; its words: runtime, graph, size.
RUNTIME = """
import json, statistics, sys, time
import numpy as np
runtime, folder, name, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if runtime == "PyTorch":
    import torch
    from skin_lesion.training.models import Classifier
    torch.manual_seed(1)
    torch.set_num_threads(2)
    network = Classifier(name, 8).eval()
    def run(x):
        with torch.inference_mode(): return network(torch.from_numpy(x)).numpy()
elif runtime == "ONNX Runtime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options)
    run = lambda x: session.run(["logits"], {"images": x})[0]
else:
    import openvino
    hint = {"INFERENCE_PRECISION_HINT": runtime.split()[1], "INFERENCE_NUM_THREADS": 2}
    compiled = openvino.Core().compile_model(f"{folder}/{name}.onnx", "CPU", hint)
    run = lambda x: compiled(x)["logits"]
rng, found = np.random.default_rng(1), {}
for count, turns in ((1, 60), (16, 8)):
    x, times = rng.integers(0, 255, (count, size, size, 3)).astype(np.uint8), []
    for _ in range(turns + 3):
        began = time.perf_counter()
        run(x)
        times.append((time.perf_counter() - began) * 1000)
    found[f"batch {count}, ms"] = round(statistics.median(times[3:]), 1)
print(json.dumps(found))
"""


# Two servers as a user would write them, with the same network and weights.
@pytest.fixture(scope="module")
def figures():
    found = {}
    yield found
    if found:
        keep("serving", found)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 JPEGs of 1024 x 768, the usual size of ISIC 2019: real ones enlarged where they are to be had, else drawn ones."""
    files = sorted((ROOT.parent / "shared" / "data" / "ham10000").glob("*/*.jpg"))[::150][:64]
    if not files:
        sample = write_sample(tmp_path_factory.mktemp("drawn") / "sample", lesions=40, seed=1)
        files = sorted((sample / "images").glob("*.jpg"))[:64]
    made = []
    for file in files:
        out = io.BytesIO()
        with Image.open(file) as picture:
            picture.convert("RGB").resize((1024, 768), Image.LANCZOS).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


@pytest.fixture(scope="module")
def package(tmp_path_factory, pictures):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bench") / "model"
    folder.mkdir()
    network = load_pretrained(Classifier("efficientnet_lite0", len(CLASSES)), "efficientnet_lite0").eval()
    export_graph(network, folder / "model.onnx", np.stack([load_square(p, SIZE) for p in pictures[:8]]))
    save_file({k: v.contiguous() for k, v in network.net.state_dict().items()}, folder / "model.safetensors")
    share = [1 / len(CLASSES)] * len(CLASSES)
    model = {"architecture": "efficientnet_lite0", "dataset": "ham10000", "synthetic": False, "classes": CLASSES}
    model |= {"image_size": SIZE, "calibration": {"temperature": 1.0}, "logit_shares": share, "class_shares": share}
    (folder / "model.json").write_text(json.dumps(model))
    return folder


@pytest.fixture(scope="module")
def server(package):
    with Served(package) as served:
        yield served


def percentile(seconds, q):
    return float(np.percentile(seconds, q) * 1000)


def worker_memory(server):
    return psutil.Process([line for line in server.lines if line["event"] == "ready"][-1]["pid"]).memory_info().rss


def test_latency_of_one_request(server, package, pictures, tmp_path, figures):
    plain = {
        name: Plain(tmp_path, name, load, package, len(CLASSES), SIZE)
        for name, load in (("eager", EAGER), ("onnx", ONNX))
    }
    addresses = {"ours": server.address} | {name: p.address for name, p in plain.items()}
    messages, seconds = [message(p) for p in pictures], {name: [] for name in addresses}
    try:
        for _ in range(12):  # in turns, so that a busy neighbour hits all of them
            for name, address in addresses.items():
                _, results = asyncio.run(closed_loop(address, messages, 1, 30))
                assert {status for status, _ in results} == {200}
                seconds[name] += [s for _, s in results][3:]
    finally:
        for p in plain.values():
            p.process.terminate()
            p.process.wait()
    p50 = {name: percentile(values, 50) for name, values in seconds.items()}
    figures["latency_ms_p50"] = {name: round(value, 2) for name, value in p50.items()}
    figures["latency_to_eager"], figures["latency_to_onnx"] = p50["ours"] / p50["eager"], p50["ours"] / p50["onnx"]
    assert figures["latency_to_eager"] <= 0.4 and figures["latency_to_onnx"] <= 0.8, p50


@pytest.mark.parametrize("name", ["mobilenetv2_100", "efficientnet_b0", "resnet50"])
def test_runtimes(name, tmp_path, figures):
    """What the graph's runtime was chosen by: the same network at 224 px, one after the other, two threads each."""
    torch.manual_seed(1)
    images = np.random.default_rng(1).integers(0, 255, (2, 224, 224, 3)).astype(np.uint8)
    export_graph(Classifier(name, 8).eval(), tmp_path / f"{name}.onnx", images)
    found = {}
    for runtime in ("PyTorch", "ONNX Runtime", "OpenVINO f32", "OpenVINO bf16"):
        python = ROOT / ".venv-openvino/bin/python" if "OpenVINO" in runtime else sys.executable
        if not Path(python).exists():
            found[runtime] = {"not run": "make bench-serving installs OpenVINO in .venv-openvino"}
            continue
        words = [python, "-c", RUNTIME, runtime, tmp_path, name, "224"]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-2000:]
        found[runtime] = json.loads(done.stdout)
    figures.setdefault("runtimes, 224 px", {})[name] = found
    ours, eager = found["ONNX Runtime"], found["PyTorch"]
    assert all(ours[k] < eager[k] for k in ours), found


def batches(server):
    """Pictures that went through the network, and its runs."""
    lines = dict(
        line.rsplit(" ", 1) for line in requests.get(f"{server.url}/metrics").text.splitlines() if "#" not in line
    )
    return np.array([float(lines[f"skin_lesion_batch_size_{end}"]) for end in ("sum", "count")])


@pytest.fixture(scope="module")
def capacity(server, package, pictures, figures):
    """Requests a second at 16 clients, beside the runtime's own loop with batches of the same size, in turns; it decodes a batch ahead."""
    session = onnxruntime.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
    messages, todo, bare, served = (
        [message(p) for p in pictures],
        [pictures[i % len(pictures)] for i in range(960)],
        [],
        [],
    )
    before = batches(server)
    asyncio.run(closed_loop(server.address, messages, 16, len(todo)))
    count, runs = batches(server) - before
    figures["batch"] = round(count / runs)
    for _ in range(7):
        began = time.perf_counter()
        for _, images, _ in read_squares(todo, SIZE, figures["batch"]):
            session.run(["logits"], {"images": images})
        bare.append(len(todo) / (time.perf_counter() - began))
        rate, results = asyncio.run(closed_loop(server.address, messages, 16, len(todo)))
        assert {status for status, _ in results} == {200}
        served.append(rate)
    figures["throughput"] = {
        "server": round(float(np.median(served)), 1),
        "bare_loop": round(float(np.median(bare)), 1),
    }
    figures["throughput_to_bare"] = float(np.median(np.divide(served, bare)))
    return float(np.median(served))


def test_throughput(capacity, figures):
    assert figures["throughput_to_bare"] >= 0.9, figures["throughput"]


def test_tail_at_seventy_percent(server, pictures, capacity, figures):
    """The 16 clients at 70% of their throughput. Beside it requests at random moments, where p99 is 4.4 times p50 for any server
    that takes a constant time for each (M/D/1 queue)."""
    messages = [message(p) for p in pictures]
    steady = asyncio.run(paced_loop(server.address, messages, 16, 0.7 * capacity, 20))
    at_random = asyncio.run(open_loop(server.address, messages, 0.7 * capacity, 20))
    for name, results in (("steady", steady), ("random", at_random)):
        assert {status for status, _ in results} == {200}
        figures[f"{name}_70_percent_ms"] = {f"p{q}": round(percentile([s for _, s in results], q), 2) for q in (50, 99)}
    assert figures["steady_70_percent_ms"]["p99"] <= 3 * figures["steady_70_percent_ms"]["p50"]
    assert figures["random_70_percent_ms"]["p99"] <= 6 * figures["random_70_percent_ms"]["p50"]


def test_overload_sheds_answers_what_it_took_and_recovers(server, pictures, capacity, figures):
    messages = [message(p) for p in pictures]
    results = asyncio.run(open_loop(server.address, messages, 5 * capacity, 10))
    taken = [s for status, s in results if status == 200]
    figures["overload"] = {"asked": len(results), "answered": len(taken), "slowest_s": round(max(taken), 2)}
    assert {status for status, _ in results} <= {200, 429, 503} and len(taken) < len(results)
    assert max(taken) < 10 and len(taken) / 10 > 0.5 * capacity
    began = time.monotonic()
    _, after = asyncio.run(closed_loop(server.address, messages, 1, 20))
    assert {status for status, _ in after} == {200} and time.monotonic() - began < 3


def test_fifty_thousand_requests_in_flat_memory(server, pictures, figures):
    messages, memory = [message(p) for p in pictures], []
    for _ in range(10):
        _, results = asyncio.run(closed_loop(server.address, messages, 16, 5_000))
        assert {status for status, _ in results} == {200}
        memory.append(worker_memory(server) / 2**20)
    figures["memory_mib"] = {"after_5000": round(memory[0], 1), "after_50000": round(memory[-1], 1)}
    assert memory[-1] - memory[0] < 20, memory


def refused_to_the_last_byte(server, data):
    """The status of bytes that are no whole request, or nothing where the connection was closed."""
    return raw(server, data)[9:12].decode("ascii", "replace")


def test_ten_thousand_malformed_bodies(server, pictures, figures):
    """Until 10,000 requests were refused. A changed file that is still a picture is answered, and is not counted."""
    rng, session, kinds, memory = random.Random(3), requests.Session(), {}, []
    wide = io.BytesIO()
    np.save(wide, np.zeros((1, 8, 8, 3), np.uint8))
    made = {  # 14 of 20 are files with bytes changed, cut, doubled or under another type
        "a bomb": lambda: (BOMB, "image/png"),
        "an array of 2 EB": lambda: (
            wide.getvalue().replace(b"(1, 8, 8, 3), ", b"(9999999999,) "),
            "application/x-npy",
        ),
        "JSON of another form": lambda: (
            json.dumps(rng.choice([[], 7, {"image": 7}, {"images": [[]]}])).encode(),
            "application/json",
        ),
        "no picture": lambda: (rng.randbytes(500), "image/jpeg"),
    }
    held = [socket.create_connection(tuple(server.address.split(":"))) for _ in range(50)]
    for k, connection in enumerate(held):  # slow clients: a byte of a body, now and then
        connection.sendall(message(pictures[k % len(pictures)])[:300])
    refused = 0
    while refused < 10_000:
        name = rng.choice([*made, "bytes changed", "bytes changed", "bytes changed", "cut short", "headers changed"])
        if name in ("cut short", "headers changed"):
            sent = (
                bytearray(message(rng.choice(pictures))) if name == "headers changed" else message(pictures[0])[:2000]
            )
            for _ in range(4 * (name == "headers changed")):
                sent[rng.randrange(min(len(sent), 120))] = rng.randrange(256)
            status = refused_to_the_last_byte(server, bytes(sent[:4000]))
            assert status[:1] in ("", "2", "4"), status
            good = status[:1] == "2"
        else:
            body, kind = made[name]() if name in made else damaged(rng)
            answer = session.post(server.url + "/invocations", body, headers={"Content-Type": kind})
            status, good = str(answer.status_code), answer.status_code == 200
            assert good or (400 <= answer.status_code < 500 and len(answer.json()["error"]) > 10), answer.text
            assert not good or name == "bytes changed", name
        status = status or "closed"
        kinds.setdefault(name, {})[status] = kinds.get(name, {}).get(status, 0) + 1
        refused += not good
        if refused in (2_000, 9_999) and not good:
            memory.append(worker_memory(server) / 2**20)
        if refused % 500 == 0 and refused < 8_000:
            for connection in held:
                with contextlib.suppress(OSError):  # those whose body did not come in time are closed
                    connection.sendall(b"x")
    for connection in held:
        connection.close()
    figures["malformed"] = {"statuses": kinds, "memory_growth_mib": round(memory[-1] - memory[0], 1)}
    assert memory[-1] - memory[0] < 20
    assert not [line for line in server.lines if line["event"] in ("error", "worker ended")]


def test_requests_made_from_the_description(server, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (pip install schemathesis)")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = [server.url + "/openapi.json", "--checks", checks, "--max-examples", "100", "--no-color"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert not [line for line in server.lines if line["event"] in ("error", "worker ended")]


def test_sigterm_under_load_answers_every_accepted_request(package, pictures, figures):
    """What the server took is a line of its log; each was answered to its client."""
    messages, statuses = [message(p) for p in pictures], []

    async def client(address):
        try:
            connection = await Connection().open(address)
            for k in itertools.count():
                statuses.append((await connection.ask(messages[k % len(messages)]))[0])
        except (OSError, asyncio.IncompleteReadError):
            return  # closed after an answer, or never taken

    async def load(served):
        clients = [asyncio.ensure_future(client(served.address)) for _ in range(16)]
        await asyncio.sleep(2)
        began = time.monotonic()
        status = await asyncio.to_thread(served.stop)
        await asyncio.gather(*clients)
        return status, time.monotonic() - began

    served = Served(package)
    status, seconds = asyncio.run(load(served))
    taken = [line["status"] for line in served.lines if line["event"] == "request"]
    figures["sigterm"] = {"taken": len(taken), "answered": len(statuses), "seconds": round(seconds, 1)}
    assert status == 0 and seconds < 30 and len(taken) > 100
    assert sorted(taken) == sorted(statuses) and set(statuses) == {200}


def test_a_worker_killed_under_load_is_replaced_within_two_seconds(package, pictures, figures):
    messages, answered, torn = [message(p) for p in pictures], [], []

    async def client(address, until):
        connection = None
        while time.monotonic() < until:
            try:
                connection = connection or await Connection().open(address)
                assert (await connection.ask(random.choice(messages)))[0] == 200
                answered.append(time.monotonic())
            except (ConnectionResetError, asyncio.IncompleteReadError, BrokenPipeError) as error:
                torn.append(type(error).__name__)
                connection = None

    async def load(served):
        until = time.monotonic() + 8
        clients = [asyncio.ensure_future(client(served.address, until)) for _ in range(16)]
        await asyncio.sleep(3)
        os.kill(served.line("ready")["pid"], signal.SIGKILL)
        await asyncio.gather(*clients)

    with Served(package) as served:
        asyncio.run(load(served))
        assert served.line("worker ended")["status"] == -9
    gap = max(np.diff(sorted(answered)))
    figures["worker_killed"] = {"longest_gap_s": round(float(gap), 2), "torn": len(torn), "answered": len(answered)}
    assert gap < 2 and len(torn) <= 32, (gap, torn)
