"""Writes the tables of variables and outputs into each module's README.md: `python terraform/readme.py`, or `make infra-readme`."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = "<!-- below is made by terraform/readme.py -->\n"


def blocks(path: Path, kind: str) -> list[tuple[str, str]]:
    """Name and body of each block of a kind in a file."""
    return re.findall(rf'^{kind} "(\w+)" \{{\n(.*?)^\}}', path.read_text(), flags=re.M | re.S)


def field(body: str, name: str) -> str:
    """The value of an argument on one line; empty where it is not there."""
    found = re.search(rf"^  {name}\s*= (.*)$", body, flags=re.M)
    return found[1] if found else ""


def tables(module: Path) -> str:
    """The Markdown of a module's variables and outputs."""
    lines = ["| variable | type | default | |", "|---|---|---|---|"]
    for name, body in blocks(module / "variables.tf", "variable"):
        default = field(body, "default") or "required"
        lines.append(f"| `{name}` | `{field(body, 'type')}` | `{default}` | {field(body, 'description')[1:-1]} |")
    lines += ["", "| output | |", "|---|---|"]
    for name, body in blocks(module / "outputs.tf", "output"):
        lines.append(f"| `{name}` | {field(body, 'description')[1:-1]} |")
    return "\n".join(lines) + "\n"


def rendered(module: Path) -> str:
    """What the module's README.md should be: its own words, then the tables."""
    words = (module / "README.md").read_text().split(MARK)[0]
    return words + MARK + "\n" + tables(module)


if __name__ == "__main__":
    for module in sorted((HERE / "modules").iterdir()):
        (module / "README.md").write_text(rendered(module))
