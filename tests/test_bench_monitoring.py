"""Drift on real pictures: how often an alarm is false, and how often drift is found; `make bench-monitoring`, figures under
bench/. Features are those of the ImageNet-pretrained Lite0; diagnoses are given by a logistic regression on them that was
fitted on a quarter of the lesions, which no reference and no window holds."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, keep
from scipy.stats import binomtest, ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skin_lesion.data.catalog import image_paths, read_dataset
from skin_lesion.data.images import decode, to_square
from skin_lesion.monitoring.drift import Window, compare
from skin_lesion.monitoring.properties import PROPERTIES, properties_table
from skin_lesion.monitoring.reference import fit_reference
from skin_lesion.training.models import Classifier, load_pretrained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
SIZE, REFERENCE, WINDOW = 128, 1500, 200
ALONE, FOUND = 1000, 100  # windows without drift, of each size; windows with drift, of each kind
APART = 200  # windows without drift, of each size, in which our rule is judged part by part
EVIDENTLY = ROOT / ".venv-evidently/bin/python"  # its release wants an older pandas than ours
COMPARE = """
import json, sys
import pandas as pd
from evidently import Dataset, Report
from evidently.presets import DataDriftPreset
def drifted(reference, window):
    run = Report([DataDriftPreset()]).run(Dataset.from_pandas(pd.DataFrame(window)), Dataset.from_pandas(pd.DataFrame(reference)))
    value = next(m for m in run.dict()["metrics"] if "DriftedColumnsCount" in m["metric_name"])["value"]
    return value["share"] >= 0.5
