"""The answer: equal to what training's code computes, complete, honest about old packages, and a map that adds up."""

import base64
import io
import json

import cv2
import numpy as np
import onnx
import pytest
import requests
import torch
from conftest import Served, colours_package
from PIL import Image
from scipy.special import softmax

from skin_lesion.data.images import ImageError, load_square, read_picture, to_square
from skin_lesion.data.sample import write_sample
from skin_lesion.evaluation.unknown import Unknown
from skin_lesion.serving.answer import Answerer, content_version
from skin_lesion.serving.batch import batch
from skin_lesion.serving.package import pack
from skin_lesion.serving.predictor import Predictor
from skin_lesion.serving.quality import LIMITS, faults, quality
from skin_lesion.training.models import Classifier, _has_maps, export_graph, load_pretrained

CLASSES = ["MEL", "NV", "BCC", "AK", "SCC"]
SHARES = [0.1, 0.5, 0.2, 0.1, 0.1]
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return load_pretrained(Classifier("efficientnet_lite0", len(CLASSES)), "efficientnet_lite0").eval()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return sorted(
        (write_sample(tmp_path_factory.mktemp("drawn") / "sample", lesions=8, seed=1) / "images").glob("*.jpg")
    )


@pytest.fixture(scope="module")
def package(network, drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "model"
    folder.mkdir()
    export_graph(network, folder / "model.onnx", np.stack([load_square(f, 128) for f in drawn[:8]]))
    model = {"architecture": "efficientnet_lite0", "dataset": "sample", "synthetic": True, "classes": CLASSES}
    model |= {
        "image_size": 128,
        "calibration": {"temperature": TEMPERATURE},
        "logit_shares": SHARES,
        "class_shares": SHARES,
    }
    (folder / "model.json").write_text(json.dumps(model))
    return folder


def noise(colour=(170, 130, 110)):
    """A PNG of reddish blocks, sharp enough to be answered."""
    blocks = np.random.default_rng(1).normal(colour, 50, (30, 40, 3)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((4, 4, 1), np.uint8))).save(out, "PNG")
    return out.getvalue()


def by_training_code(network, files):
    """What the trained weights say, by torch and SciPy alone."""
    with torch.no_grad():
        squares = torch.from_numpy(np.stack([load_square(f, 128) for f in files]))
        logits = np.concatenate([network(part).numpy() for part in squares.split(32)])
    return softmax(logits.astype(np.float64) / TEMPERATURE - np.log(SHARES), axis=1)


@pytest.fixture(scope="module")
def server(package):
    with Served(package) as server:
        yield server


def agree(package, network, server, files, folder):
    expected = by_training_code(network, files)
    written = folder / "answers.jsonl"
    batch(package, [(f.name, str(f)) for f in files], written)
    in_batch = [list(json.loads(line)["probabilities"].values()) for line in written.read_text().splitlines()]
    predicted = Predictor(package).predict_files(files)[1]
    answered = [list(a["probabilities"].values()) for a in Answerer(package).answer_files(files)]
    ask = lambda file: requests.post(
        server.url + "/invocations", file.read_bytes(), headers={"Content-Type": "image/jpeg"}
    ).json()
    served = [list(ask(file)["predictions"][0]["probabilities"].values()) for file in files]
    for name, found in {"predict": predicted, "answer": answered, "batch": in_batch, "server": served}.items():
        assert np.abs(np.subtract(found, expected)).max() <= 1e-4, name


def test_training_predict_batch_and_server_agree(package, network, server, drawn, tmp_path):
    agree(package, network, server, drawn, tmp_path)


def test_they_agree_on_two_hundred_real_pictures(package, network, server, shared_data, tmp_path):
    agree(package, network, server, sorted((shared_data / "ham10000").glob("*/*.jpg"))[::50][:200], tmp_path)


def test_the_answer_is_complete(package, drawn):
    [answer] = Answerer(package).answer_files(drawn[:1])
    p = answer["probabilities"]
    assert list(p) == CLASSES and sum(p.values()) == pytest.approx(1, abs=1e-5)
    assert answer["diagnosis"] == max(p, key=p.get)
    assert answer["malignant"] == pytest.approx(p["MEL"] + p["BCC"] + p["SCC"], abs=1e-5)
    assert answer["actinic_keratosis"] == p["AK"]
    assert answer["prediction_set"] is answer["coverage"] is answer["unknown"] is None  # an older package
    with Image.open(drawn[0]) as file:
        assert (answer["quality"]["width"], answer["quality"]["height"]) == file.size


def test_the_map_of_a_class_averages_to_its_logit(package, network, drawn):
    answerer = Answerer(package)
    squares = [load_square(f, 128) for f in drawn[:4]]
    rows = answerer.infer(squares, explain=True)
    bias = network.net.get_classifier().bias.detach().numpy()
    for row in rows:
        assert row["maps"].shape == (len(CLASSES), 4, 4)
        np.testing.assert_allclose(row["maps"].mean((1, 2)) + bias, row["logits"], atol=1e-3)
    assert "maps" not in answerer.infer(squares, explain=False)[0]


def test_the_map_shows_where(tmp_path):
    """A network of colours, and a picture that is red at its left: the map of red is warm there."""
    pixels = np.random.default_rng(1).integers(80, 160, (96, 96, 3), dtype=np.uint8)
    pixels[:, :32, 0] = 250
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    [answer] = Answerer(colours_package(tmp_path / "package")).answer_files([out.getvalue()], explain=True)
    assert answer["diagnosis"] == "MEL"
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["explanation"])))).astype(int)
    warmth = heat[:, :, 0] - heat[:, :, 2]
    assert warmth[:, :8].mean() > warmth[:, 16:].mean() + 50


