"""Builds the documentation site from the notebooks, without Quarto and without network: `make docs`, into site/.

A page a notebook, in the order of nbs/sidebar.yml and at the address that nbdev gives it (`_modidx.py` links there). An
exported cell shows the signature, comments and docstring of each public name, and its source folded. Search runs in the
browser; a page loads nothing from elsewhere, and also opens from the disk."""

import ast
import html
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import click
import nbformat
import yaml
from fastcore.docments import MarkdownRenderer
from nbconvert.exporters.html import HTMLExporter
from nbconvert.filters import Highlight2HTML
from nbdev.config import nbpath2html

from skin_lesion.cli import main
from skin_lesion.execution.pages import NOTEBOOK_STYLE, STYLE, scrollable

ROOT = Path(__file__).resolve().parent.parent
HERE, NBS = ROOT / "docs", ROOT / "nbs"
FILES = ["CONTRIBUTING.md", "CHANGELOG.md"]  # what the notebooks link to, beside the notebooks
EXTERNAL = re.compile(r"[a-z][a-z+.-]*:|//", re.I)
TEMPLATE = """{% extends 'basic/index.html.j2' %}
{% block input_group %}{% if 'api' in cell.metadata %}{{ cell.metadata.api }}
<details class="code"><summary>Source</summary>{{ super() }}</details>{% else %}{{ super() }}{% endif %}{% endblock %}
{% block input %}{{ cell.source | highlight_code(metadata=cell.metadata) }}{% endblock %}"""
PAGE = """<!doctype html>
<html lang="en" data-root="{root}">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'">
<title>{title}</title><link rel="stylesheet" href="{root}site.css"><script src="{root}site.js" defer></script>
</head>
<body>
<a class="skip" href="#site-page">To the text</a>
<header><button popovertarget="site-contents">Contents</button><a href="{root}index.html">skin_lesion</a>
<input id="site-search" type="search" placeholder="Search" title="/ leads here" aria-label="Search" autocomplete="off"></header>
<div id="layout"><nav id="site-contents" popover aria-label="Contents"><ul>{contents}</ul></nav>
<main><div id="site-page">{body}<nav class="ways" aria-label="Before and after">{ways}</nav></div><section id="site-results" aria-label="Search results" hidden></section></main></div>
</body></html>
"""


def order() -> dict[str, list[Path]]:
    """Section to its files, in reading order; the first section has no name."""
    listed = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    sections = {"": [NBS / entry for entry in listed if isinstance(entry, str)]}
    sections |= {e["section"]: [NBS / name for name in e["contents"]] for e in listed if isinstance(e, dict)}
    missing = set(NBS.rglob("[!_.]*.ipynb")) - {path for paths in sections.values() for path in paths}
    if missing := sorted(p.relative_to(NBS).as_posix() for p in missing if ".ipynb_checkpoints" not in p.parts):
        raise ValueError(f"nbs/sidebar.yml lacks {', '.join(missing)}; every notebook has a line there")
    return sections | {"Project": [ROOT / name for name in FILES]}


def address(path: Path) -> str:
    """Where a file's page lies below site/."""
    return nbpath2html(path.relative_to(NBS if path.is_relative_to(NBS) else ROOT)).as_posix()


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading; the links in the notebooks say it so."""
    return re.sub(r"[^\w-]", "", heading.strip().lower().replace(" ", "-"))


def words(text: str) -> str:
    """A docstring as HTML."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def commands(command: click.Command, typed: str = "skin-lesion"):
    """Each command with the words that are typed for it."""
    yield command, typed
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{typed} {name}")


def described(name: str, thing, source: str, place: str, level: int = 3) -> tuple[str, str]:
    """A public name as HTML and as text for the search: its signature with comments, its docstring, its methods."""
    methods, language = [], "python"
    if isinstance(thing, click.Command):
        with click.Context(thing, info_name=dict(commands(main))[thing]) as context:
            code, doc, language = thing.get_help(context), "", "text"
    elif inspect.isclass(thing) or inspect.isroutine(thing) or isinstance(thing, property):
        shown = MarkdownRenderer(thing, name=name)
        code, doc = str(shown.dm), shown.docs
        if inspect.isclass(thing):
            code = re.sub(r"^def", "class", code)
            methods = [
                described(f"{name}.{key}", value, source, f"{place}.{key}", level + 1)
                for key, value in vars(thing).items()
                if key[0] != "_" and (inspect.isroutine(getattr(thing, key)) or isinstance(value, property))
            ]
    else:
        code, doc = source, ""
    painted = Highlight2HTML(pygments_lexer=language)(code)
    body = f'<h{level}><a href="#{place}">{name}</a></h{level}>{painted}<p>{words(doc)}</p>'
    text = "\n".join([code, doc, *(text for _, text in methods)])
    return f'<div class="api" id="{place}">{body}{"".join(h for h, _ in methods)}</div>', text