print(json.dumps([bool(drifted(*pair)) for pair in json.load(sys.stdin)]))
"""
# the method of Evidently's EmbeddingsDrift for references of 1,000 rows and more, without the t-SNE figure that the metric draws
COMPARE_FEATURES = """
import json, sys
import pandas as pd
from evidently.metrics.embeddings import ModelDriftMethod
frame = lambda rows: pd.DataFrame(rows, columns=[f"feature {n}" for n in range(len(rows[0]))])
print(json.dumps([bool(ModelDriftMethod()(frame(window), frame(reference))[1]) for reference, window in json.load(sys.stdin)]))
"""
CHANGES = {
    "blur, sigma 2": lambda x: cv2.GaussianBlur(x, (0, 0), 2),
    "20% darker": lambda x: (x * 0.8).astype(np.uint8),
    "colour cast": lambda x: np.clip(x * [1.08, 1, 0.94], 0, 255).astype(np.uint8),
    "JPEG quality 30": lambda x: cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1),
}
MUST_BE_FOUND = ("blur, sigma 2", "20% darker", "another source", "BCN20000", "phone photos")


class Pool:
    """Pictures as the monitor sees them: properties, features and the diagnosis given."""

    def __init__(self, files, network, change=lambda x: x):
        with ThreadPoolExecutor(2) as threads:
            squares = np.stack(list(threads.map(lambda f: to_square(change(decode(f, square=SIZE)), SIZE), files)))
        self.properties, features = properties_table(squares), []
        with torch.inference_mode():
            for i in range(0, len(squares), 64):
                x = network.normalise(torch.from_numpy(squares[i : i + 64]))
                features.append(network.net.forward_head(network.net.forward_features(x), pre_logits=True).numpy())
        self.features = np.concatenate(features)

    def answer(self, head):
        p = head.predict_proba(self.features)
        self.numbers = self.properties.assign(
            confidence=p.max(axis=1), malignant=p[:, [k in ("MEL", "BCC") for k in head.classes_]].sum(axis=1)
        )
        self.labels = pd.DataFrame({"diagnosis": head.classes_[p.argmax(axis=1)]})
        return self

    def window(self, reference, rows):
        return Window(reference).add(
            self.numbers.iloc[rows], self.labels.iloc[rows], reference.project(self.features[rows])
        )


def share(hits):
    """The share of hits with its 95% interval (Wilson)."""
    found = binomtest(int(sum(hits)), len(hits)).proportion_ci(method="wilson")
    return {
        "share": round(float(np.mean(hits)), 3),
        "low": round(float(found.low), 3),
        "high": round(float(found.high), 3),
        "windows": len(hits),
    }


@pytest.fixture(scope="module")
def network():
    return load_pretrained(Classifier("efficientnet_lite0", 7), "efficientnet_lite0").eval()


@pytest.fixture(scope="module")
def real(shared_data, network):
    """HAM10000's table, its pictures, and the regression that diagnoses them; rows of the regression's lesions are gone."""
    table, _ = read_dataset("ham10000", shared_data / "ham10000")
    lesions = np.random.default_rng(0).permutation(table.lesion_id.unique())
    taught = table.lesion_id.isin(lesions[: len(lesions) // 4]).to_numpy()
    pool = Pool([shared_data / "ham10000" / p for p in table.path], network)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(
        pool.features[taught], table.diagnosis[taught]
    )
    rest = np.flatnonzero(~taught)
    pool.answer(head)
    return table, pool, head, rest


def draw(lesions, source, rows, rng, window):
    """Rows of a reference and of a window that share no lesion and have the same mix of sources. The lesions of each source come
    in an order of chance and are dealt out evenly from its first to its last image."""
    table = pd.DataFrame({"row": rows, "source": source[rows], "lesion": lesions[rows]})
    chance = pd.Series(rng.permutation(table.lesion.nunique()), index=table.lesion.unique())
    table["place"] = table.lesion.map(chance)
    table = table.sort_values("place", kind="stable")
    table["dealt"] = table.groupby("source").cumcount() / table.source.map(table.source.value_counts())
    order = table.groupby("lesion", sort=False).dealt.min().sort_values(kind="stable").index
    table = table.set_index("lesion").loc[order]
    first, after = table[:REFERENCE], table[REFERENCE:]
    after = after[after.index != first.index[-1]][:window]
    whole = table.source.value_counts(normalize=True)
    for part in (first, after):
        assert (
            not len(part)
            or ((part.source.value_counts().reindex(whole.index, fill_value=0) - whole * len(part)).abs() <= 10).all()
        )
    return first.row.to_numpy(), after.row.to_numpy()


def refer(pool, lesions, rows):
    return fit_reference(pool.numbers.iloc[rows], pool.labels.iloc[rows], pool.features[rows], lesions[rows])


def naive(pool, first, rows):
    return any(
        ks_2samp(pool.numbers[c].iloc[first].dropna(), pool.numbers[c].iloc[rows].dropna()).pvalue < 0.05
        for c in PROPERTIES
    )


def ask_evidently(code, pairs):
    if not EVIDENTLY.exists():
        return {"not run": "make bench-monitoring installs Evidently in .venv-evidently"}
    env = os.environ | {"DO_NOT_TRACK": "1"}
    done = subprocess.run([EVIDENTLY, "-c", code], input=json.dumps(pairs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return share(json.loads(done.stdout))


def evidently(pairs):
    """Evidently's own verdict, dataset drift by its defaults, on the same numbers and labels."""
    columns = lambda pool, rows: (
        pool.numbers.join(pool.labels).iloc[rows].astype(object).where(lambda t: t.notna(), None).to_dict("list")
    )
    return ask_evidently(COMPARE, [[columns(a, i), columns(b, j)] for a, i, b, j in pairs])


