"""Pages in a real browser. The one at /: an image is dropped in, and the answer, the map and the warnings are seen."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, Served, colours_package
from PIL import Image


def picture(folder, name, colour, noise=60):
    blocks = np.random.default_rng(1).normal(colour, noise, (30, 40, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.kron(blocks, np.ones((4, 4, 1), np.uint8))).save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(colours_package(tmp_path_factory.mktemp("page") / "package")) as served:
        yield served


@pytest.fixture
def page(browser, server):
    opened = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    opened.problems, opened.asked = [], []
    opened.on("console", lambda message: opened.problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(server.url)
    yield opened
    opened.close()


def test_an_answer_is_shown_with_its_map(page, server, tmp_path):
    page.set_input_files("#file", picture(tmp_path, "red.png", (190, 110, 100)))
    page.wait_for_selector("#answer:not([hidden])")
    assert page.inner_text("#decision") == "MEL" and page.locator("#reasons li").count() == 0
    rows = page.locator("#bars tr")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == ["MEL", "NV", "AK"]
    widths = [bar.bounding_box()["width"] for bar in page.locator(".bar i").all()]
    assert widths[0] > widths[1] and widths[0] > widths[2]
    assert page.eval_on_selector("#map", "image => image.complete && image.naturalWidth") == 32
    assert "Research use only" in page.inner_text("#notice") and "synthetic" in page.inner_text("#notice")
    assert "160 x 120" in page.inner_text("#facts")
    assert not page.problems and all(url.startswith((server.url, "blob:", "data:")) for url in page.asked), page.asked


def test_a_poor_picture_is_warned_about_and_a_broken_file_refused(page, tmp_path):
    page.set_input_files("#file", picture(tmp_path, "dark.png", (20, 9, 9), noise=3))
    page.wait_for_selector("#decision.abstain")
    assert "too dark" in page.inner_text("#reasons") and "limit 60" in page.inner_text("#reasons")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.jpg")
    page.wait_for_selector("#error:not(:empty)")
    assert "not an image" in page.inner_text("#error") and not page.is_visible("#answer")


def test_a_file_can_be_dropped(page, tmp_path):
    data = io.BytesIO(picture(tmp_path, "green.png", (100, 190, 100)).read_bytes()).getvalue()
    page.evaluate(
        """bytes => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([new Uint8Array(bytes)], "green.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, bubbles: true, cancelable: true}));
        }""",
        list(data),
    )
    page.wait_for_selector("#answer:not([hidden])")
    assert page.inner_text("#decision") == "NV"


def test_it_fits_a_phone_and_is_dark_in_the_dark(page, tmp_path):
    page.set_input_files("#file", picture(tmp_path, "red.png", (190, 110, 100)))
    page.wait_for_selector("#answer:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    luminance = "c => c.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
    text = page.evaluate(f"({luminance})(getComputedStyle(document.body).color)")
    assert text > 3 * 180  # light letters


@pytest.mark.slow
def test_jupyterlab_draws_each_picture_of_the_architecture(browser, tmp_path):
    """In a real browser, by the Mermaid that JupyterLab brings along."""
    shutil.copy(ROOT / "nbs" / "guides" / "architecture.md", tmp_path / "page.md")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "settings" / "@jupyterlab" / "docmanager-extension" / "plugin.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"defaultViewers": {"markdown": "Markdown Preview"}}')
    words = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--allow-root"]
    environment = os.environ | {"HOME": str(tmp_path), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *words, f"--ServerApp.root_dir={tmp_path}"],
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/lab", timeout=5).close()
                break
            except OSError:
                assert lab.poll() is None and time.monotonic() < end, "JupyterLab does not start"
                time.sleep(0.5)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/lab/tree/page.md")
        page.wait_for_selector(".jp-RenderedMermaid", timeout=60000)
        page.wait_for_function("document.querySelectorAll('.jp-RenderedMermaid img').length == 3", timeout=60000)
        assert all(picture.bounding_box()["height"] > 200 for picture in page.locator(".jp-RenderedMermaid img").all())
        page.close()
    finally:
        lab.kill()  # it has no kernel that it would have to end
        lab.wait()
