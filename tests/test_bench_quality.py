"""The headline from nothing but the data (`make bench-quality`, PROFILE=full on a GPU); a tiny run of the same code in `make test`.

prepare and train are the steps of the pipeline. Everything is chosen on the training and validation part: five networks that
each leave out a fold of the training lesions, the network that is served, which they teach, and one that learned from the
labels alone. The test part is asked once, at the end."""

import json
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import requests
from conftest import ROOT, Served, keep
from safetensors.numpy import load_file

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.sample import write_sample
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import check_proof, lesion_folds, pairs_within, prove_folds, prove_split, split_table
from skin_lesion.evaluation.calibration import at_prevalence, calibrated, error_if_calibrated, fit_calibration
from skin_lesion.evaluation.conformal import coverage_band, fit_sets, measure_sets, prediction_sets
from skin_lesion.evaluation.ensemble import fit_temperatures, pool
from skin_lesion.evaluation.metrics import calibration_error, count_lesions, paired_difference, score
from skin_lesion.serving.package import unpack
from skin_lesion.serving.predictor import Graph
from skin_lesion.settings import load_settings
from skin_lesion.training.folds import members_logits
from skin_lesion.training.imbalance import class_shares

PARTS = ("train", "validation", "test")
HEADLINE = ("balanced_accuracy", "melanoma_sensitivity_at_90", "melanoma_sensitivity", "macro_auc", "ece", "log_loss")
FOLDS, COVERAGE, REDEALT = 5, 0.9, 200


def step(name, root, parameters):
    """A step of the pipeline, in a root of its own; its seconds."""
    words = [word for key, value in parameters.items() for word in (f"--{key}", str(value))]
    started, env = time.perf_counter(), os.environ | {"SKIN_LESION_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "skin_lesion.execution.step", name, *words], check=True, env=env, cwd=ROOT)
    return round(time.perf_counter() - started)


def train_once(root, prepared, parameters):
    """The step `train`, unless its model is there; its seconds. What was interrupted goes on from its checkpoint."""
    if (done := root / "seconds.json").exists():
        return json.loads(done.read_text())
    (root / "input" / "data").mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "table"):
        place = root / "input" / "data" / part
        if not place.exists():
            place.symlink_to(prepared / part)
    seconds = step("train", root, parameters)
    done.write_text(json.dumps(seconds))
    return seconds


class Judge:
    """Logits of validation and test pictures become figures; nothing is fitted to the test."""

    def __init__(self, prepared, bootstrap):
        self.parts = {part: Shards(prepared / part) for part in PARTS}
        self.classes, self.bootstrap = tuple(self.parts["train"].classes), bootstrap
        self.y = {n: np.array([self.classes.index(d) for d in s.rows.diagnosis]) for n, s in self.parts.items()}
        self.lesions = {n: s.rows.lesion_id.to_numpy(str) for n, s in self.parts.items()}
        self.shares = class_shares(self.y["train"], self.classes)

    def answers(self, model):
        """Logits of both parts, by the graph that is served, and the class frequencies that they assume."""
        graph = Graph(model)
        chunks = {n: range(0, len(self.parts[n]), 256) for n in ("validation", "test")}
        logits = {n: np.concatenate([graph.logits(self.parts[n][i : i + 256]) for i in c]) for n, c in chunks.items()}
        return logits, graph.model["logit_shares"]

    def figures(self, logits, logit_shares=None):
        """Figures of one network, or of the logits of several, and the test probabilities behind them."""
        y, lesions = self.y, self.lesions
        found = fit_calibration(logits["validation"], y["validation"], lesions["validation"], logit_shares, self.shares)
        p = {n: calibrated(x, found, logit_shares) for n, x in logits.items()}
        weighted = at_prevalence(p["test"], self.shares)
        scores = score(p["test"], y["test"], lesions["test"], self.classes, weighted, self.bootstrap)
        figures = {k: scores[k] for k in HEADLINE} | {
            "calibration": found["method"],
            "calibration_why": found["reason"],
        }
        return figures | {"ece_if_calibrated": error_if_calibrated(weighted), "sets": self.sets(p)}, p

    def sets(self, p):
        """Coverage of the prediction sets: as served, of the thresholds alone (the conformal promise; a served set is never
        empty and so covers more), what a valid method may show on these lesions, and the mean of many new deals of
        validation and test lesions, which is not the luck of one."""
        y, lesions = self.y, self.lesions
        thresholds = fit_sets(p["validation"], y["validation"], lesions["validation"], COVERAGE)
        measure = partial(measure_sets, classes=self.classes, bootstrap=self.bootstrap, min_lesions=1)
        served = measure(prediction_sets(p["test"], thresholds), y["test"], lesions["test"])
        promised = measure(p["test"] >= thresholds, y["test"], lesions["test"])
        counts = [
            [count_lesions(y[n], lesions[n], c) for c in range(len(self.classes))] for n in ("validation", "test")
        ]
        return {
            "asked": COVERAGE,
            "promised": promised["coverage"],
            "possible": coverage_band(*counts, COVERAGE),
            "redealt": self.redealt(p),
            "served": served["coverage"],
            "served_size": served["size"],
            "served_per_class": {c: found["coverage"] for c, found in served["per_class"].items()},
        }

    def redealt(self, p):
        """Mean coverage of the thresholds when the lesions of validation and test are dealt anew."""
        both = ("validation", "test")
        p, y, lesions = (np.concatenate([of[n] for n in both]) for of in (p, self.y, self.lesions))
        names, of, images = np.unique(lesions, return_inverse=True, return_counts=True)
        share, rng, found = len(self.y["validation"]) / len(y), np.random.default_rng(1), []
        for _ in range(REDEALT):
            fit = (rng.random(len(names)) < share)[of]
            inside = (p >= fit_sets(p[fit], y[fit], lesions[fit], COVERAGE))[np.arange(len(y)), y]
            found.append(np.average(inside[~fit], weights=1 / images[of][~fit]))
        return float(np.mean(found))

    def leaks(self, proof, folds, seed):
        """Raises `LeakError` where parts or folds share a lesion, a patient or a near-duplicate; the folds' proof."""
        check_proof(proof, *(self.parts[part].rows for part in PARTS))
        rows = self.parts["train"].rows
        fold = lesion_folds(rows, pairs_within(rows, proof["near_duplicates"]), folds, seed)
        return prove_folds(rows, fold, proof["near_duplicates"])