def test_false_alarms_stay_below_the_rate_and_drift_is_found(shared_data, network, real):
    table, pool, head, rest = real
    lesions, source, rng, figures = table.lesion_id.to_numpy(), table.source.to_numpy(), np.random.default_rng(1), {}
    figures["without drift"] = {}
    for size in (50, 500, 2500):
        alarms, simple, pairs = [], [], []
        for n in range(ALONE):
            first, rows = draw(lesions, source, rest, rng, size)
            alarms.append(compare(pool.window(refer(pool, lesions, first), rows)).alarm.any())
            simple.append(naive(pool, first, rows))
            if n < FOUND:
                pairs.append((pool, first, pool, rows))
        found = {"ours": share(alarms), "any property with p < 0.05": share(simple), "Evidently": evidently(pairs)}
        figures["without drift"][f"{size:,} images"] = found
        print(size, found, flush=True)

    def detect(name, pair):
        pairs = [pair() for _ in range(FOUND)]
        alarms = [
            compare(other.window(refer(pool, lesions, first), rows)).alarm.any() for _, first, other, rows in pairs
        ]
        figures["with drift"][name] = {"ours": share(alarms), "Evidently": evidently(pairs)}
        print(name, figures["with drift"][name], flush=True)

    figures["with drift"] = {}
    some = rng.choice(rest, 2500, replace=False)
    others = rest[~np.isin(lesions[rest], lesions[some])]
    first_of = lambda rows: draw(lesions, source, rows, rng, 0)[0]
    for name, change in CHANGES.items():
        changed = Pool([shared_data / "ham10000" / table.path[i] for i in some], network, change).answer(head)
        detect(name, lambda changed=changed: (pool, first_of(others), changed, rng.permutation(len(some))[:WINDOW]))
    modern, rosendahl = (rest[source[rest] == s] for s in ("vidir_modern", "rosendahl"))
    some_of = lambda rows, n: (pool, rng.choice(rows, n, replace=False))
    detect("another source", lambda: (*some_of(modern, REFERENCE), *some_of(rosendahl, WINDOW)))
    folder = shared_data / "isic2019"
    isic, _ = read_dataset("isic2019", folder)
    bcn = [folder / p for p in isic.path[isic.source == "BCN"]]
    foreign = {
        "BCN20000": bcn,
        "phone photos": [shared_data / "pad_ufes_20" / p for p in image_paths(shared_data / "pad_ufes_20")],
    }
    for name, files in foreign.items():
        far = Pool(files, network).answer(head)
        detect(name, lambda far=far, files=files: (pool, first_of(rest), far, rng.permutation(len(files))[:WINDOW]))
    figures["with drift"]["BCN20000"]["images a window"] = len(bcn)
    melanoma = table.diagnosis.to_numpy() == "MEL"

    def doubled():
        first, rows = draw(lesions, source, rest, rng, 2500)
        weight = 1.0 + melanoma[rows]
        return pool, first, pool, rng.choice(rows, WINDOW, replace=False, p=weight / weight.sum())

    detect("twice as many melanomas", doubled)
    keep("drift", figures)
    for size, found in figures["without drift"].items():
        assert found["ours"]["low"] <= 0.05, f"{size}: more false alarms than the rate"
    for name in MUST_BE_FOUND:
        assert figures["with drift"][name]["ours"]["share"] >= 0.9, name


def test_what_the_floor_and_evidentlys_features_do(shared_data, network, real):
    """The same windows by our rule, by our rule without the floor of effect size, by the features alone, and by Evidently's
    preset and its method for features. A darkening by 3% is about as large as the floor."""
    table, pool, head, rest = real
    lesions, source, rng, figures = table.lesion_id.to_numpy(), table.source.to_numpy(), np.random.default_rng(2), {}
    melanoma = table.diagnosis.to_numpy() == "MEL"

    def judge(name, pair, count):
        floored, bare, alone, pairs, projected = [], [], [], [], []
        for n in range(count):
            first, other, rows = pair()
            reference = refer(pool, lesions, first)
            found = compare(other.window(reference, rows))
            floored.append(found.alarm.any())
            bare.append((found.adjusted < 0.05).any())  # what `compare` says with floor=0
            alone.append(found.alarm["features"])
            pairs.append((pool, first, other, rows))
            projected.append(
                [reference.project(p.features[i]).round(4).tolist() for p, i in ((pool, first), (other, rows))]
            )
            assert n or compare(other.window(reference, rows), floor=0).alarm.any() == bare[0]
        figures[name] = {
            "ours": share(floored),
            "ours without the floor": share(bare),
            "ours, features alone": share(alone),
        }
        figures[name]["Evidently"] = evidently(pairs)
        figures[name]["Evidently, features"] = ask_evidently(COMPARE_FEATURES, projected)
        print(name, figures[name], flush=True)

    def same(size):
        first, rows = draw(lesions, source, rest, rng, size)
        return first, pool, rows

    def doubled(size):
        first, rows = draw(lesions, source, rest, rng, len(rest))
        weight = 1.0 + melanoma[rows]
        return first, pool, rng.choice(rows, size, replace=False, p=weight / weight.sum())

    for size in (500, 2500):
        judge(f"no drift, {size:,} images", lambda size=size: same(size), APART)
    judge("twice as many melanomas, 2,500 images", lambda: doubled(2500), FOUND)
    some = rng.choice(rest, 2500, replace=False)
    others = rest[~np.isin(lesions[rest], lesions[some])]
    files = [shared_data / "ham10000" / table.path[i] for i in some]
    darker = Pool(files, network, lambda x: (x * 0.97).astype(np.uint8)).answer(head)
    judge("3% darker, 2,500 images", lambda: (draw(lesions, source, others, rng, 0)[0], darker, np.arange(2500)), FOUND)
    keep("drift_floor", figures)


