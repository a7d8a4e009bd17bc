"""Catalog, duplicate search and split of up to 400,000 simulated images, the size of the ISIC archive; figures under bench/."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import keep

from skin_lesion.data.catalog import DIAGNOSES, read_dataset
from skin_lesion.data.duplicates import (
    BLOCK,
    COARSE,
    NEIGHBOURS,
    SIDE,
    THRESHOLD,
    _build_index,
    _descriptors,
    _look,
    _one_thread_each,
    _spectra,
)
from skin_lesion.data.shards import pack_images
from skin_lesion.data.splits import PARTS, check_proof, prove_split, split_table

pytestmark = pytest.mark.slow
SIZES = (10_000, 100_000, 400_000)
SEARCHED = 40  # blocks of 64 images whose search is timed; the rest of the search is as many times that
LABELS = [d for d in DIAGNOSES if d != "UNK"]
SHARES = np.array([4522, 12875, 3323, 867, 2624, 239, 253, 628]) / 25331  # of ISIC 2019


def simulate(folder, n, rng):
    """The two tables of ISIC 2019 with n rows, about 2.1 images a lesion, and a file for each image, empty: a catalog
    opens none."""
    pictures = folder / "ISIC_2019_Training_Input"
    pictures.mkdir(parents=True)
    ids = [f"ISIC_{i:07}" for i in range(n)]
    for name in ids:
        (pictures / f"{name}.jpg").touch()
    lesion = np.sort(rng.integers(int(n / 2.1), size=n))
    label = rng.choice(len(LABELS), size=n, p=SHARES)[lesion]
    truth = pd.DataFrame(np.eye(len(DIAGNOSES))[[DIAGNOSES.index(LABELS[k]) for k in label]], columns=list(DIAGNOSES))
    truth.insert(0, "image", ids)
    truth.to_csv(folder / "ISIC_2019_Training_GroundTruth.csv", index=False)
    about = {"image": ids, "age_approx": rng.integers(4, 18, n) * 5, "anatom_site_general": "anterior torso"}
    about |= {"lesion_id": [f"BCN_{k:07}" for k in lesion], "sex": rng.choice(["male", "female"], n)}
    pd.DataFrame(about).to_csv(folder / "ISIC_2019_Training_Metadata.csv", index=False)


def write_blends(prints, n, rng, path):
    """Fingerprints as different as those of n lesions: each the mean of two real ones, turned or mirrored at random."""
    square, out = prints.reshape(-1, SIDE, SIDE), np.memmap(path, np.uint8, "w+", shape=(n, SIDE * SIDE))
    for i in range(n):
        a, b = (
            np.rot90(square[j].astype(np.float32), k)[:, ::s]
            for j, k, s in zip(rng.integers(len(square), size=2), rng.integers(4, size=2), rng.choice([-1, 1], size=2))
        )
        mixed = a + b - 256
        out[i] = np.clip(mixed * (40 / mixed.std()) + 128, 1, 255).ravel()
    out.flush()


def peak_mb():
    """Not `ru_maxrss`, which survives exec and so holds the peak of the process that started this one."""
    return round(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1000)


def measure(folder, n):
    """Seconds of a processor for each part, those of the search that only ask the index, and the peak of this process's
    memory by the end of each part, in MB."""
    seconds, peaks, began = {}, {"start": peak_mb()}, time.process_time()

    def done(part):
        nonlocal began
        seconds[part] = round(time.process_time() - began, 1)
        peaks[part] = peak_mb()
        began = time.process_time()

    table, accounting = read_dataset("isic2019", folder)
    assert accounting["kept"] == n
    done("catalog")
    prints, rows = np.memmap(folder / "prints", np.uint8, "r", shape=(n, SIDE * SIDE)), np.arange(n)
    blocks = [rows[i : i + BLOCK] for i in range(0, n, BLOCK)]
    wholes, index = _build_index(prints, blocks)
    done("index")
    looked = blocks[:: len(blocks) // SEARCHED][:SEARCHED]
    with _one_thread_each():
        for block in looked:
            _look(prints, block, rows, wholes, index, THRESHOLD)
    done("search")
    whole = n / sum(map(len, looked))
    seconds["search"] = round(seconds["search"] * whole, 1)
    asked = [_descriptors(_spectra(prints[block], COARSE)).reshape(-1, index.ndim) for block in looked]
    began = time.process_time()
    for descriptors in asked:
        index.search(descriptors, NEIGHBOURS, threads=1)
    neighbours = round((time.process_time() - began) * whole, 1)
    del wholes, index, asked
    began = time.process_time()
    first = np.random.default_rng(1).choice(n - 1, n // 50, replace=False)
    pairs = np.stack([first, first + 1], axis=1)  # every 50th image has a near-duplicate
    table = split_table(table, pairs, 0.15, 0.15, 1)
    proof = prove_split(table, pairs)
    check_proof(proof, *(table[table.split == part] for part in PARTS))
    assert set(proof["shared"].values()) == {0}
    done("split")
    return {"core_seconds": seconds, "of_the_search_in_the_index": neighbours, "peak_mb": peaks}


@pytest.mark.timeout(5400)
def test_400_000_images_take_about_four_times_100_000(shared_data, tmp_path):
    folder, rng = shared_data / "ham10000", np.random.default_rng(1)
    table, _ = read_dataset("ham10000", folder)
    prints = np.array(pack_images(table, folder, 64, tmp_path / "work").fingerprints)
    figures = {}
    for n in SIZES:
        simulate(tmp_path / str(n), n, rng)
        write_blends(prints, n, rng, tmp_path / str(n) / "prints")
        command = [sys.executable, __file__, str(tmp_path / str(n)), str(n)]
        figures[f"{n:,}"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(n, figures[f"{n:,}"], flush=True)
    keep("scale", figures)
    small, middle, large = (sum(found["core_seconds"].values()) for found in figures.values())
    assert middle < 25 * small and large < 8 * middle, "all pairs would take 100 and 16 times as long"
    grown = figures["400,000"]["peak_mb"]["split"] - figures["400,000"]["peak_mb"]["start"]
    assert grown * 1000 < 10 * 400_000, "10 kB an image"


if __name__ == "__main__":
    from pathlib import Path

    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
