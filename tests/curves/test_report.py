"""report.html: its data, and the page in a real browser where there is one."""

import json
import shutil

import pandas as pd
import pytest
from tiny import train

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.curves import EntropyCurves, write_report
from opefo_trl.files import REPORT_FILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def curves(steps=12, name="run", settings=None, completion=None, advantage=0.5):
    """A run, with a sample if there is a completion."""
    step = pd.RangeIndex(1, steps + 1)
    frame = pd.DataFrame({"step": step, "entropy": 1 / step, "reward": 1 - 1 / step, "flow/lambda": 0.1})
    sample = {"step": 1, "prompt": completion, "reward": 1.0, "advantage": advantage, "length": 1,
              "tokens": [completion], "flow": [0.1], "entropy": [0.2], "probability": [0.3]}  # fmt: skip
    return EntropyCurves(frame, name, settings, [sample] if completion else [])


def data_of(page):
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_the_numbers_and_no_completion_can_break_it(tmp_path):
    hostile, page = "</script><script>alert(1)</script>", tmp_path / "report.html"
    write_report(page, [curves(completion=hostile, advantage=float("nan"))])
    assert page.read_text().count("<script") == 2
    data = data_of(page)
    assert data["runs"][0]["columns"]["flow/lambda"] == [0.1] * 12
    assert data["samples"][0]["tokens"] == [hostile] and data["samples"][0]["advantage"] is None


def test_a_long_run_is_thinned(tmp_path):
    write_report(tmp_path / "report.html", [curves(9001)])
    steps = data_of(tmp_path / "report.html")["runs"][0]["steps"]
    assert len(steps) == 1801 and steps[0] == 3  # means of 1 to 5, 6 to 10, ...


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(OPEFOTrainer, OPEFOConfig, folder, max_steps=8, flow_target=3.0)
    return folder


@pytest.fixture
def opened(browser):
    """A function that opens a page; no page may print, fail, or ask for another file."""
    faults = []

    def open_page(path, scheme="light"):
        page = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    assert faults == []


def tip_at(page, share):
    """Point at the first chart, at this share of its width, and return what the tip says."""
    box = page.locator("#charts svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * share + 1, box["y"] + 60)
    return page.locator("#tip").inner_text()


LEFT, RIGHT = 54 / 540, 530 / 540  # the ends of a curve


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_alone(opened, run, scheme):
    page = opened(run / REPORT_FILE, scheme)
    assert page.locator("#charts figure").count() == 6
    assert page.locator("article").count() == 8
    # The pointer reads the values of a step
    entropy = EntropyCurves.load(run).to_pandas()["entropy"][0]
    tip = tip_at(page, LEFT)
    assert tip.startswith("step 1\n") and f"{entropy:.4g}  entropy" in tip and "3  target" in tip
    assert tip_at(page, RIGHT).startswith("step 8\n")
    page.mouse.move(5, 5)
    assert not page.locator("#tip").is_visible()
    # Tokens are coloured by their flow
    tokens = page.evaluate(
        "[...document.querySelectorAll('.tokens span')]"
        ".map((span) => [+span.dataset.flow, getComputedStyle(span).backgroundColor])"
    )
    assert len(tokens) > 20
    for flow, color in tokens:
        red, _, blue, *alpha = (float(part) for part in color.split("(")[1].rstrip(")").split(","))
        assert alpha == [0.0] if flow == 0 else (blue > red) == (flow > 0) and alpha[0] >= 0.08
    page.locator(".tokens span").first.hover()
    assert "entropy flow" in page.locator("#tip").inner_text()
    for index in range(6):
        page.locator("#charts svg").nth(index).hover()
    page.locator("#steps button").last.click()
    page.locator("#smooth").fill("10")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background[4:-1].split(","))) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60


@pytest.mark.slow
def test_a_completion_is_text_and_nothing_else(opened, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    write_report(tmp_path / "report.html", [curves(name=hostile, settings={"model": hostile}, completion=hostile)])
    page = opened(tmp_path / "report.html")
    assert page.locator(".tokens").inner_text() == hostile and page.locator("img").count() == 0


@pytest.mark.slow
def test_several_runs_of_different_lengths(opened, tmp_path):
    write_report(tmp_path / "report.html", [curves(10, "short"), curves(30, "long")])
    page = opened(tmp_path / "report.html")
    tip = tip_at(page, RIGHT)
    assert tip.startswith("step 30\n") and "long: entropy" in tip and "short" not in tip
    assert not page.locator("#completions").is_visible()


@pytest.mark.slow
def test_a_run_of_one_step_and_a_run_without_metrics(opened, tmp_path):
    bare = curves(1)
    bare.frame = bare.frame.drop(columns=["entropy", "reward"])
    for run in (curves(1), bare):
        write_report(tmp_path / "report.html", [run])
        opened(tmp_path / "report.html")