COST = """
import json, sys, time
from datetime import UTC, datetime
from pathlib import Path
import numpy as np
from skin_lesion.monitoring.captures import LABELS, NUMBERS, Captures
from skin_lesion.monitoring.figures import Extremes
from skin_lesion.monitoring.quality import Estimate, Judged, read_labels
from skin_lesion.monitoring.reference import load_reference
from skin_lesion.monitoring.statistics import Statistics
from skin_lesion.monitoring.windows import Windows, decide
folder, package = Path(sys.argv[1]), Path(sys.argv[2])
began, model, reference = time.perf_counter(), json.loads((package/"model.json").read_text()), load_reference(package)
judged, estimate = Judged(read_labels(folder/"labels", model["classes"])), Estimate(model["class_shares"])
windows, statistics, extremes = Windows(reference, 24, None), Statistics(reference.edges), Extremes()
captures = Captures(folder/"capture", model["classes"], reference.axes.shape[1], aside=folder/"aside")
for piece in captures:
    windows.add(piece), judged.add(piece), estimate.add(piece.probabilities)
    statistics.add(piece.rows[NUMBERS], piece.rows[LABELS]), extremes.add(piece.rows, piece.projected, windows)
decided = decide(windows, 0.05, 0.1)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - began, "processor": time.process_time(), "peak": peak/1024, "counts": dict(captures.counts), "windows": len(decided), "judged": judged.count}))
"""


def test_bench_monitor_cost(tmp_path):
    """Time and peak memory of a window of 10,000, 100,000 and 1,000,000 captured requests, 5,000 of them with a label: the
    same loop as in the step, in a process of its own. VmHWM, because `ru_maxrss` would start at the parent's. Processor
    seconds, imports included, say what it costs where the machine is busy with others."""
    from skin_lesion.monitoring.example import write_example

    drawn, figures = write_example(tmp_path / "drawn", days=1), {}
    lines = [x for path in sorted((drawn / "capture").rglob("*.jsonl")) for x in path.read_text().splitlines()]
    halves = [line.split('"eventId": "') for line in lines]
    label = json.loads(next((drawn / "labels").rglob("*.jsonl")).read_text().splitlines()[0])
    for count in (10_000, 100_000, 1_000_000):
        folder = tmp_path / str(count)
        for hour in range(10):
            place = folder / f"capture/skin-lesion/AllTraffic/2026/03/01/{hour:02}"
            place.mkdir(parents=True)
            with open(place / "00-00-drawn.jsonl", "w") as file:
                for n in range(hour * count // 10, (hour + 1) * count // 10):
                    first, rest = halves[n % len(halves)]
                    file.write(f'{first}"eventId": "e{n}{rest[rest.index(chr(34)) :]}\n')
        (folder / "labels").mkdir()
        with open(folder / "labels/labels.jsonl", "w") as file:
            for n in range(5_000):
                file.write(json.dumps(label | {"eventMetadata": {"eventId": f"e{n}"}}) + "\n")
        size = sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
        done = subprocess.run(
            [sys.executable, "-c", COST, folder, drawn / "work"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        assert found["counts"]["requests"] == count and found["judged"] == 5_000, found
        figures[f"{count:,} records"] = {
            "seconds": round(found["seconds"], 1),
            "processor seconds": round(found["processor"], 1),
            "peak memory, MB": round(found["peak"]),
            "input, MB": round(size / 1e6),
        }
        print(count, figures[f"{count:,} records"], flush=True)
        shutil.rmtree(folder)
    keep("monitor", figures)
    small, large = figures["100,000 records"], figures["1,000,000 records"]
    assert large["peak memory, MB"] < 1.25 * small["peak memory, MB"]
    assert large["processor seconds"] < 12 * small["processor seconds"]
