"""Figures that take minutes: `make bench` runs them on an otherwise idle machine and keeps them as JSON under bench/."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import keep
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from test_definition import definition, processing
from test_duplicates import COPIES, HARD, plant

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import fingerprint, near_duplicates
from skin_lesion.data.images import decode
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import split_table
from skin_lesion.evaluation.calibration import at_prevalence
from skin_lesion.execution.definition import local_path
from skin_lesion.execution.engine import run
from skin_lesion.serving.predictor import Predictor
from skin_lesion.settings import load_settings
from skin_lesion.training.imbalance import IMBALANCE, class_shares
from skin_lesion.training.loop import Recipe, predict_logits, train
from skin_lesion.training.models import Classifier, load_pretrained

pytestmark = pytest.mark.slow


def test_engine_and_papermill_cost_at_most_two_and_a_half_seconds_a_step(tmp_path):
    """Steps that do nothing: all of their time is the engine's, the runner's, papermill's and the kernel's."""
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "word: str = 'a'  # nothing"},
        {
            "cell_type": "code",
            "metadata": {},
            "source": "import os, pathlib\n"
            "pathlib.Path(os.environ['SKIN_LESION_ROOT'], 'processing/output/out/a.txt').write_text(word)",
        },
    ]
    for i, cell in enumerate(cells):
        cell |= {"id": f"c{i}", "outputs": [], "execution_count": None}
    notebook = tmp_path / "10_nothing.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    raw = local_path("s3://bucket/raw", tmp_path / "runs")
    raw.mkdir(parents=True)
    (raw / "raw.txt").write_text("raw")
    names = [f"step{i}" for i in range(8)]
    steps = [processing(name) | {"DependsOn": names[:i]} for i, name in enumerate(names)]
    command = lambda words: [sys.executable, "-P", "-m", "skin_lesion.execution.step", str(notebook)]
    started = time.perf_counter()
    result = run(definition(*steps), root=tmp_path / "runs", command=command, notebook=lambda words: notebook)
    a_step = (time.perf_counter() - started) / len(names)
    assert result.status == "Succeeded", result.state
    bare = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "papermill", notebook, tmp_path / "out.ipynb"], capture_output=True)
        bare.append(time.perf_counter() - started)
    keep("engine", {"seconds_a_step": round(a_step, 2), "plain_papermill_command_seconds": round(min(bare), 2)})
    assert a_step <= 2.5


@pytest.mark.timeout(5400)
def test_which_way_of_handling_imbalance_is_best(shared_data, tmp_path):
    """Short fine-tunes on HAM10000 that differ in nothing else, judged on lesion-disjoint validation pictures."""
    folder = shared_data / "ham10000"
    table, _ = read_dataset("ham10000", folder)
    packed = pack_images(table, folder, 64, tmp_path / "work")
    table = split_table(table, near_duplicates(packed.fingerprints), 0.15, 0.15, 1)
    training, validation = (
        Shards(write_shards(table[table.split == part], packed, tmp_path / part)) for part in ("train", "validation")
    )
    truth = [validation.classes.index(d) for d in validation.rows.diagnosis]
    shares = class_shares(np.array([training.classes.index(d) for d in training.rows.diagnosis]), training.classes)
    figures = {}
    for way in IMBALANCE:
        torch.manual_seed(1)
        model = load_pretrained(Classifier("efficientnet_lite0", 7), "efficientnet_lite0")
        recipe = Recipe(epochs=4, batch_size=32, imbalance=way, ema_decay=0.99)
        train(model, training, validation, training.classes, recipe, tmp_path / way, torch.device("cpu"))
        logits = predict_logits(model, validation, torch.device("cpu"), torch.float32)
        figures[way] = round(float(balanced_accuracy_score(truth, logits.argmax(1))), 3)
        if way == "none":
            after = balanced_accuracy_score(truth, (logits - np.log(shares)).argmax(1))
            figures["none, adjusted afterwards"] = round(float(after), 3)
    keep("imbalance", {"images": len(training), "pixels": 64, "epochs": 4, "validation_balanced_accuracy": figures})
    assert figures["none"] < min(figures[way] for way in IMBALANCE if way != "none")


def compare_ways(runs, default):
    """Runs by their way: how each did on the validation lesions of the first, beside the default on the same lesions, and on test."""
    validation = Shards(
        next((next(iter(runs.values())).parent / "s3").rglob(f"{next(iter(runs.values())).name}/**/validation"))
    )
    y = np.array([validation.classes.index(d) for d in validation.rows.diagnosis])
    lesions = np.unique(validation.rows.lesion_id, return_inverse=True)[1]
    rng = np.random.default_rng(1)
    draws = [
        np.bincount(rng.integers(0, lesions.max() + 1, lesions.max() + 1), minlength=lesions.max() + 1)[lesions]
        for _ in range(1000)
    ]
    found, drawn = {}, {}
    for way, folder in runs.items():
        model, evaluation = Predictor(folder / "model.tar.gz"), json.loads((folder / "evaluation.json").read_text())
        assert evaluation["validation"]["content_hash"] == validation.content_hash
        p = model.probabilities(validation[:])
        right = p.argmax(1) == y
        loss = -np.log(at_prevalence(p, model.model["class_shares"])[np.arange(len(y)), y])
        accuracy = lambda weights, right=right: float(
            np.mean([np.average(right[y == k], weights=weights[y == k] + 1e-9) for k in range(7)])
        )
        drawn[way] = np.array([[accuracy(w), np.average(loss, weights=w)] for w in draws])
        found[way] = {
            "validation": {
                "balanced_accuracy": round(accuracy(np.ones(len(y))), 3),
                "log_loss": round(float(loss.mean()), 3),
            }
        }
        found[way]["test"] = {
            name: [round(evaluation[name][end], 3) for end in ("value", "low", "high")]
            for name in ("balanced_accuracy", "melanoma_sensitivity", "log_loss")
        }
    for way in runs:
        ends = np.quantile(drawn[way] - drawn[default], [0.025, 0.975], axis=0).round(3).tolist()
        found[way]["validation"] |= dict(
            zip(("balanced_accuracy_to_default", "log_loss_to_default"), map(list, zip(*ends)))
        )
    return found


@pytest.mark.timeout(3 * 3600)
def test_no_way_of_handling_imbalance_is_better_than_the_default_at_full_length(shared_data, tmp_path):
    """Default runs on HAM10000 that differ in nothing else, judged on validation lesions; what they reach on test is kept, too."""
    runs, default = {}, load_settings()["train.imbalance"].value
    for way in IMBALANCE[1:]:
        words = ["run", "training", "--dataset", "ham10000", "--data-dir", shared_data / "ham10000"]
        command = [sys.executable, "-c", "from skin_lesion.cli import main; main()"]
        subprocess.run([*command, *words, "--set", f"train.imbalance={way}"], check=True, cwd=tmp_path)
        runs[way] = (tmp_path / "runs" / "latest").resolve()
    figures = compare_ways(runs, default)
    keep("imbalance_full", figures)
    for found in figures.values():  # more than chance: the interval of the difference excludes zero
        assert (
            found["validation"]["balanced_accuracy_to_default"][0] <= 0 <= found["validation"]["log_loss_to_default"][1]
        )


SEEN = Path(__file__).with_name(
    "seen_copies.csv"
)  # found pairs that a person saw, laid over each other, to be of one lesion


def percent(right, of):
    """A share with its exact 95% interval (Clopper and Pearson), which holds where nearly all are right."""
    found = binomtest(int(right), int(of)).proportion_ci(method="exact")
    return {name: round(100 * x, 2) for name, x in zip(("value", "low", "high"), (right / of, *found))} | {
        "of": int(of)
    }


def precision(name, table, pairs):
    """Pairs that the table gives to one lesion, and with those that a person has seen; the others count as wrong."""
    seen = set(pd.read_csv(SEEN).query("dataset == @name")[["image", "copy"]].itertuples(index=False, name=None))
    a, b = (table.iloc[rows].reset_index(drop=True) for rows in pairs.T)
    told = (a.lesion_id == b.lesion_id).to_numpy()
    known = told | [tuple(sorted(ids)) in seen for ids in zip(a.image_id, b.image_id)]
    for first, second in zip(a.image_id[~known], b.image_id[~known]):
        print(f"{name}: look at {first} and {second}; if they are one lesion, note them in {SEEN.name}")
    return {"told_by_the_table": percent(told.sum(), len(told)), "told_or_seen": percent(known.sum(), len(known))}


@pytest.mark.timeout(5400)
def test_near_duplicates_find_planted_copies(shared_data, tmp_path):
    """Copies of 80 HAM10000 images a kind among all 10,015; precision also on ISIC 2019, on which nothing was chosen."""
    folder, rng = shared_data / "ham10000", np.random.default_rng(1)
    table, _ = read_dataset("ham10000", folder)
    prints = pack_images(table, folder, 128, tmp_path / "work").fingerprints
    of = rng.permutation(len(table))[: 80 * len(COPIES)].reshape(len(COPIES), 80)
    copies = [plant(decode(folder / table.path[row]), kind, row) for kind, rows in zip(COPIES, of) for row in rows]
    together = np.concatenate([prints, fingerprint(np.stack(copies))])
    started, cores = time.perf_counter(), time.process_time()
    pairs = near_duplicates(together, progress=True)
    figures = {"images": len(together), "seconds": round(time.perf_counter() - started, 1)}
    figures |= {"core_seconds": round(time.process_time() - cores, 1), "copies_a_kind": of.shape[1]}
    found = set(map(tuple, pairs.tolist()))
    hit = np.array([(row, len(table) + n) in found for n, row in enumerate(of.ravel().tolist())]).reshape(of.shape)
    figures["recall_percent"] = dict(zip(COPIES, (100 * hit.mean(axis=1)).round(1).tolist()))
    real, original = (pairs < len(table)).all(axis=1), np.concatenate([np.arange(len(table)), of.ravel()])
    figures["precision_percent"] = {
        "ham10000": precision("ham10000", table, pairs[real]),
        "with a planted copy": precision("ham10000", table, original[pairs[~real]]),
    }
    folder = shared_data / "isic2019"
    table, _ = read_dataset("isic2019", folder)  # the 2,677 pictures that are there
    prints = pack_images(table, folder, 128, tmp_path / "isic").fingerprints
    found = precision("isic2019", table, near_duplicates(prints))
    figures["precision_percent"]["isic2019"] = {"told_or_seen": found["told_or_seen"]}  # few lesions are in its table
    keep("duplicates", figures)
    easy = {kind: share for kind, share in figures["recall_percent"].items() if kind not in HARD}
    told = figures["precision_percent"]
    assert min(easy.values()) >= 90 and told["ham10000"]["told_by_the_table"]["low"] >= 96
    assert told["ham10000"]["told_or_seen"]["low"] >= 99 and told["isic2019"]["told_or_seen"]["low"] >= 90