@pytest.mark.parametrize(
    ("name", "size", "has"),
    [
        ("resnet18", 64, True),
        ("densenet121", 64, True),
        ("mobilenetv3_small_100", 64, False),
        ("vit_tiny_patch16_224", 224, False),
    ],
)
def test_which_networks_have_maps(name, size, has):
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    assert _has_maps(Classifier(name, 2).eval(), images) is has


def test_a_package_without_maps_refuses_to_explain_with_the_reason(tmp_path):
    package = colours_package(tmp_path / "package")
    onnx.utils.extract_model(package / "model.onnx", package / "other.onnx", ["images"], ["logits"])
    (package / "other.onnx").replace(package / "model.onnx")
    model = json.loads((package / "model.json").read_text()) | {"classes": ["NV", "BKL", "DF"]}
    (package / "model.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match="no class activation maps.*colours"):
        Answerer(package).answer_files([noise()], explain=True)
    [answer] = Answerer(package).answer_files([noise()])
    assert answer["malignant"] is None and answer["actinic_keratosis"] is None  # this package knows no such class
    with Served(package) as server:
        sent = {"data": noise(), "headers": {"Content-Type": "image/png"}}
        refused = requests.post(server.url + "/invocations?explain=true", **sent)
        assert refused.status_code == 400 and "no class activation maps" in refused.json()["error"]
        assert requests.post(server.url + "/invocations", **sent).status_code == 200


def test_the_version_is_that_of_the_content(package, tmp_path):
    version = content_version(package)
    assert Answerer(pack(package, tmp_path / "model.tar.gz")).about["version"] == version and len(version) == 12
    other = tmp_path / "other"
    other.mkdir()
    for file in package.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert content_version(other) == version
    (other / "model.json").write_text((package / "model.json").read_text().replace("1.7", "1.8"))
    assert content_version(other) != version


def test_what_evaluation_adds_is_said(tmp_path):
    package = colours_package(tmp_path / "package")
    model = json.loads((package / "model.json").read_text())
    model["calibration"] |= {
        "sets": {"coverage": 0.9, "thresholds": {"MEL": 0.2, "NV": 0.05, "AK": 0.5}},
        "abstain": {"confidence": 0.97, "share": 0.1},
    }
    (package / "model.json").write_text(json.dumps(model))
    [answer] = Answerer(package).answer_files([noise()])
    p = answer["probabilities"]
    assert answer["coverage"] == 0.9 and answer["decision"] == "abstain" and answer["diagnosis"] == "MEL"
    assert answer["prediction_set"] == [c for c, t in zip(p, [0, 0.05, 0.5]) if p[c] >= t]
    assert answer["reasons"] == [
        {"reason": "low confidence", "value": pytest.approx(p["MEL"], abs=1e-4), "limit": 0.97}
    ]


def test_pictures_that_the_model_does_not_know_are_not_decided(tmp_path):
    package = colours_package(tmp_path / "package")
    centre, deviation = np.array([170, 130, 110], np.float32), np.eye(3, dtype=np.float32) / 20
    Unknown(centre, deviation, np.array([0.0, 1.0]), 0.0, 0.8).save(package)
    answerer = Answerer(package)
    known, strange = (answerer.answer_files([noise(c)])[0] for c in ((170, 130, 110), (40, 200, 230)))
    assert known["decision"] == "MEL" and known["unknown"] < 0.8 and not known["reasons"]
    assert strange["decision"] == "abstain" and strange["diagnosis"] in answerer.classes
    assert strange["reasons"] == [
        {"reason": "not like the training pictures", "value": strange["unknown"], "limit": 0.8}
    ]
    features, logits = answerer.run(["features", "logits"], np.full((1, 32, 32, 3), 200, np.uint8))
    assert answerer.unknown.score(features, logits)[0] > 0.8


# Quality


def test_each_fault_is_found_and_named(drawn):
    square = load_square(drawn[0], 128)
    made = {
        "blurred": cv2.GaussianBlur(square, (0, 0), 3),
        "too dark": square // 4,
        "too bright": np.clip(square.astype(int) + 130, 0, 255).astype(np.uint8),
        "shadows without detail": np.where(np.arange(128)[:, None, None] < 75, 0, square).astype(np.uint8),
        "highlights without detail": np.where(np.arange(128)[:, None, None] < 40, 255, square).astype(np.uint8),
    }
    assert set(made) == set(LIMITS)
    for reason, picture in made.items():
        found = {fault["reason"]: fault for fault in faults(quality(picture, (600, 450)), 128)}
        assert reason in found, (reason, quality(picture, (600, 450)))
    assert faults(quality(square, (600, 450)), 128) == []
    assert faults(quality(square, (63, 450)), 128) == [{"reason": "too small", "value": 63, "limit": 64}]


def test_sharpness_does_not_depend_on_the_size_of_the_square(drawn):
    for file in drawn[:5]:
        small, large = (quality(load_square(file, s), (600, 450))["sharpness"] for s in (128, 224))
        assert 0.4 < small / large < 2.5


def test_few_real_pictures_are_flagged(shared_data):
    files = sorted((shared_data / "ham10000").glob("*/*.jpg"))[::20]
    files += sorted((shared_data / "isic2019").glob("*/*.jpg"))[::5]
    flagged = 0
    for file in files:
        picture = read_picture(file, 128)
        flagged += bool(faults(quality(to_square(picture.pixels, 128), picture.size), 128))
    assert flagged / len(files) < 0.01


def test_files_that_cannot_be_read_are_refused(package, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageError, match="broken.jpg: the file is damaged"):
        Answerer(package).answer_files([tmp_path / "broken.jpg"])