def headline(prepared, root, parameters, folds, bootstrap, beside=True):
    """Trains what is not trained yet, and measures it; `beside` it a network that learned from the labels alone."""
    judge = Judge(prepared, bootstrap)
    proof = json.loads((prepared / "table" / "split_proof.json").read_text())
    fold_proof = judge.leaks(proof, folds, parameters.get("seed", 1))
    served, plain = root / "served", root / "plain"
    seconds = {"served, with its teachers": train_once(served, prepared, parameters | {"folds": folds})}
    if beside:
        seconds["labels alone"] = train_once(plain, prepared, parameters | {"folds": 0})
    teachers = served / "checkpoints" / "folds"
    said = [load_file(path)["validation"] for path in sorted(teachers.glob("fold-*/logits.safetensors"))]
    members = {"validation": np.stack(said), "test": members_logits(teachers, judge.parts["test"])}  # (K, N, C)
    temperatures = fit_temperatures(members["validation"], judge.y["validation"], class_shares=judge.shares)
    together = {n: pool(x, temperatures) for n, x in members.items()}
    found = {"served": judge.figures(*judge.answers(served / "model")), "ensemble": judge.figures(together)}
    if beside:
        found["labels alone"] = judge.figures(*judge.answers(plain / "model"))
    p, y, lesions = {k: v[1]["test"] for k, v in found.items()}, judge.y["test"], judge.lesions["test"]
    differences = {
        f"{a} - {b}": paired_difference(p[a], p[b], y, lesions, bootstrap)
        for a, b in (("ensemble", "served"), ("served", "labels alone"), ("ensemble", "labels alone"))
        if b in p
    }
    model = json.loads((served / "model" / "model.json").read_text())
    return {
        "data": {n: {"pictures": len(s), "content_hash": s.content_hash} for n, s in judge.parts.items()}
        | {"test_lesions": len(set(lesions)), "folds": fold_proof},
        "recipe": model["provenance"]["settings"] | {"image_size": model["image_size"]},
        "cross_validated": model["cross_validated"],
        "test": {name: figures for name, (figures, _) in found.items()},
        "differences_in_balanced_accuracy": differences,
        "seconds": seconds,
    }, p