def names_of(cell: str, module) -> dict[str, str]:
    """The public names that an exported cell defines, each with its source."""
    found = {}
    for node in ast.parse(cell).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
        for target in targets:
            for part in getattr(target, "elts", [target]):
                name = getattr(part, "name", None) or getattr(part, "id", None)
                if name in module.__all__:
                    lines = cell.splitlines()[node.lineno - 1 : node.end_lineno]
                    found[name] = "\n".join(lines[:12] + ["…"] * (len(lines) > 12))
    return found


def prepare(path: Path, notes: list) -> tuple[nbformat.NotebookNode, str, dict[str, str]]:
    """The notebook as it is shown, its title, and its public names with their anchors; `notes` takes what is searched."""
    if path.suffix == ".ipynb":
        book = nbformat.read(path, as_version=4)
    else:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(path.read_text())])
    source = "\n".join(c.source for c in book.cells)
    exported = re.search(r"^#\| *default_exp (\S+)", source, flags=re.M)
    module = exported and importlib.import_module(f"skin_lesion.{exported[1]}")
    book.cells = [
        c for c in book.cells if c.cell_type != "raw" and not re.match(r"#\| *(hide|default_exp)\b", c.source)
    ]
    title = re.search(r"^# (.+)$", book.cells[0].source, flags=re.M)[1]
    where, names = address(path), {}
    notes.append([title, title, where, "", 0])
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for part in re.split(r"^(?=##+ )", cell.source, flags=re.M):
                heading = re.match(r"##+ (.+)", part)
                if heading:
                    plain = heading[1].replace("`", "")
                    notes.append([plain, title, f"{where}#{anchor(plain)}", "", 0])
                notes[-1][3] += f"{re.sub(r'[`*]', '', part[heading.end() if heading else 0 :])}\n"
            continue
        exports = cell.source.startswith("#| export")
        cell.source = re.sub(r"^(#\|.*\n)+\n*", "", cell.source + "\n").rstrip("\n")
        if exports:
            cell.metadata.api = ""
        for name, definition in names_of(cell.source, module).items() if exports else ():
            place = f"{where}#{name.lower()}"  # as nbdev, which gives one place to a class Check and a function check
            names[name] = f"{place}-2" if place in names.values() else place
            shown, text = described(name, vars(module)[name], definition, names[name].partition("#")[2])
            cell.metadata.api += shown
            notes.append([name, f"skin_lesion.{exported[1]}", names[name], text, 1])
        printed = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
        notes[-1][3] += "\n".join([cell.source, *(text[:2000] for text in printed)]) + "\n"
    for note in notes:
        if not note[4] and note[2] in names.values():
            note[2] = note[2].replace("#", "#about-")
    return book, title, names


def relinked(page: str, path: Path, site: Path, pages: dict[Path, str]) -> str:
    """Links to notebooks lead to their pages; another file of the repository that is linked to is copied."""
    here, said = address(path), path.read_text()
    base = ROOT if path == NBS / "index.ipynb" else path.parent  # README.md is made of the index, and lies in the root

    def there(found):
        link = html.unescape(found[2])
        if EXTERNAL.match(link) or link.startswith("#"):
            return found[0]
        name, _, heading = link.partition("#")
        target = (base / unquote(name)).resolve()
        if target in pages:
            to = pages[target] + (f"#{heading.lower()}" if heading else "")
        elif target.is_file() and target.is_relative_to(ROOT):
            to = f"files/{target.relative_to(ROOT).as_posix()}" + ("" if target.suffix else ".txt")
            (site / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, site / to)
        elif f"]({link})" not in said:  # in an output, whose neighbours are not here
            return found[1].rsplit(" ", 1)[0]
        else:
            raise ValueError(f"{path.relative_to(ROOT)} links to {link}, which is no file of the repository")
        return f'{found[1]}"{html.escape(os.path.relpath(to, Path(here).parent))}"'

    return re.sub(r'(<(?:a|img)\b[^>]*?\b(?:href|src)=)"([^"]*)"', there, page)


