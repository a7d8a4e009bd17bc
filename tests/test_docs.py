"""What the text says is there: links, commands, targets, settings, names; and the limits of size that the text promises."""

import ast
import json
import re
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

import skin_lesion
from skin_lesion.cli import main

ROOT = Path(__file__).resolve().parent.parent
IGNORED = {".venv", ".venv-infra", ".venv-evidently", ".venv-openvino", ".git", ".ipynb_checkpoints", "build", "dist", "site", "_proc", "_docs", "data", "runs", "node_modules"}  # fmt: skip


def found(pattern):
    files = sorted(ROOT.rglob(pattern))
    return [p for p in files if not IGNORED.intersection(p.relative_to(ROOT).parts[:-1]) or "nbs" in p.parts]


NOTEBOOKS = [p for p in found("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
MODULES = [p for p in sorted((ROOT / "skin_lesion").rglob("*.py")) if p.name != "_modidx.py"]  # an index, no module


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def prose(path):
    """The text that a person reads: a Markdown file, or the Markdown of a notebook."""
    return "\n\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()


PROSE = {p.relative_to(ROOT).as_posix(): prose(p) for p in [*NOTEBOOKS, *found("*.md")]}
FENCE = re.compile(r"^ *```.*?^ *```", flags=re.M | re.S)


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_each_link_to_a_file_or_a_heading_leads_somewhere():
    dead, seen = [], 0
    for name, text in PROSE.items():
        if name == "nbs/index.ipynb":  # README.md is made of it, and stands where its links begin
            continue
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
        for link in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
            if re.match(r"[a-z][a-z+.-]*:", link):
                continue
            seen += 1
            path, _, heading = link.partition("#")
            target = (ROOT / name).parent / unquote(path) if path else ROOT / name
            if not target.exists():
                dead.append(f"{name}: {link}")
            elif heading and target.suffix in (".md", ".ipynb"):
                headings = [anchor(h) for h in re.findall(r"^#+ (.*)$", prose(target), flags=re.M)]
                if heading.lower() not in headings:
                    dead.append(f"{name}: {link}, of {headings}")
    assert seen > 10 and dead == []


def test_each_notebook_that_the_text_names_is_there():
    names = {p.stem for p in NOTEBOOKS}
    wrong = [
        f"{name}: {word}"
        for name, text in PROSE.items()
        for word in re.findall(r"`(?:nbs/)?(?:\w+/)?(\d\d[a-z]?_[a-z_]+)(?:\.ipynb)?`", text)
        if word not in names
    ]
    assert wrong == []


def commands(text):
    """What begins with `skin-lesion`, and whether it is a line to type or only a mention within a sentence."""
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)$", FENCE.sub("", text), flags=re.M)
    mentions = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for piece, typed in [*((x, True) for x in lines), *((x, False) for x in mentions)]:
        for part in re.split(r"&&|\|\||;|\|", re.sub(r"\s#.*", "", piece)):
            words = part.split()
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if len(words) > 1 and Path(words[0].lstrip("!")).name == "skin-lesion":
                yield part.strip(), words[1:], typed


def problem(words, typed=True):
    """What the command line does not know of these words, or would miss in them."""
    command, at = main, 0
    while isinstance(command, click.Group) and at < len(words) and not words[at].startswith("-"):
        if words[at] not in command.commands:
            return None if not re.fullmatch(r"[a-z-]+", words[at]) else f"there is no command {words[at]!r}"
        command, at = command.commands[words[at]], at + 1
    if command.context_settings.get("ignore_unknown_options"):
        return None
    options = {o for p in command.params if isinstance(p, click.Option) for o in [*p.opts, *p.secondary_opts]}
    options |= set(command.context_settings.get("help_option_names") or main.context_settings["help_option_names"])
    given = [w.split("=")[0].rstrip(",.)]") for w in words[at:] if re.match(r"--?[a-z]", w)]
    wrong = [o for o in given if o not in options]
    if wrong:
        return f"it has no option {wrong[0]!r}"
    needed = [p for p in command.params if isinstance(p, click.Option) and p.required and not set(p.opts) & set(given)]
    return f"it needs {needed[0].opts[0]}" if needed and typed and not {"-h", "--help"} & set(given) else None


def every_command(command, name="skin-lesion"):
    """The command and all below it, by the words that call them."""
    below = command.commands.items() if isinstance(command, click.Group) else ()
    return {name: command} | {k: v for word, c in below for k, v in every_command(c, f"{name} {word}").items()}


def test_each_command_teaches_with_examples_of_itself():
    bare = [
        name
        for name, c in every_command(main).items()
        if not re.search(rf"^ +(\w+=\w+ )?{name}\b|\({name}", c.epilog or "", flags=re.M)
    ]
    assert bare == []


def test_each_command_in_the_text_is_there_with_its_options():
    helps = {f"help of {name}": f"{c.help}\n```\n{c.epilog}\n```" for name, c in every_command(main).items()}
    helps["settings.ini"] = (ROOT / "settings.ini").read_text()
    seen, wrong = set(), []
    for name, text in (PROSE | helps).items():
        for part, words, typed in commands(text):
            seen.add(words[0])
            if reason := problem(words, typed):
                wrong.append(f"{name}: {part}: {reason}")
    assert wrong == []
    assert {"run", "data", "serve", "monitor", "deploy", "predict"} <= seen
    assert (
        problem(["run", "training", "--epochs", "3"])
        and problem(["rnu"])
        and problem(["data", "downlaod"])
        and problem(["approve", "1"])
    )


def test_each_setting_in_the_text_is_there():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    known = {f"{s}.{k}" for s in ini.sections() for k in ini[s]}
    wrong = [
        f"{name}: {setting}"
        for name, text in PROSE.items()
        for setting in re.findall(r"--set[ =]([a-z_]+\.[a-z_]+)=", text)
        + [s for s in re.findall(r"`([a-z]+\.[a-z_]+)`", text) if s.split(".")[0] in ini.sections()]
        if setting not in known and setting.split(".")[1] not in ("py", "ipynb", "parquet", "csv", "html", "json")
    ]
    assert wrong == []


def test_each_make_target_in_the_text_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    called = {
        (name, target)
        for name, text in PROSE.items()
        for target in re.findall(r"(?:^|`|&& |! ?)make ([a-z][a-z-]+)(?=[`\s])", text, flags=re.M)
    }
    assert called and {t for _, t in called} <= targets, {c for c in called if c[1] not in targets}


def test_each_setting_says_what_it_is():
    lines = (ROOT / "settings.ini").read_text().splitlines()
    section, bare = "", []
    for before, line in zip(["", *lines], lines):
        section = line.strip("[]") if line.startswith("[") else section
        key = re.match(r"(\w+) ?=", line)
        if key and not before.startswith("#"):
            bare.append(f"{section}.{key[1]}")
    trained = {
        b.replace("search.", "train.") for b in bare if b.startswith("search.")
    }  # a line for each setting of [train]
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    assert trained <= {f"train.{k}" for k in ini["train"]}
    assert [b for b in bare if not b.startswith("search.")] == []


def test_each_public_name_says_what_it_is():
    bare = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])  # fmt: skip
        made = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        bare += [f"{path.relative_to(ROOT)}: {n.name}" for n in made if n.name in public and not ast.get_docstring(n)]
        if len(tree.body) > 1 and not ast.get_docstring(tree) and path.name != "__init__.py":
            bare.append(f"{path.relative_to(ROOT)}")
    assert bare == []