def settings_of(profile):
    """The settings of a profile, by section."""
    sections = {}
    for name, setting in load_settings(profile=profile).items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = setting.value
    return sections


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_the_headline(shared_data):
    """Writes bench/quality.json (or quality_PROFILE.json) first and is strict afterwards, so that a miss can be looked at.

    What is interrupted goes on when it is started again; delete runs/bench_quality_PROFILE to start anew. BESIDE=0 leaves out
    the network that learned from the labels alone, for who has no GPU and no evening."""
    profile = os.environ.get("PROFILE", "quick")
    settings, root = settings_of(profile), ROOT / "runs" / f"bench_quality_{profile}"
    prepared = root / "prepare" / "processing" / "output"
    if not (prepared / "table" / "split_proof.json").exists():
        raw = root / "prepare" / "processing" / "input" / "raw"
        raw.parent.mkdir(parents=True, exist_ok=True)
        if not raw.exists():
            raw.symlink_to(shared_data / "ham10000")
        step("prepare", root / "prepare", settings["data"] | {"dataset": "ham10000"})
    beside = os.environ.get("BESIDE") != "0"
    figures, _ = headline(prepared, root, settings["train"], FOLDS, settings["evaluate"]["bootstrap"], beside)
    keep("quality" if profile == "full" else f"quality_{profile}", {"profile": profile} | figures)
    served = figures["test"]["served"]
    assert not any(figures["data"]["folds"]["shared"].values())
    assert figures["cross_validated"]["lesions"] > 4000, "every training lesion is asked once"
    for found in figures["test"].values():
        sets = found["sets"]
        assert abs(sets["redealt"] - COVERAGE) <= 0.01
        assert sets["possible"][0] <= sets["promised"]["value"] <= sets["possible"][1]
        assert found["melanoma_sensitivity_at_90"]["low"] > 0.1, "better than chance"
    assert served["ece"]["value"] <= 0.03
    assert served["balanced_accuracy"]["low"] > settings["gate"]["balanced_accuracy_low"]


def test_the_same_code_on_a_few_drawn_lesions(tmp_path):
    """Two folds of a network without pretrained weights: not good, but every line of the headline runs."""
    sample = write_sample(tmp_path / "sample", lesions=110, seed=1)
    table, _ = read_dataset("sample", sample)
    table = table[table.groupby("diagnosis").lesion_id.transform("nunique") >= 15].reset_index(drop=True)
    packed = pack_images(table, sample, 32, tmp_path / "work")
    pairs = near_duplicates(packed.fingerprints)
    table = split_table(table, pairs, 0.25, 0.25, 1)
    prepared, classes = tmp_path / "prepared", sorted(table.diagnosis.unique())
    for part in PARTS:
        write_shards(table[table.split == part], packed, prepared / part, classes)
    (prepared / "table").mkdir()
    (prepared / "table" / "split_proof.json").write_text(json.dumps(prove_split(table, pairs)))
    parameters = {"architecture": "mobilenetv2_050", "pretrained": False, "epochs": 1, "batch_size": 16}
    figures, p = headline(prepared, tmp_path, parameters, 2, 50, beside=False)
    test = Shards(prepared / "test")
    y = test.rows.diagnosis.map(classes.index).to_numpy()
    right = [(p["ensemble"].argmax(1) == y)[y == c].mean() for c in range(len(classes))]
    assert figures["test"]["ensemble"]["balanced_accuracy"]["value"] == pytest.approx(np.mean(right))
    assert figures["cross_validated"]["lesions"] == Shards(prepared / "train").rows.lesion_id.nunique()
    assert figures["recipe"]["folds"] == 2 and not any(figures["data"]["folds"]["shared"].values())
    served = figures["test"]["served"]
    assert 0 <= served["sets"]["possible"][0] <= served["sets"]["possible"][1] <= 1
    assert served["ece"]["value"] == pytest.approx(
        calibration_error(at_prevalence(p["served"], Judge(prepared, 2).shares), y)[0]
    )
    again, _ = headline(prepared, tmp_path, parameters, 2, 50, beside=False)  # everything is there
    assert again == figures


@pytest.mark.slow
def test_the_full_profile_ends_in_a_package_that_the_server_serves(project):
    """The whole recipe at its own 260 pixels through the whole pipeline, on the drawn sample; only the passes are fewer."""
    assert project.cli("data", "sample", "--out", "drawn").returncode == 0
    fewer = ["--set=train.epochs=6", "--set=train.warmup_epochs=1", "--set=train.ema_decay=0.9"]
    words = ["run", "training", "--profile", "full", "--data-dir", "drawn", *fewer]
    done = project.cli(*words, timeout=4 * 3600, env=project.env | {"OMP_NUM_THREADS": str(os.cpu_count())})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run, full = project.work / "runs" / "latest", settings_of("full")["train"]
    states = json.loads((run / "steps.json").read_text())["PipelineExecutionSteps"]
    assert [s["StepStatus"] for s in states if s["StepType"] == "RegisterModel"] == ["Succeeded"]
    model = json.loads((unpack(run / "model.tar.gz", project.work / "package") / "model.json").read_text())
    used = model["provenance"]["settings"]
    assert model["image_size"] == 260 and model["views"] == full["views"] == 8
    assert all(used[name] == full[name] for name in ("architecture", "batch_size", "layer_decay", "mix", "imbalance"))
    picture = next((project.work / "drawn" / "images").iterdir()).read_bytes()
    with Served(run / "model.tar.gz", "--set=serving.batch=4") as server:
        answer = requests.post(server.url + "/invocations", picture, headers={"Content-Type": "image/jpeg"}, timeout=60)
    [one] = answer.json()["predictions"]
    assert sum(one["probabilities"].values()) == pytest.approx(1)
