"""Pages by the rules of axe, in a real browser: a phone in the dark and a wide window in light. test_site.py has the site."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Served, colours_package
from test_page import picture

LOOKS = [
    {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
    {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
]


def broken(page):
    """Rules that the open page breaks, each with the places."""
    rules = Axe().run(page).response["violations"]
    return {f"{rule['id']} ({rule['impact']})": [place["target"] for place in rule["nodes"]] for rule in rules}


@pytest.fixture(params=LOOKS, ids=str)
def page(browser, request):
    opened = browser.new_page(**request.param)
    yield opened
    opened.close()


def test_axe_finds_what_is_wrong(page):
    page.set_content("<main><img src='data:,'><p style='color: #999; background: #fff'>dim</p></main>")
    assert {"image-alt (critical)", "color-contrast (serious)", "html-has-lang (serious)"} <= set(broken(page))


def test_the_report_of_a_run_its_notebooks_and_the_run_beside_itself(page, finished):
    assert finished.cli("report", "latest", "latest").returncode == 0
    report = sorted((finished.work / "runs" / "latest" / "report").glob("*.html"))
    assert len(report) >= 6, report
    for path in report:
        page.goto(path.as_uri())
        assert broken(page) == {}, path.name


def test_the_page_of_the_server_before_and_after_an_answer(page, tmp_path):
    with Served(colours_package(tmp_path / "package")) as served:
        page.goto(served.url)
        assert broken(page) == {}
        page.set_input_files("#file", picture(tmp_path, "dark.png", (20, 9, 9), noise=3))
        page.wait_for_selector("#answer:not([hidden])")
        assert broken(page) == {}
