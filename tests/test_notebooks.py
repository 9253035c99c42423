"""docs/notebooks: each page's blocks print the output shown, and its notebook is made from it."""

import re

import nbformat
import pytest

import notebooks
import tour
from conftest import REPOSITORY

PAGES = notebooks.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_shows(page, demo_folder, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    shown = tour.parse(page.read_text(encoding="utf-8"))
    assert [part.output for part in notebooks.executed(page)] == [part.output for part in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_is_that_of_the_page(page):
    text = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == notebooks.notebook(page)
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert len(text) < 30_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_says_what_is_not_run(page):
    text = page.read_text(encoding="utf-8")
    assert "\n## On Llama 3\n\nNot run here" in text and len(text.split()) < 900
    blocks = [part.text for part in tour.parse(text) if part.is_code]
    assert len(blocks) >= 4 and max(len(block.splitlines()) for block in blocks) <= 30
    linked = REPOSITORY / "docs" / "study.md"
    assert f"notebooks/{page.name}" in linked.read_text(encoding="utf-8")


def test_there_are_three_findings_that_hold():
    """The numbers that the prose relies on."""
    one, name, direction = (
        (notebooks.PAGES / f"{stem}.md").read_text(encoding="utf-8")
        for stem in ("one-number", "who-carries-the-name", "a-direction")
    )
    losses = {int(d): float(x) for d, x in re.findall(r"^dimension +(\d+): loss ([\d.]+)", one, re.MULTILINE)}
    assert losses.pop(507) > 10 and max(losses.values()) < 4.5
    weights = [float(x) for x in re.findall(r"loss without it ([\d.]+)", one)]
    assert weights[0] > 6 and max(weights[1:]) < 4.5
    assert float(re.search(r"correlation ([\d.]+)", name)[1]) > 0.9
    shares = [int(x) for x in re.findall(r"edges: (\d+)%", name)]
    assert shares == sorted(shares) and shares[-1] > 60
    steered = re.findall(r"× direction: ([+-][\d.]+); three random ones: (.+)", direction)
    assert len(steered) == 2
    assert all(abs(float(own)) > 2 * max(abs(float(x)) for x in others.split()) for own, others in steered)
