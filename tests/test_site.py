"""The documentation site: every notebook, every public name with its comments, no dead link, and a search in a real browser."""

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin

import pytest
from conftest import ROOT
from fastcore.docments import docments
from test_accessibility import LOOKS, broken

from skin_lesion._modidx import d as INDEX

PUBLIC = {
    (module, name.removeprefix(f"{module}.")): address
    for module, names in INDEX["syms"].items()
    for name, (address, _) in names.items()
    if not re.search(r"\._", name.removeprefix("skin_lesion"))
}


class Page(HTMLParser):
    """Ids, links, what it loads, and its text."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.text = [], [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values and tag == "a" else []
        self.loads += [values[k] for k in ("src", "href", "data", "poster") if values.get(k) and tag != "a"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}


@pytest.fixture(scope="module")
def notes(site):
    return json.loads((site / "search.js").read_text().removeprefix("const INDEX = "))


def test_every_notebook_is_a_page_that_the_contents_name(site, pages):
    books = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    titles = [re.search(r"^# (.+)$", "".join(c), flags=re.M) for p in books for c in [json.loads(p.read_text())["cells"][:2]] for c in ["".join("".join(x["source"]) + "\n" for x in c)]]  # fmt: skip
    assert all(titles) and len(pages) >= len(books)
    for page in pages.values():
        assert [t[1] for t in titles if t[1] not in page.text] == []


def test_every_public_name_is_where_nbdev_says_and_in_the_search(pages, notes):
    found = {(module, title): where for title, module, where, _, public in notes if public}
    assert len(PUBLIC) > 500
    for (module, name), address in PUBLIC.items():
        path, _, anchor = address.partition("#")
        assert anchor in pages[path].ids, f"{module}.{name} is not at {address}"
        if "." not in name:
            assert found[module, name].removesuffix("-2") == address
    missing = []
    for module in INDEX["syms"]:  # constants, too
        missing += [
            f"{module}.{name}" for name in importlib.import_module(module).__all__ if (module, name) not in found
        ]
    assert missing == []


def test_comments_and_docstrings_of_functions_are_shown(pages):
    seen, bare = 0, []
    for (module, name), address in PUBLIC.items():
        thing = getattr(importlib.import_module(module), name.split(".")[0])
        if "." in name or not callable(thing) or not hasattr(thing, "__code__"):
            continue
        text = re.sub(r"\s+", " ", pages[address.partition("#")[0]].text)
        said = [values["docment"] for values in docments(thing, full=True).values()] + [(thing.__doc__ or "").replace("`", "")]  # fmt: skip
        seen += len(said)
        bare += [f"{module}.{name}: {s}" for s in said if s and re.sub(r"\s+", " ", s) not in text]
    assert seen > 1000 and bare == []
    shown = pages["data/splits.html"].text
    assert "seeds:int=10, # random splits to average" in shown
    assert "Usage: skin-lesion data list" in pages["commands/data.html"].text


def test_no_link_is_dead_no_id_stands_twice_and_nothing_is_loaded_from_elsewhere(site, pages):
    dead, twice, outside, seen = [], [], [], 0
    for name, page in pages.items():
        twice += [f"{name}: {i}" for i, n in Counter(page.ids).items() if n > 1]
        for link in [*page.links, *page.loads]:
            if re.match(r"[a-z]+:|//", link):
                outside += [f"{name}: {link}"] if link in page.loads and not link.startswith("data:image/") else []
                continue
            seen += 1
            path, _, anchor = urljoin(name, unquote(link)).partition("#")
            path = path or name
            if not (site / path).is_file() or (anchor and path in pages and anchor not in pages[path].ids):
                dead.append(f"{name}: {link}")
    assert seen > 10_000 and dead == [] and twice == [] and outside == []


def test_every_note_of_the_search_leads_somewhere(pages, notes):
    wrong = [where for _, _, where, _, _ in notes for path, _, anchor in [where.partition("#")] if anchor and anchor not in pages[path].ids]  # fmt: skip
    assert wrong == []


def opened(browser, address, **options):
    page = browser.new_page(**options)
    page.problems, page.asked = [], []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    return page


def test_somebody_searches_on_a_phone_and_follows_what_is_found(browser, site):
    page = opened(browser, f"{(site / 'guides' / 'cost.html').as_uri()}", viewport={"width": 390, "height": 844})
    page.keyboard.press("/")
    page.keyboard.type("split_table")
    page.wait_for_selector("#site-results li a")
    hits = page.locator("#site-results li a")
    assert hits.first.inner_text() == "split_table" and not page.locator("#site-page").is_visible()
    assert "stratified by diagnosis" in page.locator("#site-results").inner_text() or page.locator("mark").count() > 0
    page.keyboard.press("Enter")
    page.wait_for_url("**/data/splits.html#split_table")
    assert 0 <= page.locator("#split_table").bounding_box()["y"] < 200
    page.fill("#site-search", "no group without a zyzzyva")
    page.wait_for_selector("#site-results p")
    assert "Nothing holds" in page.inner_text("#site-results")
    page.fill("#site-search", "<b>train.epoch</b>")  # is text, not HTML
    page.wait_for_function("document.querySelector('#site-results').innerText.includes('<b>')")
    page.fill("#site-search", "There is no setting")  # an error message, out of an output
    page.wait_for_selector("#site-results li")
    assert "Troubleshooting" in page.inner_text("#site-results")
    assert page.problems == [] and all(url.startswith(("file:", "data:")) for url in page.asked)
    page.close()


def test_pages_fit_a_phone_in_light_and_dark_and_the_contents_open(browser, site):
    colours = {}
    for scheme in ("light", "dark"):
        page = opened(
            browser, (site / "index.html").as_uri(), viewport={"width": 390, "height": 844}, color_scheme=scheme
        )
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for path in sorted(site.rglob("*.html")) if scheme == "light" else ():
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        assert page.problems == []
        page.click("button[popovertarget]")
        page.locator("#site-contents summary", has_text="Evaluation").click()
        page.locator("#site-contents a", has_text="Calibration").first.click()
        page.wait_for_url("**/evaluation/calibration.html")
        page.close()
    assert colours["light"] != colours["dark"]
    wide = opened(
        browser, f"{(site / 'data' / 'splits.html').as_uri()}#split_table", viewport={"width": 1280, "height": 900}
    )
    current = wide.locator("#site-contents [aria-current]").bounding_box()
    assert 0 < current["y"] < 900 and current["x"] < 288  # seen beside the text, wherever the page was scrolled to
    wide.close()


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_axe_finds_nothing_wrong(browser, site, look):
    page = browser.new_page(**look)
    for name in ("index", "data/splits", "commands/data", "explore/eda"):
        page.goto((site / f"{name}.html").as_uri())
        assert broken(page) == {}, name
    page.keyboard.press("/")
    page.keyboard.type("split_table")
    page.wait_for_selector("#site-results li a")
    assert broken(page) == {}
    page.close()
