"""The report in a real browser without a network: it draws, reacts to pointer and keys, and reports no errors.

Needs Debian's chromium (or Chrome) and the package playwright; without them these tests are skipped with a message.
"""

import base64
import io
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folders import byte_tokenizer, tiny_folder
from llama_ref import study
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.study.analyses.attention import attention_pattern
from llama_ref.study.analyses.logit_lens import logit_lens, predict
from llama_ref.study.analyses.overview import Overview, overview
from llama_ref.study.patching.grid import GridPair
from llama_ref.study.report.writer import write_report
from llama_ref.tokenizer import Tokenizer
from study import feature_folders
from study.pictured import IMAGE, picture, random_vision_model

CAPITAL = "The capital of France is"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
Open = Callable[..., AbstractContextManager[Any]]


# ---- browser and pages


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = find_browser()
    with pytest.importorskip(
        "playwright.sync_api", reason="the package playwright is not installed"
    ).sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def find_browser() -> str:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    return program or pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed; install chromium to run this")


@pytest.fixture(scope="module")
def window(browser) -> Any:
    """One page for all tests: a new window costs more than loading a report."""
    context = browser.new_context(offline=True, reduced_motion="reduce")
    context.set_default_timeout(10_000)
    return context.new_page()


@pytest.fixture(scope="module")
def open_page(window) -> Open:
    """Open a report from disk, without a network; its errors and requests fail the test."""
    problems, asked = [], []
    window.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    window.on("pageerror", lambda error: problems.append(str(error)))
    window.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    window.on("request", lambda request: asked.append(request.url))

    @contextmanager
    def open_page(path: Path, *, width: int = 1240, height: int = 900, scheme: str = "light") -> Iterator[Any]:
        window.goto("about:blank")  # end whatever an earlier test left running
        window.mouse.move(0, 0)
        window.set_viewport_size({"width": width, "height": height})
        window.emulate_media(media="null", color_scheme=scheme)
        problems.clear(), asked.clear()
        window.goto(path.as_uri())
        window.wait_for_selector("#shares h3")  # drawn last: a pattern is inflated asynchronously
        yield window
        window.evaluate("() => null")  # by then all messages of the page have arrived
        assert problems == [] and asked == [path.as_uri()]

    return open_page


def write(llama: Llama, tokens: list[int], folder: Path, name: str = "A model", top: int = 5) -> Path:
    path = folder / "report.html"
    write_report(overview(llama.model, tokens, top=top, bos=llama.tokenizer.bos_id), llama.tokenizer, path, model_name=name)
    return path


