"""Memory of prepare does not grow with the number of images, but for the table and the fingerprints (about 5 kB an image)."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.sample import write_sample

SIZE = 96  # pixels: a square is 28 kB, so all squares at once would be seen
PREPARE = r"""
import re, sys
from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import PARTS, check_proof, prove_split, split_table
folder, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
table, _ = read_dataset('sample', folder)
packed = pack_images(table, folder, size, out + '/work')
if len(sys.argv) > 4: everything = packed.squares(packed.image_ids)  # what must not happen
pairs = near_duplicates(packed.fingerprints)
table = split_table(table, pairs, .15, .15, 1)
check_proof(prove_split(table, pairs), *(table[table.split == p] for p in PARTS))
for p in PARTS: Shards(write_shards(table[table.split == p], packed, f'{out}/{p}'))
print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])  # ru_maxrss would hold pytest's own, from before exec
"""


def peak_mb(folder: Path, out: Path, *more) -> float:
    "Highest resident memory of a process that prepares a folder."
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, folder, out, str(SIZE), *more], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


@pytest.fixture(scope="module")
def grow(tmp_path_factory):
    "Makes a sample of n images from the pictures of a small one, by hard links and shifted names."
    base = write_sample(tmp_path_factory.mktemp("base") / "sample", lesions=60, seed=1)
    raw = pd.read_csv(base / "metadata.csv")

    def make(n: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{n}")
        (folder / "images").mkdir()
        rows = pd.concat(
            [
                raw.assign(
                    image_id=raw.image_id + f"_{k}", lesion_id=raw.lesion_id + f"_{k}", patient_id=None, of=raw.image_id
                )
                for k in range(-(-n // len(raw)))
            ]
        ).head(n)
        for name, of in zip(rows.image_id, rows.of):
            os.link(base / "images" / f"{of}.jpg", folder / "images" / f"{name}.jpg")
        rows.drop(columns="of").to_csv(folder / "metadata.csv", index=False)
        assert len(read_dataset("sample", folder)[0]) == n
        return folder

    return make


def test_4000_images_take_little_more_than_1200(grow, tmp_path):
    few, many = peak_mb(grow(1200), tmp_path / "few"), peak_mb(grow(4000), tmp_path / "many")
    more_pixels = 2800 * SIZE * SIZE * 3 / 2**20
    assert many - few < 0.75 * more_pixels, f"{few:.0f} MB at 1,200 images, {many:.0f} MB at 4,000"


@pytest.mark.slow
def test_10000_images_take_little_more_than_1000(grow, tmp_path):
    few, large = peak_mb(grow(1000), tmp_path / "few"), grow(10_000)
    many, careless = peak_mb(large, tmp_path / "many"), peak_mb(large, tmp_path / "careless", "all at once")
    print(f"\n{few:.0f} MB at 1,000 images, {many:.0f} MB at 10,000; {careless:.0f} MB with all squares in memory")
    assert many - few < 60, f"{few:.0f} MB at 1,000 images, {many:.0f} MB at 10,000"
    assert careless - few > 200, "the measurement would see it"
