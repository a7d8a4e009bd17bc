"""What the unknown score, and others, are worth for diagnoses that were truly never learned, and for photographs of a telephone."""

import numpy as np
import pytest
import torch
from conftest import keep
from scipy.special import softmax
from scipy.stats import entropy
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
from skin_lesion.evaluation.unknown import fit_reference, fit_unknown, signs
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


def trained(found, *left_out):
    """Features and diagnoses of the training pictures without some classes, and the head that learned them."""
    x, y, _ = found["train"]
    known = ~np.isin(y, left_out)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
    return x[known], y[known], head.fit(x[known], y[known])


def learned(found, left_out=None):
    """The head and the unknown score of a model that never saw a class: not in training, reference or calibration."""
    _, _, head = trained(found, left_out)
    x, y, lesions = (values[found["validation"][1] != left_out] for values in found["validation"])
    numbers = np.searchsorted(head.classes_, y)
    logits, drawn = head.decision_function, found["drawn"]
    return head, fit_unknown(x, logits(x), numbers, lesions, drawn, logits(drawn))


class Candidates:
    """Scores of what a model does not know that cost next to nothing; each is higher for what is less known."""

    NAMES = ("energy", "residual", "entropy", "5 nearest neighbours", "relative Mahalanobis")

    def __init__(self, found, *left_out):
        x, y, self.head = trained(found, *left_out)
        self.reference, z = fit_reference(x, 64), self.head[0].transform(x)
        self.means = np.stack([z[y == c].mean(0) for c in self.head.classes_])
        self.within = self.whiten(z - self.means[np.searchsorted(self.head.classes_, y)])
        self.middle, self.all, self.known = z.mean(0), self.whiten(z - z.mean(0)), self.unit(z)

    unit = staticmethod(lambda z: z / np.linalg.norm(z, axis=1, keepdims=True))

    @staticmethod
    def whiten(z, axes=128, shrinkage=0.1):
        _, deviation, directions = np.linalg.svd(z / np.sqrt(len(z)), full_matrices=False)
        variance = deviation[:axes] ** 2
        return directions[:axes].T / np.sqrt((1 - shrinkage) * variance + shrinkage * variance.mean())

    def __call__(self, x):  # (N, 5)
        logits, z = self.head.decision_function(x), self.head[0].transform(x)
        near = [(((z - mean) @ self.within) ** 2).sum(1) for mean in self.means]
        relative = np.min(near, axis=0) - (((z - self.middle) @ self.all) ** 2).sum(1)
        neighbours = 1 - np.sort(self.unit(z) @ self.known.T, axis=1)[:, -5:].mean(1)
        p = softmax(logits, axis=1)
        return np.column_stack([signs(x, logits, *self.reference), entropy(p, axis=1), neighbours, relative])


def combine(found, left_out, candidates, drawn):
    """A logistic regression of the candidates but energy, calibrated on heads that were trained without one class more,
    for which that class is unknown, and on the drawn pictures where they are given."""
    x, y, _ = found["validation"]
    known, unknown = [], [candidates(drawn)] if len(drawn) else []
    for name in set(y) - {left_out}:
        nested = Candidates(found, left_out, name)
        known.append(nested(x[~np.isin(y, (left_out, name))]))
        unknown.append(nested(x[y == name]))
    parts = [np.concatenate(known), *unknown]
    weights = [np.full(len(part), 1 / len(part) / (len(unknown) if n else 1)) for n, part in enumerate(parts)]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    signs_of, weights = np.concatenate(parts)[:, 1:], np.concatenate(weights)
    model.fit(
        signs_of, np.arange(len(weights)) >= len(parts[0]), logisticregression__sample_weight=len(weights) / 2 * weights
    )
    return lambda x: model.decision_function(candidates(x)[:, 1:])


def auroc(score, unknown, groups):
    """Over resamples of lesions, or of patients for the photographs."""
    return ranking(score, unknown, lesion_weights(groups, RESAMPLES))[0]


def photographed(score, x, lesions, photographs, patients):
    """AUROC of photographs against the known pictures of the test."""
    groups = np.concatenate([[f"lesion {n}" for n in lesions], [f"patient {n}" for n in patients]])
    values = np.concatenate([score(x), score(photographs)])
    return auroc(values, np.arange(len(groups)) >= len(x), groups)


def test_the_score_finds_photographs_and_hardly_the_classes_that_were_never_learned(features):
    found, patients = features
    x, y, lesions = found["test"]
    draws, figures, beside = {}, {}, {}
    for name in np.unique(y):
        head, model = learned(found, name)
        assert name not in head.classes_
        score = model.score(x, head.decision_function(x))
        draws[name] = auroc(score, y == name, lesions)
        figures[str(name)] = interval(draws[name]) | {"test_lesions": len(set(lesions[y == name]))}
        candidates = Candidates(found, name)
        tried = {n: lambda x, n=n, c=candidates: c(x)[:, n] for n in range(len(candidates.NAMES))}
        tried = dict(zip(candidates.NAMES, tried.values()))
        tried["the last four, calibrated"] = combine(found, name, candidates, found["drawn"][:0])
        tried["and on drawn pictures"] = combine(found, name, candidates, found["drawn"])
        for way, of in tried.items():
            pair = (
                auroc(of(x), y == name, lesions),
                photographed(of, x[y != name], lesions[y != name], found["pad_ufes_20"], patients),
            )
            beside.setdefault(way, []).append(pair)
    mean = mean_of_defined(np.stack(list(draws.values()), -1))
    others = {}
    for way, pairs in beside.items():
        classes, photographs = (mean_of_defined(np.stack(part, -1)) for part in zip(*pairs))
        others[way] = {"left_out_mean": interval(classes), "more_than_ours": interval(classes - mean)}
        others[way]["pad_ufes_20"] = interval(photographs)

    head, model = learned(found)
    score = lambda x: model.score(x, head.decision_function(x))
    seen = interval(photographed(score, x, lesions, found["pad_ufes_20"], patients)) | {
        "pictures": len(patients),
        "patients": len(set(patients)),
        "above_threshold": float((score(found["pad_ufes_20"]) > model.threshold).mean()),
    }
    setting = {"network": "efficientnet_lite0, ImageNet, frozen; logistic regression", "pixels": SIZE}
    setting |= {f"{part}_pictures": len(found[part][1]) for part in ("train", "validation", "test")}
    keep(
        "unknown",
        setting
        | {"left_out": figures, "left_out_mean": interval(mean), "pad_ufes_20": seen, "other_scores": others}
        | {"known_above_threshold": float((score(x) > model.threshold).mean()), "resamples": RESAMPLES},
    )
    assert figures.keys() == set(found["train"][1]) and len(figures) >= 7
    # what frozen features can do, and the notebook says: chance and a little more for classes, much for photographs
    assert 0.45 < interval(mean)["low"] and interval(mean)["high"] < 0.65 and seen["low"] > 0.8
