"""Pages of runs in a real browser: they load nothing, run nothing, and can be read, light and dark, wide and narrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from look_fixtures import finished_run
from playwright.sync_api import Browser, Page

from trainer.config import Config, EvalConfig, OptimConfig
from trainer.drive.look.compare import figure_table
from trainer.drive.look.gather import look_at
from trainer.drive.show import show_runs
from trainer.paths import RunFolder

HOSTILE = '<script>document.title="taken over"</script><img src=x onerror="document.title=1">'
PHONE, DESK = 390, 1280
ENOUGH, LARGE_ENOUGH = 4.5, 3.0
"""WCAG 2.2: contrast of text (1.4.3), and of what a figure is drawn with (1.4.11)."""

CONTRASTS = """
() => {
  const parse = (text) => { const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a ?? 1]; };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 0, 255, 1];
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const style = getComputedStyle(node);
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (says && node.tagName !== 'title') {
      const colour = node.namespaceURI.endsWith('svg') ? style.fill : style.color;
      found.push({ what: 'text', text: node.textContent.slice(0, 40), ratio: ratio(parse(colour), behind(node)) });
    }
    if (node.tagName === 'polyline')
      found.push({ what: 'line', text: node.parentElement.getAttribute('class'),
                   ratio: ratio(parse(style.stroke), behind(node)) });
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Nine runs, one of which does all it can to be more than text."""
    root = tmp_path_factory.mktemp("runs")
    made = [finished_run(root / "first", name="legal_lora", identity="a1f70c52d3", right=0.75, answer=HOSTILE)]
    config = Config(optim=OptimConfig(lr=5e-4), eval=EvalConfig(batch_tokens=8192))
    made.append(finished_run(root / "hostile", config, name=HOSTILE, identity="77b20e1f9a", right=0.86, seed=3))
    return made + [finished_run(root / f"run{n}", identity=f"{n:010d}", seed=n, steps=40) for n in range(7)]


@pytest.fixture(scope="module")
def pages(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {"one": folder / "one.html", "two": folder / "two.html", "nine": folder / "nine.html"}
    for path, shown in zip(found.values(), (runs[:1], runs[:2], runs), strict=True):
        show_runs([run.root for run in shown], page=path)
    return found


@contextmanager
def opened(
    browser: Browser, path: Path, *, scheme: Literal["light", "dark"] = "light", width: int = DESK, script: bool = True
) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what it asked for or complained about."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=script
    )
    page, heard = context.new_page(), list[str]()
    page.on("request", lambda request: heard.append(f"request {request.url}"))
    page.on("console", lambda message: heard.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog {dialog.message}"))
    page.goto(path.as_uri())
    yield page, heard
    context.close()


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_page_asks_for_nothing_and_says_nothing(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name]) as (page, heard):
        page.wait_for_load_state("networkidle")
        assert heard == [f"request {pages[name].as_uri()}"]


def test_data_is_text(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("one", "two"):
        with opened(browser, pages[name]) as (page, _):
            assert page.title() in ("Run legal_lora/a1f70c52d3", "2 runs beside each other")
            assert page.locator("script, img, iframe, link, object, embed").count() == 0
            assert page.get_by_text(HOSTILE).first.is_visible()
            attributes = page.evaluate(
                "() => [...document.querySelectorAll('*')].flatMap((node) => [...node.attributes]).map((a) => a.name)"
            )
            assert not [attribute for attribute in attributes if attribute.startswith("on")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "nine"])
def test_everything_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, scheme: Literal["light", "dark"]
) -> None:
    with opened(browser, pages[name], scheme=scheme) as (page, _):
        found: list[dict[str, Any]] = page.evaluate(CONTRASTS)
        back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
    assert {entry["what"] for entry in found} == {"text", "line"}
    weak = [entry for entry in found if entry["ratio"] < (ENOUGH if entry["what"] == "text" else LARGE_ENOUGH)]
    assert not weak, weak[:5]


@pytest.mark.parametrize("name", ["one", "nine"])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], width=PHONE) as (page, _):
        assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE
        wide = page.evaluate(
            "() => [...document.querySelectorAll('h1,h2,h3,p,figure,.scroll')]"
            ".filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5).map((node) => node.outerHTML)"
        )
        assert wide == []
        small = page.evaluate(
            "() => Math.min(...[...document.querySelectorAll('figure > svg text')]"
            ".map((node) => node.getBoundingClientRect().height))"
        )
        assert small > 8, "figures on the axes have to stay readable"


def test_without_a_script_everything_is_there(browser: Browser, pages: dict[str, Path], runs: list[RunFolder]) -> None:
    with opened(browser, pages["nine"], script=False) as (page, _):
        charts = page.locator("figure > svg")
        assert charts.count() == 6
        for number in range(charts.count()):
            assert charts.nth(number).is_visible()
            assert charts.nth(number).locator("polyline").count() == 9
        titles = ["Figures", "Row by row against legal_lora/a1f70c52d3", "Curves", "What differs in training"]
        assert page.locator("h2").all_inner_texts() == [*titles, "What differs besides", "Cost"]
        assert page.locator("table").count() == 5
        for row in figure_table([look_at(run) for run in runs]).rows:
            for cell in row[1:]:
                assert page.get_by_role("cell", name=cell, exact=True).first.is_visible()


def test_a_point_says_its_value(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["one"]) as (page, _):
        titles = page.locator("figure").first.locator("circle title").all_text_contents()
        assert any(title.startswith("validation: ") and title.endswith("at step 120") for title in titles)
        box = page.locator("figure").first.locator("polyline").first.bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 80


def test_same_runs_different_colours_and_dashes(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["nine"]) as (page, _):
        looks = page.evaluate(
            "() => [...document.querySelector('figure > svg').querySelectorAll('polyline')].map("
            "(line) => getComputedStyle(line).stroke + getComputedStyle(line).strokeDasharray)"
        )
        keys = page.locator("header .key")
        assert keys.count() == 9
        box = keys.first.bounding_box()
        assert box is not None
        assert box["width"] > 5
    assert len(set(looks)) == len(looks) == 9
