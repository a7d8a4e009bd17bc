"""Features of a packaged network: equal to torch's, alike for copies, streamed to Parquet, refused for graphs without them."""

import json

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from PIL import Image

from skin_lesion.data.images import load_square
from skin_lesion.data.sample import write_sample
from skin_lesion.serving.package import pack
from skin_lesion.serving.predictor import Predictor
from skin_lesion.training.models import Classifier, export_graph, load_pretrained

SIZE = 64
CLASSES = ["MEL", "NV", "BCC"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return load_pretrained(Classifier("efficientnet_lite0", len(CLASSES)), "efficientnet_lite0").eval()


@pytest.fixture(scope="module")
def made(network, tmp_path_factory):
    """A folder with the drawn pictures, one of them a second time, and the package of a network."""
    folder = tmp_path_factory.mktemp("features")
    sample = write_sample(folder / "sample", lesions=8, seed=1) / "images"
    files = sorted(sample.glob("*.jpg"))
    with Image.open(files[0]) as picture:
        picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)).save(sample / "copy.jpg", quality=80)
    images = np.stack([load_square(f, SIZE) for f in files])
    (folder / "model").mkdir()
    export_graph(network, folder / "model" / "model.onnx", images[:8])
    model = {
        "classes": CLASSES,
        "image_size": SIZE,
        "synthetic": True,
        "calibration": {"temperature": 1.0},
        "logit_shares": [1 / 3] * 3,
        "class_shares": [1 / 3] * 3,
    }
    (folder / "model" / "model.json").write_text(json.dumps(model))
    return folder, files, images, pack(folder / "model", folder / "model.tar.gz")


def test_features_are_torch_s_and_logits_are_as_before(made, network):
    _, _, images, package = made
    predictor = Predictor(package)
    with torch.no_grad():
        x = torch.from_numpy(images)
        maps = network.net.forward_features(network.normalise(x))
        pooled, logits = network.net.forward_head(maps, pre_logits=True), network(x)
    assert predictor.features(images).shape == (len(images), 1280) == (len(images), predictor.feature_count)
    np.testing.assert_allclose(predictor.features(images, batch_size=3), pooled.numpy(), atol=1e-3)
    np.testing.assert_allclose(predictor.logits(images), logits.numpy(), atol=1e-3)
    assert predictor.features(images[:0]).shape == (0, 1280)


def test_the_command_writes_a_row_a_picture_and_copies_are_alike(made, project):
    folder, files, images, package = made
    broken = folder / "sample" / "images" / "broken.jpg"
    broken.write_bytes(files[0].read_bytes()[:3000])
    done = project.cli("data", "features", package, folder / "sample", "--out", "features.parquet")
    broken.unlink()
    assert done.returncode == 1 and "left out" in done.stderr and "broken.jpg" in done.stderr, done.stderr
    assert [f.name for f in project.work.iterdir()] == ["features.parquet"]
    table = pd.read_parquet(project.work / "features.parquet")
    assert table.columns.tolist() == ["image", "features"]
    assert sorted(table.image) == sorted([f.stem for f in files] + ["copy"])
    values = np.stack(table.set_index("image").features)
    assert values.dtype == np.float32 and values.shape == (len(files) + 1, 1280)
    rows = dict(zip(table.image, values / np.linalg.norm(values, axis=1, keepdims=True)))
    alike = {name: float(row @ rows["copy"]) for name, row in rows.items() if name != "copy"}
    first = alike.pop(files[0].stem)
    assert first > 0.9 and first > max(alike.values())
    whole = project.cli("data", "features", package, folder / "sample", "--out", "again.parquet")
    assert whole.returncode == 0 and "0 left out" in whole.stdout, whole.stderr


def test_a_package_without_features_is_refused_with_the_remedy(made, project):
    folder, _, images, package = made
    old = folder / "old"
    old.mkdir()
    (old / "model.json").write_text((folder / "model" / "model.json").read_text())
    onnx.utils.extract_model(folder / "model" / "model.onnx", old / "model.onnx", ["images"], ["logits"])
    archive = pack(old, folder / "old.tar.gz")
    np.testing.assert_allclose(Predictor(archive).logits(images), Predictor(package).logits(images), atol=1e-4)
    done = project.cli("data", "features", archive, folder / "sample")
    assert done.returncode == 1 and "older version" in done.stderr and "skin-lesion run training" in done.stderr
    assert "Traceback" not in done.stderr and not list(project.work.iterdir())


def test_a_folder_without_pictures_is_refused(made, project):
    (project.work / "empty").mkdir()
    done = project.cli("data", "features", made[3], "empty")
    assert done.returncode == 2 and "No picture" in done.stderr