def contents(sections: dict, here: Path, pages: dict, titles: dict, root: str, within: list[tuple[str, str]]) -> str:
    """The list of all pages; below the page that is open, its headings and names."""

    def item(path):
        mark = ' aria-current="page"' if path == here else ""
        inner = "".join(f'<li><a href="#{i}">{html.escape(t)}</a></li>' for i, t in within) if path == here else ""
        return f'<li><a href="{root}{pages[path]}"{mark}>{html.escape(titles[path])}</a>{inner and f"<ul>{inner}</ul>"}</li>'

    text = ""
    for name, paths in sections.items():
        items = "".join(map(item, paths))
        opened = " open" if here in paths else ""
        text += f"<li><details{opened}><summary>{name}</summary><ul>{items}</ul></details></li>" if name else items
    return text


def build(site: Path) -> None:
    """Writes the whole site into an empty folder."""
    sections = order()
    paths = [path for section in sections.values() for path in section]
    pages = {path: address(path) for path in paths}
    if len(set(pages.values())) < len(pages):
        raise ValueError("two notebooks of one folder differ by their number only, and would be one page; rename one")
    notes = []
    made = {path: prepare(path, notes) for path in paths}
    titles = {path: title for path, (_, title, _) in made.items()}
    known = {}  # a name in backticks becomes a link where it means one thing
    for _, _, names in made.values():
        for name, to in names.items():
            known[name] = None if name in known else to
    quiet = logging.getLogger("skin_lesion.docs")  # nbconvert warns of pictures without a description
    quiet.setLevel(logging.ERROR)
    exporter = HTMLExporter(raw_template=TEMPLATE, anchor_link_text="#", log=quiet)
    for at, path in enumerate(paths):
        book, title, own = made[path]
        body, _ = exporter.from_notebook_node(book)
        body = relinked(scrollable(body), path, site, pages)

        def placed(found, own=own, where=pages[path]):
            to = anchor(unquote(html.unescape(found[2])))
            return (
                found[1] + ("about-" if f"{where}#{to}" in own.values() else "") + to
            )  # a heading gives way to a name

        body = re.sub(r'(<h\d id="|class="anchor-link" href="#)([^"]+)', placed, body)
        root = os.path.relpath(".", Path(pages[path]).parent) + "/"

        def linked(found, own=own, root=root):
            to = own.get(found[1].rstrip("()")) or known.get(found[1].rstrip("()"))
            return f'<a href="{root}{to}">{found[0]}</a>' if to else found[0]

        body = re.sub(r"<code>(\w+(?:\(\))?)</code>(?![^<]*</a>)", linked, body)
        within = re.findall(
            r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"|class="api" id="([\w.]+)"><h3><a [^>]*>(\w+)', body
        )
        within = [(a or c, html.unescape(re.sub(r"<[^>]+>", "", b)) or d) for a, b, c, d in within]
        ways = "".join(
            f'<a rel="{rel}" href="{root}{pages[paths[to]]}">{html.escape(words.format(titles[paths[to]]))}</a>'
            for rel, to, words in (("prev", at - 1, "← {}"), ("next", at + 1, "{} →"))
            if 0 <= to < len(paths)
        )
        out = site / pages[path]
        out.parent.mkdir(parents=True, exist_ok=True)
        name = title if title == "skin_lesion" else f"{title} · skin_lesion"
        lists = contents(sections, path, pages, titles, root, within)
        out.write_text(PAGE.format(root=root, title=html.escape(name), contents=lists, body=body, ways=ways))
    (site / "search.js").write_text(f"const INDEX = {json.dumps(notes, ensure_ascii=False)}\n")
    (site / "site.css").write_text(STYLE + NOTEBOOK_STYLE + (HERE / "site.css").read_text())
    shutil.copy(HERE / "site.js", site)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    build(target)
    print(f"{target}/index.html")
