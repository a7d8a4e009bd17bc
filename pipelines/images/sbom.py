"""The software bill of materials: `python pipelines/images/sbom.py FILE`, or `make sbom`. Offline, the same bytes each time.

CycloneDX of all that requirements.lock pins. Licences and dependencies are what the packages that are installed here say of
themselves. What an image installs is `required`, and a property names the image; the tools of development are `excluded`."""

import json
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, str]:
    """Name to version of each line `name==version` of requirements.lock."""
    return {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M)}


def metadata(name: str):
    """What an installed package says of itself; None for one that is for other machines."""
    try:
        return distribution(name).metadata
    except PackageNotFoundError:
        return None


def needs(name: str) -> list[str]:
    """What an installed package needs on this machine, without its extras."""
    if metadata(name) is None:
        return []
    wanted = [Requirement(text) for text in distribution(name).requires or ()]
    return sorted({canonical(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})})


def reached(names: list[str]) -> set[str]:
    """The packages of these requirements, and all that they need."""
    found, todo = set(), [canonical(Requirement(name).name) for name in names]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += needs(name)
    return found


def licences(name: str) -> list[dict]:
    """CycloneDX's `licenses` of a package: its SPDX expression, or the name that it gives."""
    told = metadata(name)
    if told is None:
        return []
    if expression := told.get("License-Expression"):
        return [{"expression": expression}]
    classified = [
        c.split(" :: ")[-1] for c in told.get_all("Classifier") or () if c.startswith("License :: OSI Approved :: ")
    ]
    written = (told.get("License") or "").strip().splitlines()
    return [{"license": {"name": text}} for text in classified or written[:1]]


def bill(root: Path = ROOT) -> dict:
    """The bill of what the lock file of a checkout pins."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    versions = locked((root / "requirements.lock").read_text())
    images = {
        "serve": reached(project["dependency-groups"]["serve"]),
        "steps": reached(project["project"]["dependencies"] + project["project"]["optional-dependencies"]["lite"]),
    }
    address = {name: f"pkg:pypi/{name}@{version}" for name, version in versions.items()}
    components = []
    for name, version in sorted(versions.items()):
        used = [image for image, names in images.items() if name in names]
        component = {
            "type": "library",
            "bom-ref": address[name],
            "name": name,
            "version": version,
            "purl": address[name],
        }
        component |= {"scope": "required" if used else "excluded", "licenses": licences(name)}
        components.append(component | {"properties": [{"name": "skin-lesion:image", "value": image} for image in used]})
    within = lambda names: [address[name] for name in names if name in address]
    direct = sorted(canonical(Requirement(text).name) for text in project["project"]["dependencies"])
    edges = [{"ref": "skin-lesion", "dependsOn": within(direct)}]
    edges += [{"ref": address[name], "dependsOn": within(needs(name))} for name in sorted(versions)]
    subject = {
        "type": "application",
        "bom-ref": "skin-lesion",
        "name": "skin-lesion",
        "licenses": [{"license": {"id": "MIT"}}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": components,
        "dependencies": edges,
    }


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(bill(), indent=1) + "\n")