@pytest.fixture(scope="module")
def paris(llama, tmp_path_factory) -> Path:
    return write(llama, llama.encode(CAPITAL), tmp_path_factory.mktemp("paris"), "SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def long_tokens() -> list[int]:
    return torch.randint(256, (500,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def long(peaked, long_tokens, tmp_path_factory) -> Path:
    return write(peaked, long_tokens, tmp_path_factory.mktemp("long"))


def card(page: Any) -> str:
    return page.locator("#card").inner_text()


def pointer(page: Any, grid: str, x: float, y: float) -> tuple[float, float]:
    """Window coordinates of a point in a grid: pixels from its upper left; negative: from its lower right."""
    box = page.locator(grid).bounding_box()
    return box["x"] + (x if x >= 0 else box["width"] + x), box["y"] + (y if y >= 0 else box["height"] + y)


def point_at(page: Any, grid: str, x: float, y: float) -> None:
    """Scroll a grid into view and move the pointer to a point in it; see `pointer`."""
    page.locator(grid).evaluate("(grid) => grid.scrollIntoView({ block: 'center' })")
    page.wait_for_timeout(60)  # scrolling hides the card
    page.mouse.move(*pointer(page, grid, x, y))


def point_at_place(page: Any, chart: str, key: str) -> str:
    """The card of a chart or grid after a key press."""
    page.locator(chart).focus()
    page.wait_for_timeout(60)  # scrolling hides the card
    page.keyboard.press(key)
    return card(page)


@pytest.mark.parametrize("ci", ["true", ""])
def test_without_a_browser_the_page_is_not_looked_at(monkeypatch, ci):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match=r"none of chromium, .* is installed; install chromium"):
        find_browser()


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else 0.0


# ---- the text


def test_the_page_says_what_it_is(open_page, paris):
    with open_page(paris) as page:
        assert page.title() == "SmolLM2-135M-Instruct · llama-ref lens"
        facts = page.locator("#facts").inner_text()
        assert (
            re.search(r"Tokens\s+6\s", facts) and "30 × 9 heads" in facts and "float32" in facts and "␣Paris id 7025" in facts
        )
        assert re.search(r"[78]\d%, rank 1", facts)
        headings = page.locator("h2").all_inner_texts()
        assert headings[:3] == ["The text", "What each layer would say next", "Where heads look"]
        assert headings[3:] == ["What wrote the logit of ␣Paris", "The residual stream"]
        assert page.locator("#warning").is_hidden()


def test_a_token_tells_what_the_model_expected(open_page, paris, llama):
    tokens = llama.encode(CAPITAL)
    expected = predict(llama.model, tokens)
    with open_page(paris) as page:
        chips = page.locator("#strip .chip")
        assert chips.all_inner_texts() == ["<|begin_of_text|>", "The", "␣capital", "␣of", "␣France", "␣is", "→ ␣Paris"]
        for position in (1, 4):
            chips.nth(position).hover()
            text = card(page)
            assert (
                f"position {position} · id {tokens[position]} · bytes {llama.tokenizer.token_bytes(tokens[position]).hex(' ')}"
                in text
            )
            assert re.search(rf"had probability [\d.·⁰-⁹⁻]+%?, rank {expected.rank[position]:,}\n", text)
            shares = [percent(share) for share in page.locator("#card .share").all_inner_texts()]
            assert shares == pytest.approx(expected.top_probabilities[position - 1].tolist(), abs=0.006)
        chips.nth(0).hover()
        assert "there is nothing before it" in card(page)
        chips.nth(6).hover()
        assert re.search(r"say next\s+␣Paris\s+[78]\d%", card(page))
        assert page.locator("#strip button").count() == 6  # the predicted next token cannot be selected


def test_parts_of_a_character_name_it(open_page, shallow, tmp_path):
    with open_page(write(shallow, shallow.encode("서울 👍"), tmp_path)) as page:
        page.locator("#strip .chip").nth(1).hover()
        assert re.match(r"<0x[0-9A-F]{2}>\s+position 1 .*\s+a part of 서\n", card(page))


def test_lines_break_after_newlines_alone(open_page, peaked, tmp_path):
    tokenizer_path = byte_tokenizer(tmp_path / "tokenizer.model")
    with tokenizer_path.open("ab") as file:
        file.write(base64.b64encode(rb"a\n") + b" 256\n")
    found = overview(peaked.model, [65, 256, 66, 10, 67], ids=range(256))
    (tmp_path / "page").mkdir()
    write_report(found, Tokenizer(tokenizer_path), tmp_path / "page" / "report.html", model_name="Letters")
    with open_page(tmp_path / "page" / "report.html") as page:
        assert page.locator("#strip .chip").all_inner_texts()[1:4] == [r"a\n", "B", r"\n"]
        assert page.locator("#strip br").count() == 1 and page.locator("#strip .chip:nth-child(4) + br").count() == 1


def test_many_alternatives_leave_room_for_the_card(open_page, peaked, tmp_path):
    with open_page(write(peaked, [256, 84, 104], tmp_path, top=60), height=800) as page:
        for chip in (1, 3):
            page.locator("#strip .chip").nth(chip).hover()
            assert page.locator("#card .bars .share").count() == 10 and "… and 50 more" in card(page)
            box = page.locator("#card").bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= 800


def test_selecting_a_token_moves_the_whole_page(open_page, paris):
    with open_page(paris) as page:
        before = page.locator("#rise-rank path").get_attribute("d"), page.locator("#norms path").last.get_attribute("d")
        page.locator("#strip .chip").nth(2).click()
        assert page.locator("#selected").inner_text() == "␣capital @2"
        assert page.locator("#rise-title").inner_text() == "␣Paris through the layers, after ␣capital @2"
        assert page.locator("#shares h3").inner_text() == "␣capital @2 looks at"
        after = page.locator("#rise-rank path").get_attribute("d"), page.locator("#norms path").last.get_attribute("d")
        assert all(old != new for old, new in zip(before, after, strict=True))
        page.locator("#next").click()
        assert page.locator("#selected").inner_text() == "␣of @3"


def test_keys_reach_tokens_heads_and_cells(open_page, paris):
    with open_page(paris) as page:
        page.locator("#strip .chip").nth(5).focus()
        page.keyboard.press("ArrowLeft")
        assert "position 4 · " in card(page)
        page.keyboard.press("Enter")
        assert page.locator("#selected").inner_text() == "␣France @4"
        layer, head = page.locator("#layer").input_value(), int(page.locator("#head").input_value())
        page.keyboard.press("]")
        assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == (layer, str(head + 1))
        page.locator("#lens-grid").focus()
        page.keyboard.press("ArrowLeft")
        assert "layer 29, after ␣of @3" in card(page)
        page.keyboard.press("Enter")
        assert page.locator("#selected").inner_text() == "␣of @3"
        page.keyboard.press("Escape")
        assert page.locator("#card").is_hidden()
        page.locator("#heads-grid").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        assert page.locator("#layer").input_value() == str(int(layer) - 1)


def test_brackets_are_brackets_on_every_keyboard(open_page, paris):
    pressed = "(how) => document.body.dispatchEvent(new KeyboardEvent('keydown', { key: ']', bubbles: true, ...how }))"
    cases = (({}, 1), ({"ctrlKey": True, "altKey": True}, 1), ({"altKey": True}, 1), ({"metaKey": True}, 0))
    with open_page(paris) as page:
        for modifiers, stepped in cases:
            page.locator("#head").select_option("0")
            page.evaluate(pressed, modifiers)
            assert int(page.locator("#head").input_value()) == stepped, modifiers


def test_charts_are_read_by_keys(open_page, paris):
    cases = (
        ("#rise-probability", "embedding, after ␣is @5", "layer 29, after ␣is @5"),
        ("#rise-rank", "embedding, after ␣is @5", "layer 29, after ␣is @5"),
        ("#by-layer", "embedding", "layer 29"),
        ("#norms", "embedding", "after layer 29"),
        ("#cosines", "embedding", "after layer 29"),
    )
    with open_page(paris) as page:
        for (chart, first, last), width in zip(cases, (700, 1240, 700, 1240, 700), strict=True):
            assert point_at_place(page, chart, "ArrowRight").split("\n")[0] == first
            box = page.locator(f"{chart} svg").get_attribute("viewBox")
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_selector(f'{chart} svg:not([viewBox="{box}"])')  # redrawn; the keyboard position stays
            assert page.locator(chart).evaluate("(chart) => chart === document.activeElement")
            page.keyboard.press("ArrowLeft")
            assert card(page).split("\n")[0] == last
            assert page.locator("#spoken").text_content().startswith(last)
            page.keyboard.press("Tab")
            assert page.locator("#card").is_hidden()


def test_what_takes_arrow_keys_says_so(open_page, paris):
    with open_page(paris) as page:
        for element in page.locator(".grid, .chart").all():
            assert element.get_attribute("role") == "application" and element.get_attribute("tabindex") == "0"
            assert re.fullmatch(r".+; arrow keys, Home, End, Page Up and Page Down move.*", element.get_attribute("aria-label"))
        assert page.locator("svg title").count() == 0  # a browser would show a title over the card


def test_keys_go_far_in_long_texts(open_page, long):
    with open_page(long) as page:
        page.locator("#strip .chip").nth(499).focus()
        for key, position in (("Home", 0), ("PageDown", 20), ("PageDown", 40), ("PageUp", 20), ("End", 499), ("PageDown", 499)):
            page.keyboard.press(key)
            assert page.locator("#strip .chip:focus").get_attribute("data-position") == str(position)
        for grid, keys in (
            ("#lens-grid", {"Home": "1, after .* @0", "PageDown": "1, after .* @20", "End": "1, after .* @499",
                            "Shift+PageUp": "embedding, after .* @499", "Control+Home": "embedding, after .* @0",
                            "PageUp": "embedding, after .* @0", "Control+End": "layer 1, after .* @499"}),
            ("#pattern-grid", {"Control+Home": ".* @0 looks at .* @0", "Shift+PageDown": ".* @20 looks at .* @0",
                               "End": ".* @20 looks at .* @20", "Shift+PageUp": ".* @0 looks at .* @0",
                               "Control+End": ".* @499 looks at .* @499", "PageUp": ".* @499 looks at .* @479"}),
        ):  # fmt: skip
            page.locator(grid).focus()
            page.wait_for_timeout(60)  # scrolling hides the card
            for key, expected in keys.items():
                page.keyboard.press(key)
                assert re.search(expected, card(page).split("\n")[0]), (grid, key)
        for key, expected in (("End", "after layer 1"), ("PageUp", "embedding"), ("Home", "embedding")):
            assert point_at_place(page, "#norms", key).split("\n")[0] == expected


def test_one_region_speaks(open_page, paris):
    with open_page(paris) as page:
        live = page.locator("[aria-live], [role=status], [role=alert], [role=log], output")
        assert live.evaluate_all("(all) => all.map((one) => one.id)") == ["spoken"]
        page.locator("#strip .chip").nth(2).click()
        assert live.text_content() == "␣capital @2 is selected"
        page.locator("#strip .chip").nth(1).hover()
        assert live.text_content() == card(page)
        page.locator("#looks .chip").nth(4).hover()
        assert live.text_content().startswith("␣France @4 looks at")
        page.locator("#head").select_option("3")
        assert re.match(r"Layer \d+, head 3\. Gives ", live.text_content())


def test_a_card_is_made_once_for_a_cell(open_page, paris):
    with open_page(paris) as page:
        page.evaluate(
            """() => {
              window.made = 0;
              new MutationObserver((changes) => { window.made += changes.length; }).observe(card.element, { childList: true });
            }"""
        )
        for grid, x, y in (("#lens-grid", -50, -30), ("#heads-grid", -20, -8), ("#norms", -40, 60)):
            point_at(page, grid, x, y)
            before = page.evaluate("() => made")
            for _ in range(3):
                page.mouse.move(*(at + 1 for at in pointer(page, grid, x, y)))
                page.mouse.move(*pointer(page, grid, x, y))
            assert page.evaluate("() => made") == before > 0, grid
        point_at(page, "#pattern-grid", -84, -28)
        old, at = card(page), pointer(page, "#pattern-grid", -84, -28)
        page.keyboard.press("[")
        page.wait_for_timeout(100)
        page.mouse.move(at[0] + 1, at[1])
        assert card(page) != old  # the same cell of another head


# ---- the lens


def test_a_cell_tells_what_its_layer_would_say(open_page, paris, llama):
    tokens = llama.encode(CAPITAL)
    read = logit_lens(llama.model, tokens, points=[f"layers.{layer}.residual_post" for layer in (28, 29)])
    with open_page(paris) as page:
        page.locator("#lens-grid").evaluate("(grid) => { grid.scrollTop = grid.scrollHeight; }")
        for row, from_below in ((1, 10), (0, 30)):
            point_at(page, "#lens-grid", -50, -from_below)
            best = llama.tokenizer.decode([read.top_ids[row, -1, 0].item()]).replace(" ", "␣")
            assert card(page).split("\n")[0] == f"layer {28 + row}, after ␣is @5"
            assert page.locator("#card .bars .token").first.inner_text() == best
            shares = [percent(share) for share in page.locator("#card .share").all_inner_texts()]
            assert shares == pytest.approx(read.top_probabilities[row, -1].tolist(), abs=0.006)


def test_the_answer_is_seen_to_rise(open_page, paris):
    with open_page(paris) as page:
        path = page.locator("#rise-rank path").get_attribute("d")
        heights = [float(point.split(",")[1]) for point in re.split("[ML]", path)[1:]]
        assert len(heights) == 31 and min(heights[:20]) > 120 and heights[-1] == min(heights) == 10  # rank 1 is on top


def test_colours_and_cell_sizes_can_be_chosen(open_page, paris):
    with open_page(paris) as page:
        pictures = set()
        for choice in range(4):
            page.locator("#lens-colour").select_option(index=choice)
            pictures.add(page.locator("#lens-grid").screenshot())
        widths = []
        for choice in range(3):
            page.locator("#lens-size").select_option(index=choice)
            widths.append(page.locator("#lens-grid").bounding_box()["width"])
        assert len(pictures) == 4 and widths[0] > widths[1]


def test_a_selection_moves_the_columns_and_leaves_the_rows(open_page, paris, long):
    with open_page(paris, height=620) as page:
        grid = page.locator("#lens-grid")
        scrolled = "(grid) => [grid.scrollLeft, grid.scrollTop, grid.scrollTop + grid.clientHeight - grid.scrollHeight]"
        assert grid.evaluate(scrolled)[2] == pytest.approx(0, abs=1)  # scrolled to the last layer
        grid.evaluate("(grid) => { grid.scrollTop = 0; }")
        point_at(page, "#lens-grid", -300, 60)
        page.mouse.down()
        page.mouse.up()
        assert page.locator("#selected").inner_text() != "␣is @5" and grid.evaluate(scrolled)[1] == 0
        page.locator("#lens-size").select_option("1")
        assert grid.evaluate(scrolled)[2] == pytest.approx(0, abs=1)
    with open_page(long) as page:
        before = page.locator("#lens-grid").evaluate(scrolled)[0]
        page.locator("#strip .chip").nth(2).click()
        assert page.locator("#lens-grid").evaluate(scrolled)[0] < before


# ---- attention


def test_the_explorer_shows_the_pattern_of_the_head_that_is_chosen(open_page, paris, llama):
    tokens = llama.encode(CAPITAL)
    with open_page(paris) as page:
        for layer, head in ((23, 4), (3, 7)):
            page.locator("#layer").select_option(str(layer))
            page.locator("#head").select_option(str(head))
            page.get_by_text(f"Layer {layer}, head {head}: the whole pattern").wait_for()
            pattern = attention_pattern(llama.model, tokens, layer, head)
            for position in (2, 5):
                page.locator("#looks .chip").nth(position).hover()
                assert f"@{position} looks at" in page.locator("#shares h3").inner_text()
                assert shown_shares(page) == pytest.approx(pattern[position].tolist(), abs=0.006)
                texts = page.locator("#shares .share").all_inner_texts()
                ordered = pattern[position, : position + 1].sort(descending=True).values.tolist()
                assert texts == page.evaluate("(shares) => shares.map(percent)", ordered)  # to the last digit
            page.get_by_text("who looks at it", exact=True).click()
            page.locator("#looks .chip").nth(1).hover()
            assert page.locator("#shares h3").inner_text() == "The @1 is looked at by"
            assert shown_shares(page) == pytest.approx(pattern[:, 1].tolist(), abs=0.006)
            page.get_by_text("where it looks", exact=True).click()


def shown_shares(page: Any) -> list[float]:
    """The listed shares by token; 0 for tokens that are not listed."""
    shares = [0.0] * page.locator("#looks .chip").count()
    places, texts = page.locator("#shares [data-position]"), page.locator("#shares .share").all_inner_texts()
    for position, text in zip(places.evaluate_all("(all) => all.map((e) => e.dataset.position)"), texts, strict=False):
        shares[int(position)] = percent(text)
    return shares


def test_a_click_in_the_map_or_on_a_part_chooses_a_head(open_page, paris):
    with open_page(paris) as page:
        point_at(page, "#heads-grid", -10, -5)
        assert card(page).startswith("layer 29, head 8")
        page.mouse.down()
        page.mouse.up()
        assert (page.locator("#layer").input_value(), page.locator("#head").input_value()) == ("29", "8")
        page.locator("#strongest button").first.click()
        page.get_by_text("Layer 23, head 4: the whole pattern").wait_for()
        point_at(page, "#pattern-grid", -84, -28)
        assert re.search(r"␣is @5 looks at ␣France @4\s+9\d%", card(page))


# ---- attribution and the stream


def test_the_parts_add_up_in_words_and_in_bars(open_page, paris):
    with open_page(paris) as page:
        text = page.locator("#sum").inner_text().replace("−", "-")
        embedding, attention, ffn, total, logit = map(float, re.findall(r"[+-]\d+\.\d\d", text))
        assert embedding + attention + ffn == pytest.approx(total, abs=0.02) and logit == pytest.approx(total, abs=0.02)
        assert page.locator("#by-layer rect").count() == 2 * 31
        names = page.locator("#strongest .bars > :first-child, #strongest .share + *").all_inner_texts()
        assert names[0] == "layer 29 feed-forward" and "layer 23 head 4" in names
        page.locator("#by-layer svg").scroll_into_view_if_needed()
        point_at(page, "#by-layer svg", -14, 60)
        assert card(page).startswith("layer 29\n") and "feed-forward +7." in card(page)


def test_no_difference_is_none(open_page, peaked, tmp_path):
    found = overview(peaked.model, [256, 84, 104])
    same = replace(found, attribution=replace(found.attribution, logit=found.attribution.total))
    write_report(same, peaked.tokenizer, tmp_path / "report.html", model_name="Exact")
    with open_page(tmp_path / "report.html") as page:
        assert page.locator("#sum").inner_text().endswith(": the difference, 0, is rounding.")


def test_the_streams_length_can_be_read(open_page, paris):
    with open_page(paris) as page:
        lines = "(lines) => lines.map((line) => getComputedStyle(line).stroke)"
        drawn = page.locator("#cosines .dashed").evaluate_all(lines)
        assert len(drawn) == 2 and set(page.locator("#cosine-keys .dashed").evaluate_all(lines)) == set(drawn)
        assert page.locator("#norms path").count() == 2 and page.locator("#cosines path").count() == 4
        point_at(page, "#norms svg", -14, 60)
        assert re.search(r"after layer 29\s+median of all but the first: [\d.]+\s+selected token: [\d.]+", card(page))


# ---- themes


TEXTS = (
    "p, h1, h2, h3, dt, dd, a, button, select, label, figcaption, .chip, .token, .space, .share, .at, .legend span, svg text"
)
CONTRASTS = """
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const rgb = parse(getComputedStyle(at).backgroundColor);
      if (rgb.length === 3 || rgb[3] === 1) return rgb;
    }
  };
  const between = (...colours) => {
    const [low, high] = colours.map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const paper = behind(element);
    let seen = 1;
    for (let at = element; at; at = at.parentElement) seen *= getComputedStyle(at).opacity;
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    return between(ink.slice(0, 3).map((value, c) => paper[c] + seen * (value - paper[c])), paper);
  };
"""
LEAST_CONTRAST = f"""(texts) => {{{CONTRASTS}
  const shown = [...document.querySelectorAll(texts)].filter((e) => e.checkVisibility() && e.textContent && !e.disabled);
  return Math.min(...shown.map(contrast));
}}"""
LEAST_CONTRAST_OF_THE_RAMP = f"""() => {{{CONTRASTS}
  const inHex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  return Math.min(...ramp.map((rgb) => between(inHex(inkOn(rgb)), rgb)));
}}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read_and_the_button_changes_between_them(open_page, paris, scheme):
    with open_page(paris, scheme=scheme) as page:
        first = page.screenshot()
        assert is_dark(first) == (scheme == "dark")
        read_everything(page)
        page.locator("#theme").click()
        second = page.screenshot()
        assert is_dark(second) != is_dark(first)
        read_everything(page)


def read_everything(page: Any) -> None:
    """Check that all texts have a contrast of 4.5, also on any shade of the colour scale."""
    page.locator("#strip .chip").nth(4).hover()
    assert page.locator("#card .actual").count() <= 1 and page.locator("#card").is_visible()
    assert page.evaluate(LEAST_CONTRAST, TEXTS) >= 4.5
    assert page.evaluate(LEAST_CONTRAST_OF_THE_RAMP) >= 4.5


def is_dark(png: bytes) -> bool:
    from matplotlib.image import imread

    return imread(io.BytesIO(png))[..., :3].mean() < 0.5


# ---- sizes


def test_500_tokens_scroll_and_answer(open_page, long, long_tokens, peaked):
    found = overview(peaked.model, long_tokens, bos=peaked.tokenizer.bos_id)
    with open_page(long) as page:
        assert page.locator("*").count() < 20_000
        assert page.locator("#strip .chip").count() == 501
        page.locator("#strip .chip").nth(321).hover()
        assert f"position 321 · id {long_tokens[321]} · " in card(page)
        page.locator("#lens-size").select_option("0")  # 86 pixels a cell
        seen = []
        for column in (0, 250, 490):
            page.locator("#lens-grid").evaluate("(grid, left) => { grid.scrollLeft = left; }", 86 * column)
            point_at(page, "#lens-grid", 130, -30)
            seen.append(int(re.search(r"after .*@(\d+)\n", card(page)).group(1)))
        assert seen[0] == 0 and seen[1] == 250 and seen[2] > 480
        page.locator("#lens-size").select_option("2")
        assert page.locator("#lens-grid").evaluate("(grid) => grid.scrollWidth <= grid.clientWidth")
        page.locator("#looks .chip").nth(400).hover()
        kept = found.patterns.unpack(int(page.locator("#layer").input_value()), int(page.locator("#head").input_value()))[400]
        best = [share for share in kept.topk(8).values.tolist() if share]
        shares = [percent(text) for text in page.locator("#shares .share").all_inner_texts()]
        assert shares[: len(best)] == pytest.approx(best, abs=0.006) and sum(shares) == pytest.approx(1, abs=0.02)
        opened = page.evaluate("() => performance.getEntriesByType('navigation')[0].domComplete")
        assert opened < 10_000  # milliseconds; half a second on a quiet machine


@pytest.mark.parametrize("which", ["paris", "long"])
def test_a_narrow_window_has_nothing_beside_it(open_page, which, request):
    with open_page(request.getfixturevalue(which), width=400, height=800) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") == 400
        page.locator("#strip .chip").nth(3).hover()
        box = page.locator("#card").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
        page.set_viewport_size({"width": 900, "height": 800})
        page.wait_for_selector('#norms svg:not([viewBox="0 0 368 190"])')  # redrawn for the new width


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A page with every optional section of a text, whose names and tokens have no place to break."""
    folder = tmp_path_factory.mktemp("unbroken")
    model = Llama.build(tiny_folder(folder / "Tiny"), device="cpu", dtype="float32", max_seq_len=64).model
    vocabulary = byte_tokenizer(folder / "with_a_long_token")
    with vocabulary.open("ab") as file:
        file.write(base64.b64encode(b"W" * 200) + b" 256\n")
    tokens = [257, 256, *"서울".encode(), *b"withoutspaces", 256]
    other, metric, over = [*tokens[:-1], 65], study.logit_difference(256, 65), "layer,position,head"
    exact, estimate = (make(model, tokens, other, metric, over) for make in (study.patch_grid, study.attribution_patch))
    features = study.open_features(feature_folders.sparsify(folder, model.args.dim, 64, k=5).path)
    seen = replace(
        overview(model, tokens, ids=range(257), target=256),
        features=replace(study.firing(model, features, tokens), name="F" * 200),
        saliency=study.saliency(model, tokens, 256, other=65, positions=range(1, len(tokens)), steps=2),
        patched=GridPair(exact, estimate, tokens, other, 256, 65),
    )
    write_report(seen, Tokenizer(vocabulary), folder / "page.html", model_name="M" * 300)
    return folder / "page.html"


@pytest.mark.parametrize("width", [400, 1240])
def test_long_words_do_not_widen_the_page(open_page, unbroken, width):
    too_wide = """() => [...document.querySelectorAll("main, p, h1, h2, h3, dd, figcaption, .legend, .controls, .card")]
      .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth && e.clientWidth).map((e) => e.outerHTML)"""
    with open_page(unbroken, width=width) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        point_at_place(page, "#exact-grid", "Control+Home")
        assert "W" * 200 in point_at_place(page, "#exact-grid", "ArrowRight") and page.evaluate(too_wide) == []
        text = page.locator("#patching-lead").inner_text()
        assert text.startswith(f"The corrupted text is <|begin_of_text|>│{'W' * 200}│<0xEC>│") and "│s│A. A cell" in text


# ---- on paper

PRINTED = """() => ({
  theme: document.documentElement.dataset.theme ?? null,
  scrolled: [...document.querySelectorAll(".grid, .strip")].map((box) => [box.scrollLeft, box.scrollTop]),
  widths: [...document.querySelectorAll(".grid, .chart svg")].map((box) => box.getBoundingClientRect().width),
})"""
LAYOUT_ON_PAPER = """() => {
  const canvas = document.querySelector("#lens-grid canvas");
  const view = (grid) => grid.scrollWidth <= grid.clientWidth && grid.scrollHeight <= grid.clientHeight;
  window.onPaper = {
    dots: canvas.width / canvas.clientWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    whole: [...document.querySelectorAll(".grid, .strip")].every(view),
    width: Math.max(...[...document.querySelectorAll("main *")].map((e) => e.getBoundingClientRect().right)),
    left: document.querySelector("main").getBoundingClientRect().left,
    cut: document.querySelector("#lens-cut").hidden ? null : document.querySelector("#lens-cut").textContent,
    answer: [...canvas.getContext("2d").getImageData(canvas.width - 14, canvas.height - 11, 1, 1).data].slice(0, 3),
    shade: shade(data.lens.top_probabilities.at(-1).at(-1)[0]),
  };
}"""


@pytest.mark.parametrize(("which", "scheme", "pages"), [("paris", "dark", 7), ("long", "light", 11), ("long", "dark", 11)])
def test_paper_is_light_and_holds_all_that_fits(open_page, which, scheme, pages, request):
    with open_page(request.getfixturevalue(which), scheme=scheme) as page:
        page.locator("#strip .chip").nth(4).hover()
        before = page.evaluate(PRINTED)
        page.evaluate(f"() => addEventListener('beforeprint', {LAYOUT_ON_PAPER})")  # after the page's own
        pdf = page.pdf()
        assert page.evaluate(PRINTED) == before
        found = page.evaluate("() => onPaper")
        assert found["dots"] == 2 and found["whole"] and found["paper"] == "rgb(255, 255, 255)"
        assert found["width"] - found["left"] <= 43 * 16 + 1
        assert found["answer"] == found["shade"]  # the last cell's, in the light theme
        assert (found["cut"] or "").startswith("Only the last 13 of 500 tokens" if which == "long" else "")
        assert 3 <= len(re.findall(rb"/Type /Page\b", pdf)) <= pages
        page.emulate_media(media="print", color_scheme=scheme)
        for selector in (".bar", "button:not(.chip):not(.bars button)", "#lens-size", ".doing"):
            assert not any(one.is_visible() for one in page.locator(selector).all()), selector
        adjusted = page.evaluate("() => getComputedStyle(document.querySelector('.chip')).printColorAdjust")
        assert adjusted == "exact"


# ---- what may go wrong


ATTACKS = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\u202e&amp;\u2028\0"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_text_is_only_ever_text(open_page, peaked, tmp_path, attack):
    with open_page(write(peaked, [256, *attack.encode()], tmp_path, attack)) as page:
        shown = page.locator("#strip .chip").all_inner_texts()[1:-1]
        assert len(shown) == len(attack.encode()) and "".join(shown).startswith(attack[0] if attack[0] == "<" else "<0xE2>")
        assert page.locator("h1").inner_text().startswith(attack[:8].strip()) and page.locator("img").count() == 0
        page.locator("#strip .chip").nth(1).hover()


def test_the_policy_stops_what_is_not_the_pages_own(browser, paris):
    context = browser.new_context()
    page, answered = context.new_page(), []
    page.on("response", lambda response: answered.append(response.url))
    page.goto(paris.as_uri())
    refused = page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          const image = new Image();
          image.src = "http://127.0.0.1:9/picture";
          document.body.append(script, image);
          document.body.setAttribute("onclick", "window.ran = true");
          document.body.setAttribute("style", "color: red");
          document.body.click();
          await fetch("http://127.0.0.1:9/data").catch(() => null);
          await new Promise((resolve) => setTimeout(resolve, 200));
          return refused;
        }"""
    )
    assert set(refused) == {"script-src-elem", "script-src-attr", "style-src-attr", "img-src", "connect-src"}
    assert page.evaluate("() => window.ran") is None and answered == [paris.as_uri()]
    context.close()


@pytest.mark.parametrize(
    ("broken", "ranks"), [("layers.0.feed_forward.w2.weight", 1), ("norm.weight", 0), ("tok_embeddings.weight", 0)]
)
def test_numbers_that_are_none_are_drawn_as_missing(open_page, tmp_path, broken, ranks):
    llama = Llama.build(tiny_folder(tmp_path / "NaN"), device="cpu", dtype="float32", max_seq_len=64)
    llama.model.get_parameter(broken).data[..., 0] = torch.nan
    (tmp_path / "page").mkdir()
    with open_page(write(llama, [256, 84, 104, 101], tmp_path / "page")) as page:
        assert page.locator("#warning").is_visible()
        assert "No attribution: " in page.locator("#sum").inner_text()
        assert page.locator("#attribution-pictures").is_hidden()
        point_at(page, "#lens-grid", -20, -10)
        assert "rank –" in card(page) and "entropy –" in card(page)
        assert page.locator("#rise-rank .dot").count() == ranks  # the embedding's at most
        assert page.locator("#cosines svg").count() == 1  # the last section is drawn
        if broken != "norm.weight":  # which attention does not use
            page.locator("#layer").select_option("1")
            page.locator("#looks .chip").nth(2).hover()
            assert set(page.locator("#shares .share").all_inner_texts()) == {"–"}


def test_a_single_token_has_a_page(open_page, peaked, tmp_path):
    with open_page(write(peaked, [256], tmp_path)) as page:
        assert page.locator("#lead").inner_text().startswith("What the model makes of a text of one token")
        assert shown_shares(page) == [1.0]


# ---- the image


@pytest.fixture(scope="module")
def found_in_image() -> Overview:
    return overview(random_vision_model(), [65, IMAGE, 66, 67, 68], ids=range(256), image=picture(112, 56))


@pytest.fixture(scope="module")
def seeing(found_in_image, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    write_report(found_in_image, Tokenizer(byte_tokenizer(folder / "bytes")), folder / "page.html", model_name="Seeing")
    return folder / "page.html"


def image_shares(page: Any) -> tuple[list[str], list[float]]:
    """Names and shares of the list beside the image."""
    rows = page.locator("#image-shares .bars")
    names = rows.locator("> span:nth-child(3n + 1)").all_inner_texts()
    return names, [percent(share) for share in rows.locator(".share").all_inner_texts()]


def test_the_image_is_shaded_where_the_selected_token_looks(open_page, seeing, found_in_image):
    image = found_in_image.image
    with open_page(seeing) as page:
        page.wait_for_selector("#image-shares h3")
        assert page.locator("#image-shares h3").inner_text() == "D @4 looks at"
        names, shares = image_shares(page)
        patches, places = image.patches[:, 4].mean(0), torch.arange(6)
        strongest = patches.flatten().sort(descending=True)
        middles = [image.center(*divmod(i, 8)) for i in strongest.indices[:6].tolist()]
        assert names[:6] == [f"at ({x:.0f}, {y:.0f})" for x, y in middles]
        assert names[6:] == ["other patches", "class tokens", "beside the image"]
        assert shares[:6] == pytest.approx(strongest.values[places].tolist(), abs=0.006)
        rest = [float(strongest.values[6:].sum()), float(image.class_tokens[:, 4].mean()), float(image.beside[:, 4].mean())]
        assert shares[6:] == pytest.approx(rest, abs=0.006)


def test_another_layer_and_token_of_the_image_can_be_chosen(open_page, seeing, found_in_image):
    image = found_in_image.image
    with open_page(seeing) as page:
        page.wait_for_selector("#image-shares h3")
        options = page.locator("#image-layer option").all_inner_texts()
        assert options == ["mean over layers", "cross layer 0 (before layer 1)", "cross layer 1 (before layer 3)"]
        painted = page.locator("#image-picture canvas").evaluate("(canvas) => canvas.toDataURL()")
        page.locator("#image-layer").select_option("2")
        assert page.locator("#image-picture canvas").evaluate("(canvas) => canvas.toDataURL()") != painted
        assert image_shares(page)[1][0] == pytest.approx(float(image.patches[1, 4].max()), abs=0.006)
        page.locator("#image-looks .chip").nth(2).hover()
        assert page.locator("#image-shares h3").inner_text() == "B @2 looks at"
        assert image_shares(page)[1][0] == pytest.approx(float(image.patches[1, 2].max()), abs=0.006)
        page.locator("#image-looks .chip").nth(0).hover()
        assert "It does not see the image." in page.locator("#image-shares").inner_text()
        page.locator("#image-looks .chip").nth(3).click()
        assert page.locator("#selected").inner_text() == "C @3"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_patch_that_is_looked_at_is_stronger_in_the_picture(open_page, tmp_path, found_in_image, scheme):
    """One patch has all the attention: only its part of the canvas has another colour than the pale image."""
    image = found_in_image.image
    only = torch.zeros_like(image.patches)
    only[:, 1:, 1, 6] = 1
    grey = torch.full_like(image.pixels, 128)
    found = replace(found_in_image, image=replace(image, patches=only, pixels=grey))
    write_report(found, Tokenizer(byte_tokenizer(tmp_path / "bytes")), tmp_path / "page.html", model_name="Seeing")
    with open_page(tmp_path / "page.html", scheme=scheme) as page:
        page.wait_for_selector("#image-shares h3")
        colours = page.locator("#image-picture canvas").evaluate(
            """(canvas) => {
                const { width, height } = canvas;
                const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
                return Array.from({ length: 32 }, (_, i) => {
                    const [x, y] = [((i % 8) + 0.5) * width / 8, (Math.floor(i / 8) + 0.5) * height / 4].map(Math.floor);
                    return data.slice(4 * (y * width + x), 4 * (y * width + x) + 3).join();
                });
            }"""
        )
        differing = [i for i, colour in enumerate(colours) if colour != colours[0]]
        assert differing == [8 + 6]


def test_a_page_of_a_text_alone_has_no_image(open_page, paris):
    with open_page(paris) as page:
        assert page.locator("#image, #image-link").count() == 0


def test_the_image_is_a_part_of_the_logit(open_page, seeing):
    with open_page(seeing) as page:
        assert "the image" in page.locator("#sum").inner_text()
        assert page.locator("#by-layer rect.cross").count() == 2
        page.locator("#strip .chip").nth(1).hover()
        assert "The place of an image, which the model does not predict." in card(page)


# ---- features


@pytest.fixture(scope="module")
def fired(peaked, tmp_path_factory) -> tuple[Path, study.Firing]:
    """A page with the features of a random autoencoder, and these features."""
    folder = tmp_path_factory.mktemp("fired")
    features = study.open_features(
        feature_folders.sparsify(folder, peaked.model.args.dim, 4 * peaked.model.args.dim, k=20).path
    )
    tokens = [256, *b"The capital of"]
    found = study.firing(peaked.model, features, tokens)
    seen = overview(peaked.model, tokens, ids=range(256))
    write_report(replace(seen, features=found), peaked.tokenizer, folder / "report.html", model_name="A model")
    return folder / "report.html", found


def test_the_features_of_a_token_and_where_else_one_fires(open_page, fired):
    path, found = fired
    with open_page(path) as page:
        lead = page.locator("#features-lead").inner_text()
        assert lead.startswith("layers.1 (sparsify): ") and "features of layers.1.residual_post. 20.0 fire at a token." in lead
        last = len(found.tokens) - 1
        listed = page.locator("#features-list button").all_inner_texts()
        assert listed == [str(feature) for feature, _ in found.active.at(last, 12)]
        assert "… and 8 more" in page.locator("#features-list").inner_text()
        page.locator("#features-strip .chip").nth(3).hover()
        assert page.locator("#features-list h3").inner_text() == "Features at e @3"
        values = [float(text) for text in page.locator("#features-list .share").all_inner_texts()]
        assert values == pytest.approx([value for _, value in found.active.at(3, 12)], rel=0.006)
        page.mouse.move(5, 5)
        feature = int(page.locator("#features-list button").nth(4).inner_text())
        page.locator("#features-list button").nth(4).click()
        assert f"feature {feature}" in page.locator("#features-legend").inner_text()
        own = found.active.dense()[:, feature]
        shaded = page.locator("#features-strip .chip").evaluate_all(
            "(all) => all.map((one) => one.style.backgroundColor !== '')"
        )
        assert shaded == (own != 0).tolist() and 0 < sum(shaded) < len(shaded)


def test_a_page_without_features_has_no_section_of_them(open_page, paris):
    with open_page(paris) as page:
        assert page.locator("#features").count() == page.locator("#features-link").count() == 0


def test_features_of_another_text_are_refused(peaked, fired, tmp_path):
    seen = overview(peaked.model, [256, 65], ids=range(256))
    with pytest.raises(RequestError, match="the features have other tokens"):
        write_report(replace(seen, features=fired[1]), peaked.tokenizer, tmp_path / "a.html", model_name="A model")


# ---- optional sections


def test_saliency_and_grids_have_sections_where_they_were_measured(peaked, paris, open_page, tmp_path):
    model, tokens, other = peaked.model, peaked.encode("the cat"), peaked.encode("the dog")
    metric = study.log_probability(115)
    shares = study.saliency(model, tokens, 115, positions=range(1, len(tokens)), steps=4)
    exact, estimate = (make(model, tokens, other, metric) for make in (study.patch_grid, study.attribution_patch))
    pair = GridPair(exact, estimate, tokens, other, 115, None, measure="log-probability")
    seen = replace(overview(model, tokens, bos=256, target=115), saliency=shares, patched=pair)
    write_report(seen, peaked.tokenizer, tmp_path / "a.html", model_name="A model")
    with open_page(tmp_path / "a.html") as page:
        assert "Which tokens made the logit of s" in page.locator("#saliency h2").inner_text()
        assert page.locator("#saliency-strip .chip").count() == len(tokens)
        best = max(range(len(tokens)), key=lambda position: abs(float(shares.shares[position])))
        assert page.locator("#saliency-strongest .bars > :first-child").inner_text().endswith(f"@{best}")
        summary = page.locator("#patching-sum").inner_text()
        assert "The log-probability of s is" in summary and f"{estimate.agreement(exact).correlation:.2f}" in summary
        point_at(page, "#estimate-grid", 60, 32)
        assert "layer 0" in card(page) and "exact" in card(page) and "estimate" in card(page)
        assert page.locator("#patching-grids .grid").count() == 2 and page.locator("#patching-controls").is_hidden()
    with open_page(paris) as page:
        assert page.locator("#saliency").count() == page.locator("#patching-link").count() == 0


def test_a_grid_of_positions_and_heads_shows_the_heads_at_the_chosen_token(peaked, open_page, tmp_path):
    model, tokens, other = peaked.model, peaked.encode("the cat"), peaked.encode("the dog")
    metric, over = study.log_probability(115), "layer,position,head"
    exact, estimate = (make(model, tokens, other, metric, over) for make in (study.patch_grid, study.attribution_patch))
    pair = GridPair(exact, estimate, tokens, other, 115, None, measure="log-probability")
    seen = replace(overview(model, tokens, bos=256, target=115), patched=pair)
    write_report(seen, peaked.tokenizer, tmp_path / "a.html", model_name="A model")

    def written(share: float) -> str:
        return f"{share:+.2f}".replace("-", "−")

    with open_page(tmp_path / "a.html") as page:
        assert "of one layer, position and head from" in page.locator("#patching-lead").inner_text()
        assert page.locator("#patching-grids .grid").count() == 4
        chosen = page.locator("#patching-token")
        assert chosen.input_value() == str(len(tokens) - 1) and "d @5" in chosen.locator("option").all_inner_texts()
        for position in (6, 5):
            chosen.select_option(str(position))
            assert page.locator("#selected").inner_text().endswith(f"@{position}")
            point_at(page, "#exact-heads", 60, 32)
            assert "layer 0, head 0" in card(page)
            assert f"exact {written(exact.restored[0, position, 0])} of" in card(page)
            assert f"estimate {written(estimate.restored[0, position, 0])} of" in card(page)
        point_at(page, "#exact-grid", -20, 32)  # the last position
        strongest = int(abs(exact.restored[0, 7]).argmax())
        assert f"exact {written(exact.restored[0, 7, strongest])} of the difference by head {strongest}" in card(page)
        page.mouse.click(*pointer(page, "#exact-grid", -20, 32))
        assert [page.locator(f"#{name}").input_value() for name in ("layer", "head", "patching-token")] == [
            "0",
            str(strongest),
            "7",
        ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_below_0_have_colours_of_their_own(peaked, open_page, tmp_path, scheme):
    model, tokens, other = peaked.model, peaked.encode("the cat"), peaked.encode("the dog")
    found = study.patch_grid(model, tokens, other, study.log_probability(115), "layer,head")
    shares = np.array([[-1.2, -1, -0.5, -0.18], [0, 0.18, 0.5, 1]])
    exact = replace(found, values=found.corrupted + shares * (found.clean - found.corrupted))
    pair = GridPair(exact, None, tokens, other, 115, None, measure="log-probability")
    seen = replace(overview(model, tokens, bos=256, target=115), patched=pair)
    write_report(seen, peaked.tokenizer, tmp_path / "a.html", model_name="A model")
    corners = """(canvas) => {
      const { width, height, clientWidth } = canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
      return [37, 57].map((y) => [3, 2, 1, 0].map((right) => {
        const [column, row] = [clientWidth - 64 * right - 6, y].map((at) => Math.floor((at * width) / clientWidth));
        return [...data.slice(4 * (row * width + column))].slice(0, 3);
      }));
    }"""
    with open_page(tmp_path / "a.html", scheme=scheme) as page:
        below, above = page.locator("#exact-grid canvas").evaluate(corners)
        assert below[0] == below[1]  # colours end at -100%
        assert all(a != b for a, b in itertools.combinations(below[1:] + above, 2))
        assert all(red > blue for red, _, blue in below) and all(red < blue for red, _, blue in above[1:3])
        legend = page.locator("#patching-legend")
        assert legend.inner_text().split() == ["restored", "−100%", "100%"]
        ends = legend.locator(".ramp").evaluate("(ramp) => getComputedStyle(ramp).backgroundImage.match(/rgb[^)]*[)]/g)")
        assert [ends[0], ends[-1]] == [f"rgb({', '.join(map(str, rgb))})" for rgb in (below[0], above[3])]
