"""Zips each handler with the files of the library that it imports: python terraform/lambdas/build.py build/lambdas

The same files give the same bytes, so Terraform deploys a function only when its code has changed."""

import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = (
    "settings.ini",
    "nbs/cloud/prices.json",
    "pipelines/definitions/training.json",
    "skin_lesion/__init__.py",
    "skin_lesion/settings.py",
    "skin_lesion/cloud/__init__.py",
    "skin_lesion/cloud/compile.py",
    "skin_lesion/cloud/cost.py",
    "skin_lesion/cloud/retraining.py",
    "skin_lesion/cloud/sagemaker.py",
    "skin_lesion/execution/__init__.py",
    "skin_lesion/execution/definition.py",
    "skin_lesion/execution/runs.py",
    "skin_lesion/exits.py",
    "skin_lesion/monitoring/__init__.py",
    "skin_lesion/monitoring/retrain.py",
)


def build(out: Path) -> list[Path]:
    """A zip for each folder with a handler.py."""
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for handler in sorted(HERE.glob("*/handler.py")):
        path = out / f"{handler.parent.name}.zip"
        with zipfile.ZipFile(path.with_suffix(".tmp"), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in {"handler.py": handler, **{name: ROOT / name for name in LIBRARY}}.items():
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), file.read_bytes())
        made.append(path.with_suffix(".tmp").replace(path))
    return made


if __name__ == "__main__":
    for path in build(Path(sys.argv[1])):
        print(path)
