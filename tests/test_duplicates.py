"""Near-duplicates: planted copies are found in every turn, blocks change nothing, and HAM10000 gives what is known of it."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import fingerprint, near_duplicates, similarity, turns
from skin_lesion.data.images import load_square
from skin_lesion.data.shards import pack_images

HAM = Path(__file__).resolve().parents[2] / "shared" / "data" / "ham10000"


@pytest.fixture(scope="module")
def images():
    "Blurred noise over a dark blob: pictures that are alike only in the blob, as lesions are."
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    blob = 200 - 120 * np.exp(-3 * (x**2 + y**2))
    noise = np.stack([cv2.GaussianBlur(rng.normal(size=(64, 64)), (0, 0), 3) for _ in range(60)])
    return np.repeat(np.clip(blob + 150 * noise, 0, 255).astype(np.uint8)[..., None], 3, axis=3)


def test_different_pictures_are_no_pairs(images):
    assert near_duplicates(fingerprint(images)).shape == (0, 2)


@pytest.mark.parametrize("turn", range(8))
def test_every_turn_of_a_copy_is_found(images, turn):
    copy = np.rot90(images[7], turn % 4)
    if turn > 3:
        copy = copy[:, ::-1]
    prints = fingerprint(np.concatenate([images, np.ascontiguousarray(copy)[None]]))
    pairs = near_duplicates(prints, block=16)
    assert pairs.tolist() == [[7, 60]]
    assert similarity(prints, pairs) == pytest.approx([1], abs=0.001)


@pytest.mark.parametrize("size, quality, gain, offset", [(64, 30, 1, 0), (48, 90, 0.8, 30), (200, 95, 0.6, 10)])
def test_a_copy_saved_otherwise_is_found(images, size, quality, gain, offset):
    copy = np.clip(cv2.resize(images[3], (size, size)) * gain + offset, 0, 255).astype(np.uint8)
    copy = cv2.imdecode(cv2.imencode(".jpg", copy, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    assert (fingerprint(copy[None]) @ fingerprint(images[3:4]).T).item() > 0.99


def test_turns_are_the_fingerprints_of_turned_pictures(images):
    turned = np.ascontiguousarray(np.rot90(images, 1, axes=(1, 2)))
    assert np.allclose(turns(fingerprint(images))[1], fingerprint(turned), atol=0.05)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_answer_which_equals_the_plain_one(images, block):
    prints = fingerprint(images)
    alike = np.max([t @ prints.T for t in turns(prints)], axis=0)
    expected = np.argwhere(np.triu(alike > 0.3, 1))
    assert len(expected) > 5
    assert near_duplicates(prints, threshold=0.3, block=block).tolist() == expected.tolist()


def test_many_copies_are_a_chain_and_flat_pictures_are_alone(images):
    assert len(near_duplicates(fingerprint(np.repeat(images[:1], 500, axis=0)))) == 499
    assert len(near_duplicates(fingerprint(np.full((20, 32, 32, 3), 128, np.uint8)))) == 0
    assert near_duplicates(fingerprint(images[:0])).shape == (0, 2)


@pytest.fixture(scope="module")
def ham(tmp_path_factory):
    "Lesions and fingerprints of all of HAM10000 at 128 pixels."
    table, _ = read_dataset("ham10000", HAM)
    return table.lesion_id.to_numpy(), pack_images(table, HAM, 128, tmp_path_factory.mktemp("work")).fingerprints


@pytest.mark.skipif(not HAM.is_dir(), reason=f"HAM10000 is not in {HAM}")
def test_ham10000():
    "Two pixel-identical pairs, three near ones, one that the table gives to two lesions, and no other among 1,000 more."
    known = [
        ("0024366", "0029861"),
        ("0024777", "0029938"),
        ("0024928", "0029450"),
        ("0025226", "0030074"),
        ("0028362", "0030179"),
        ("0030243", "0032058"),
    ]
    known = {(f"ISIC_{a}", f"ISIC_{b}") for a, b in known}
    table = read_dataset("ham10000", HAM)[0].sort_values("image_id")
    alone = ~table.lesion_id.duplicated(keep=False) & (np.arange(len(table)) % 5 == 0)
    table = table[alone | table.image_id.isin(sum(known, ()))]
    prints = np.concatenate([fingerprint(load_square(HAM / p, 64)[None]) for p in table.path])
    assert {tuple(p) for p in table.image_id.to_numpy()[near_duplicates(prints)].tolist()} == known


@pytest.mark.slow
@pytest.mark.skipif(not HAM.is_dir(), reason=f"HAM10000 is not in {HAM}")
@pytest.mark.parametrize("threshold, within, between", [(0.95, 130, 97), (0.97, 110, 2), (0.975, 99, 1), (0.99, 57, 1)])
def test_the_table_of_thresholds(ham, threshold, within, between):
    lesions, prints = ham
    pairs = near_duplicates(prints, threshold)
    same = lesions[pairs[:, 0]] == lesions[pairs[:, 1]]
    assert same.sum() == pytest.approx(within, abs=3) and (~same).sum() == pytest.approx(between, rel=0.1)
