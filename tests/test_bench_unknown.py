"""What the unknown score is worth for diagnoses that were truly never learned, and for photographs of a telephone."""

import numpy as np
import pytest
import torch
from conftest import keep
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skin_lesion.data.catalog import read_dataset
from skin_lesion.data.duplicates import near_duplicates
from skin_lesion.data.images import load_square
from skin_lesion.data.shards import Shards, pack_images, write_shards
from skin_lesion.data.splits import split_table
from skin_lesion.data.unknown import write_unknown
from skin_lesion.evaluation.metrics import interval, lesion_weights, mean_of_defined, ranking
from skin_lesion.evaluation.unknown import fit_unknown
from skin_lesion.training.models import Classifier, load_pretrained

pytestmark = pytest.mark.slow
SIZE, LESIONS, PHOTOGRAPHS, RESAMPLES = 128, 110, 250, 1000  # pixels; lesions of a class and photographs, at most


@pytest.fixture(scope="module")
def features(shared_data, tmp_path_factory):
    """Features, class names and lesions of each part of the split; features of drawn pictures and of photographs."""
    for name in ("ham10000", "pad_ufes_20"):
        if not (shared_data / name).is_dir():
            pytest.skip(f"{name} is not in ../shared/data")
    folder = tmp_path_factory.mktemp("unknown")
    table, _ = read_dataset("ham10000", shared_data / "ham10000")
    lesions = table.drop_duplicates("lesion_id").sample(frac=1, random_state=1).groupby("diagnosis").head(LESIONS)
    table = table[table.lesion_id.isin(lesions.lesion_id)].reset_index(drop=True)
    packed = pack_images(table, shared_data / "ham10000", SIZE, folder / "work")
    table = split_table(table, near_duplicates(packed.fingerprints), 0.2, 0.3, 1)
    net = load_pretrained(Classifier("efficientnet_lite0", 2), "efficientnet_lite0").eval()

    @torch.inference_mode()
    def of(squares):
        images = (torch.from_numpy(squares[i : i + 64]) for i in range(0, len(squares), 64))
        heads = (net.net.forward_head(net.net.forward_features(net.normalise(x)), pre_logits=True) for x in images)
        return torch.cat(list(heads)).numpy()

    found = {}
    for part in ("train", "validation", "test"):
        shards = Shards(write_shards(table[table.split == part], packed, folder / part))
        rows = shards.rows
        found[part] = of(shards[np.arange(len(shards))]), rows.diagnosis.to_numpy(), rows.lesion_id.to_numpy()
    assert not set(found["train"][2]) & set(found["test"][2]) and not set(found["validation"][2]) & set(
        found["test"][2]
    )
    photographs = sorted((shared_data / "pad_ufes_20").rglob("*.[jp][pn]g"))
    photographs = photographs[:: -(-len(photographs) // PHOTOGRAPHS)]
    drawn = sorted(write_unknown(folder / "drawn").glob("*.jpg"))
    found["drawn"] = of(np.stack([load_square(f, SIZE) for f in drawn]))
    found["pad_ufes_20"] = of(np.stack([load_square(f, SIZE) for f in photographs]))
    patients = np.array([f.stem.split("_")[1] for f in photographs])
    return found, patients


def learned(found, left_out=None):
    """The head and the unknown score of a model that never saw a class: not in training, reference or calibration."""
    x, y, _ = found["train"]
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
    head.fit(x[y != left_out], y[y != left_out])
    x, y, lesions = (values[found["validation"][1] != left_out] for values in found["validation"])
    numbers = np.searchsorted(head.classes_, y)
    logits, drawn = head.decision_function, found["drawn"]
    return head, fit_unknown(x, logits(x), numbers, lesions, drawn, logits(drawn))


def auroc(score, unknown, groups):
    """Over resamples of lesions, or of patients for the photographs."""
    return ranking(score, unknown, lesion_weights(groups, RESAMPLES))[0]


def test_the_score_finds_classes_that_were_never_learned_and_photographs(features):
    found, patients = features
    x, y, lesions = found["test"]
    draws, figures = {}, {}
    for name in np.unique(y):
        head, model = learned(found, name)
        assert name not in head.classes_
        score = model.score(x, head.decision_function(x))
        draws[name] = auroc(score, y == name, lesions)
        count = len(set(lesions[y == name]))
        figures[str(name)] = interval(draws[name]) | {"test_lesions": count}
    weights_of_mean = mean_of_defined(np.stack(list(draws.values()), -1))

    head, model = learned(found)
    photographs = found["pad_ufes_20"]
    known, other = (model.score(f, head.decision_function(f)) for f in (x, photographs))
    groups = np.concatenate([[f"lesion {n}" for n in lesions], [f"patient {n}" for n in patients]])
    score, unknown = np.concatenate([known, other]), np.arange(len(groups)) >= len(known)
    photographed = interval(auroc(score, unknown, groups)) | {
        "pictures": len(patients),
        "patients": len(set(patients)),
        "above_threshold": float((other > model.threshold).mean()),
    }
    setting = {"network": "efficientnet_lite0, ImageNet, frozen; logistic regression", "pixels": SIZE}
    setting |= {f"{part}_pictures": len(found[part][1]) for part in ("train", "validation", "test")}
    keep(
        "unknown",
        setting
        | {"left_out": figures, "left_out_mean": interval(weights_of_mean), "pad_ufes_20": photographed}
        | {"known_above_threshold": float((known > model.threshold).mean()), "resamples": RESAMPLES},
    )
    assert figures.keys() == set(found["train"][1]) and len(figures) >= 7
    assert interval(weights_of_mean)["low"] > 0.5 and photographed["low"] > 0.5
