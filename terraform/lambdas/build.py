"""Zips each Lambda with the modules of skin_lesion that it imports: `python terraform/lambdas/build.py`, or `make lambdas`.

The same sources give the same bytes. Lambda brings boto3; whatever else a handler imports must be the standard library or
skin_lesion, so that the packages stay small and start fast."""

import ast
import os
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent.parent / "skin_lesion"
PROVIDED = {"boto3", "botocore"} | sys.stdlib_module_names


def imported(source: Path, package: str) -> set[str]:
    """Full names of what a file imports, wherever in the file, with relative names resolved in its package."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def library_files(handler: Path) -> dict[str, Path]:
    """Name in the zip to file: the modules of skin_lesion that the handler reaches. Raises `ValueError` for an import
    that Lambda does not have."""
    found, todo = {}, [(handler, "")]
    while todo:
        source, package = todo.pop()
        for name in imported(source, package):
            parts = name.split(".")
            if parts[0] != "skin_lesion":
                if parts[0] not in PROVIDED:
                    raise ValueError(
                        f"{source} imports {name}, which Lambda does not have: use boto3 and the standard library."
                    )
                continue
            for depth in range(1, len(parts) + 1):
                path = LIBRARY.joinpath(*parts[1:depth])
                package_of = ".".join(parts[:depth])
                file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                arcname = str(file.relative_to(LIBRARY.parent))
                if file.is_file() and arcname not in found:
                    found[arcname] = file
                    todo.append((file, package_of if path.is_dir() else package_of.rpartition(".")[0]))
    return found


def build(folder: Path, out: Path) -> Path:
    """Writes OUT/NAME.zip from the files of a Lambda's folder; the same sources give the same bytes."""
    files = {p.name: p for p in folder.iterdir() if p.is_file()} | library_files(folder / "handler.py")
    target = out / f"{folder.name}.zip"
    out.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".tmp")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name].read_bytes())
    os.replace(part, target)
    return target


def main(out: Path = HERE.parent / "build"):
    for handler in sorted(HERE.glob("*/handler.py")):
        print(build(handler.parent, out))


if __name__ == "__main__":
    main()