SCRIPTS = [p for p in found("*.py") if p.relative_to(ROOT).parts[0] in ("pipelines", "terraform")]


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


LONG = {  # a function that needs scrolling, and why
    "train": "a training loop is read from the top, as timm's train.py; its parts would share all of its state",
    "wiring": "its inner functions share the parameters of one pipeline, which it names once; 25 lines hand them on",
}


def test_no_function_needs_scrolling_without_a_reason():
    """60 lines of its own: a function within it is read by itself."""
    long = {}
    for path in [*MODULES, *SCRIPTS, *found("test_*.py"), ROOT / "tests/conftest.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for n in ast.walk(node) if n is not node and isinstance(n, ast.FunctionDef)]
                lines = set(range(node.lineno, node.end_lineno + 1))
                own = lines.difference(*(range(n.lineno, n.end_lineno + 1) for n in inner))
                if len(own) > 60:
                    long[node.name] = len(own)
    assert set(long) == set(LONG), long


def test_no_notebook_is_long():
    long = {p.name: n for p in NOTEBOOKS if (n := len(json.loads(p.read_text())["cells"])) > 60}
    assert long == {}


def test_each_notebook_begins_with_a_title_and_a_summary():
    wrong = [n for n, t in PROSE.items() if n.endswith(".ipynb") and not re.match(r"# .+\n\n> .+", t)]
    assert wrong == []


def test_no_output_is_stale_or_tells_of_a_machine():
    wrong = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            outputs = json.dumps(cell.get("outputs", []))
            if hit := re.search(r"(?<![\w.])/(?:home|Users|root|work|private/var)/[\w.-]+", outputs):
                wrong.append(f"{path.name}: {hit[0]}")
            wrong += [f"{path.name}: an error" for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert wrong == []


def test_the_version_stands_in_one_place():
    assert re.search(r'^dynamic = \["version"\]', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", skin_lesion.__version__) and version("skin-lesion") == skin_lesion.__version__
    newest = re.search(r"^## (?:\[?)(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert newest and newest[1] == skin_lesion.__version__
