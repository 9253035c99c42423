"""The study's pictures: the data are right, tokens are legible, files are written atomically."""

import errno
import importlib.util
import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from corpus import CODE, ODD, PROSE
from folders import tiny_folder
from llama_ref.bench.roofline import check_picture
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.study.analyses.attention import AttentionSummary, attention_pattern
from llama_ref.study.analyses.attribution import Attribution
from llama_ref.study.analyses.logit_lens import LogitLens, logit_lens, residual_points
from llama_ref.study.analyses.overview import overview
from llama_ref.study.analyses.residual import ResidualStream
from llama_ref.study.figures import (
    check_pictures,
    draw_attention,
    draw_attribution,
    draw_grid,
    draw_image_attention,
    draw_image_layers,
    draw_lens,
    draw_norms,
    draw_overview,
    draw_pattern,
    draw_target,
    fonts,
    saving,
)
from llama_ref.study.figures.attention import attention_figure, layer_figure, pattern_figure
from llama_ref.study.figures.attribution import attribution_figure
from llama_ref.study.figures.canvas import TALLEST, WIDEST, depths
from llama_ref.study.figures.grid import grid_figure
from llama_ref.study.figures.image_attention import layers_figure, tokens_figure
from llama_ref.study.figures.lens import LEAST, MOST_WORDS, lens_figure, target_figure
from llama_ref.study.figures.residual import norms_figure
from llama_ref.study.patching.grid import Grid, GridPair
from llama_ref.study.vision.image_attention import ImageAttention
from llama_ref.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns about missing glyphs, and draws boxes

LAYERS, HEADS = 3, 4
STRANGE = ["$x$", "_foo", "\\n", "%", "100%", "{", "^2", "\\frac", "`", "~", "&", "#", "a_b", "$", "\\", "\u200d", "\u202eabc"]


@pytest.fixture(autouse=True)
def silent(caplog):
    """Fail on warnings in matplotlib's log: it reports missing fonts there."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("matplotlib")]


@pytest.fixture
def only_dejavu(monkeypatch):
    """Simulate a machine that has only matplotlib's fonts."""
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name.startswith("DejaVu")])
    fonts._find_family.cache_clear()
    yield
    fonts._find_family.cache_clear()


@pytest.fixture
def korean_font(only_dejavu, tmp_path) -> str:
    """The name of a font that has only the letter 한."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "han", "blank"])
    builder.setupCharacterMap({ord("한"): "han", ord("국"): "blank"})
    empty = TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": empty, "han": pen.glyph(), "blank": empty})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "han": (1000, 100), "blank": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Hangul of One Letter", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "han.ttf")
    fontManager.addfont(tmp_path / "han.ttf")  # `only_dejavu` restores the list of fonts afterwards
    return "Hangul of One Letter"


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def a_lens(tokens: list[int], target: int | None = None) -> LogitLens:
    P, T = 2 * LAYERS + 1, len(tokens)
    seen = {} if target is None else {"target_probability": rand(P, T) ** 20, "target_rank": (rand(P, T) * 900).long() + 1}
    top = (rand(P, T, 2) * 90_000).long()
    return LogitLens(
        *(tokens, list(range(T)), residual_points(LAYERS), top, rand(P, T, 2), rand(P, T), rand(P, T), target), **seen
    )


def a_summary(tokens: list[int]) -> AttentionSummary:
    nothing = torch.full((LAYERS, HEADS), torch.nan)
    measures = [rand(LAYERS, HEADS) if len(tokens) > n else nothing for n in (1, 2, 1)]
    return AttentionSummary(tokens, *measures, rand(LAYERS, HEADS))


def an_attribution(tokens: list[int], other: int | None = None) -> Attribution:
    heads, ffns = rand(LAYERS, HEADS) - 0.5, rand(LAYERS) - 0.3
    found = Attribution(tokens, len(tokens) - 1, 40, other, 0.0, 0.25, heads, ffns)
    return Attribution(tokens, len(tokens) - 1, 40, other, found.total, 0.25, heads, ffns)


def a_stream(tokens: list[int]) -> ResidualStream:
    P, T = 2 * LAYERS + 1, len(tokens)
    return ResidualStream(tokens, residual_points(LAYERS), 1 + rand(P, T), rand(P, T), rand(P, T))


def a_grid(axis: str, n: int, clean: float = 2.0, corrupted: float = -1.0) -> Grid:
    labels = ([str(i) for i in range(LAYERS)], [str(i) for i in range(n)])
    return Grid(4 * rand(LAYERS, n).numpy() - 1.5, ("layer", axis), labels, "residual_pre", clean, corrupted)


def draw_all(folder: Path, tokens: list[int], tokenizer: Tokenizer) -> list[Path]:
    """Draw every picture of a text."""
    other, T = tokens[::-1], len(tokens)
    paths = [
        folder / f"{name}.png" for name in ("lens", "followed", "target", "heads", "layer", "head", "parts", "norms", "grid")
    ]
    draw_lens(a_lens(tokens), tokenizer, paths[0])
    draw_lens(a_lens(tokens, target=tokens[-1]), tokenizer, paths[1])
    draw_target(a_lens(tokens, target=tokens[-1]), tokenizer, paths[2])
    draw_attention(a_summary(tokens), tokenizer, paths[3])
    draw_attention(a_summary(tokens), tokenizer, paths[4], layer=1)
    draw_pattern(rand(T, T).tril(), tokens, tokenizer, 1, 2, paths[5])
    draw_attribution(an_attribution(tokens, other=tokens[0]), tokenizer, paths[6])
    draw_norms(a_stream(tokens), tokenizer, paths[7])
    grid = a_grid("position", T)
    draw_grid(grid, GridPair(grid, None, tokens, other, tokens[0], tokens[-1]), tokenizer, paths[8])
    return paths


def texts(figure: Figure) -> list[str]:
    """All texts in a figure except tick labels."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_visible()]


def framed(axes) -> set[tuple[int, int]]:
    """(column, row) of each framed cell."""
    (frames,) = axes.collections
    return {tuple((path.vertices.min(0) + 0.5).astype(int).tolist()) for path in frames.get_paths()}


def names(axes, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]


# ---- the files


@pytest.mark.parametrize("n", [1, 150])
def test_every_picture_is_a_png_that_a_screen_can_show(tmp_path, tokenizer, n):
    text = "\n".join([*PROSE.values(), *CODE.values()])
    for path in draw_all(tmp_path / "made" / "here", tokenizer.encode(text, bos=True, eos=False)[:n], tokenizer):
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82"), path
        assert 800 <= width <= WIDEST * 150 and 300 <= height <= TALLEST * 150, path
    assert len(list((tmp_path / "made" / "here").iterdir())) == 9


def test_the_same_data_are_the_same_bytes_whatever_a_matplotlibrc_says(tmp_path, tokenizer):
    import matplotlib

    for name, own in (("plain", {}), ("own", {"text.usetex": True, "font.size": 30, "axes.facecolor": "red"})):
        with matplotlib.rc_context(own):
            draw_target(a_lens([1, 2, 3], target=5), tokenizer, tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "own").read_bytes()


@pytest.mark.parametrize("what", ["write", "flush"])
def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, tokenizer, monkeypatch, what):
    path = tmp_path / "norms.png"
    path.write_bytes(b"the old one")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*arguments):
        raise full

    monkeypatch.setattr(*((os, "fsync") if what == "flush" else (Path, "open")), refuse)
    with pytest.raises(RequestError, match=r"cannot write .*norms.png: No space left on device; free some space"):
        draw_norms(a_stream([1, 2]), tokenizer, path)
    monkeypatch.undo()
    assert path.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_checked_before_anything_is_loaded_and_made_by_the_first_picture(tmp_path, tokenizer):
    new = tmp_path / "a" / "b"
    check_pictures(str(new))
    assert not any(tmp_path.iterdir()), "a command may yet be refused"
    draw_norms(a_stream([1, 2]), tokenizer, new / "norms.png")
    check_pictures(new)
    assert [path.name for path in new.iterdir()] == ["norms.png"]
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("round")
    for bad, message in (
        (tmp_path / "file", "which is a file, expected a folder"),
        (tmp_path / "file" / "below", "nothing can be written there: Not a directory"),
        (tmp_path / "round", "nothing can be written there: Too many levels of symbolic links"),
        (tmp_path / "new" / ("x" * 300) / "below", "nothing can be written there: File name too long"),
        (tmp_path / "/".join(["x" * 200] * 19) / ("x" * (4090 - 201 * 19 - len(str(tmp_path)))), "File name too long"),
        (tmp_path / "one.png", "expected a folder: there are several pictures"),
        ("zero\0byte", "nothing can be written there"),
        ("~nobody-of-this-name/x", "nothing can be written there"),
        ("x" * 300, "nothing can be written there: File name too long"),
        ("", "expected a folder"),
        (True, "png is True, expected a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            check_pictures(bad)


@pytest.mark.parametrize(("check", "name"), [(check_pictures, ""), (check_picture, "roofline.png")])
def test_where_matplotlib_is_missing_it_is_told_how_to_get_it(tmp_path, monkeypatch, check, name):
    check(tmp_path / name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"--png needs matplotlib, .*: pip install matplotlib, or leave --png out"):
        check(tmp_path / name)


def test_a_matplotlib_that_does_not_work_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise AttributeError('numpy has no attribute matrix')")
    code = "from llama_ref.pictures import check_matplotlib; check_matplotlib()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RequestError: --png needs matplotlib, which is installed but does not work (numpy has no attribute" in done.stderr


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, tokenizer, is_there):
    real = tmp_path / "elsewhere" / "real.png"
    if is_there:
        real.parent.mkdir()
        real.write_bytes(b"the old one")
    (tmp_path / "norms.png").symlink_to(real)
    (tmp_path / "folder").symlink_to(tmp_path / "new")
    check_pictures(tmp_path / "folder")
    draw_norms(a_stream([1, 2]), tokenizer, tmp_path / "norms.png")
    draw_norms(a_stream([1, 2]), tokenizer, tmp_path / "folder" / "norms.png")
    assert (tmp_path / "norms.png").is_symlink() and real.read_bytes() == (tmp_path / "new" / "norms.png").read_bytes()
    assert real.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_may_not_be_written_is_refused(unprivileged_folder):
    unprivileged_folder.chmod(0o500)
    for path in (unprivileged_folder, unprivileged_folder / "below"):
        with pytest.raises(RequestError, match=f"{unprivileged_folder} is not writable: choose another folder"):
            check_pictures(path)
    with pytest.raises(RequestError, match=r"cannot write .*Permission denied; choose another folder"):
        saving.save(unprivileged_folder / "a.png", Figure)


# ---- what is drawn


def test_the_lens_is_a_map_of_layers_and_positions_with_a_word_in_every_cell(tokenizer):
    tokens = tokenizer.encode("The capital of France is", bos=True, eos=False)
    found, ends = a_lens(tokens), [0, 2, 4, 6]
    found.top_ids[2, 4, 0] = found.top_ids[6, 4, 0]
    axes = lens_figure(found, tokenizer).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), found.top_probabilities[ends, :, 0])
    assert names(axes, "y") == ["embedding", "0", "1", "2"]
    assert names(axes, "x")[1:] == ["The", "␣capital", "␣of", "␣France", "␣is"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(cells) == 4 * 6
    for (column, row), word in cells.items():
        said = fonts.token_label(tokenizer, found.top_ids[ends[row], column, 0].item(), 99)
        assert word == said or (word[-1] == "…" and said.startswith(word[:-1]))
    assert framed(axes) == {*((column, 3) for column in range(6)), (4, 1)}, "where it is what the last layer says"


def test_a_lens_with_a_target_is_coloured_by_it_and_frames_it(tokenizer):
    found = a_lens([1, 2, 3], target=7)
    found.top_ids[6, 1, 0] = 7
    found.target_probability[0, 0] = 1e-30
    axes, bar = lens_figure(found, tokenizer).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), found.target_probability[::2].clamp(min=LEAST))
    assert framed(axes) == {(1, 3)}
    assert bar.get_ylabel() == f"probability of “{fonts.token_label(tokenizer, 7)}”"


def test_a_long_text_is_shown_whole_and_its_end_with_words(tokenizer):
    tokens = list(range(1000, 1200))
    found = a_lens(tokens)
    whole, end = lens_figure(found, tokenizer).axes[:2]
    np.testing.assert_array_equal(whole.images[0].get_array(), found.top_probabilities[::2, :, 0])
    np.testing.assert_array_equal(end.images[0].get_array(), found.top_probabilities[::2, -MOST_WORDS:, 0])
    assert len(whole.texts) == 0 and len(end.texts) == 4 * MOST_WORDS
    assert len(names(end, "x")) == MOST_WORDS
    assert [name.rpartition("@")[2] for name in names(whole, "x")] == [str(i) for i in range(0, 200, 2)]


def test_positions_and_points_may_be_some(tokenizer):
    found = a_lens([1, 2, 3], target=9)
    some = LogitLens(
        *(found.tokens, [2], found.points[::2], found.top_ids[::2, 2:], found.top_probabilities[::2, 2:]),
        *(found.entropy[::2, 2:], found.kl[::2, 2:], 9, found.target_probability[::2, 2:], found.target_rank[::2, 2:]),
    )
    axes = lens_figure(some, tokenizer).axes[0]
    assert axes.images[0].get_array().shape == (4, 1)
    assert names(axes, "x") == [fonts.token_label(tokenizer, 3)]
    line = target_figure(some, tokenizer).axes[0].lines[0]
    assert line.get_xdata().tolist() == [-1, 0, 1, 2] and "Hollow" not in " ".join(texts(target_figure(some, tokenizer)))


def test_a_targets_curves_are_its_probability_and_rank(tokenizer):
    found = a_lens([1, 2, 3], target=5)
    above, below = target_figure(found, tokenizer).axes
    for axes, values in ((above, found.target_probability), (below, found.target_rank)):
        assert axes.lines[0].get_xdata().tolist() == [-1, -0.5, 0, 0.5, 1, 1.5, 2]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), values[:, -1])
        assert axes.get_yscale() == "log"
    assert below.yaxis_inverted() and not above.yaxis_inverted()
    with pytest.raises(RequestError, match="the lens has no target"):
        target_figure(a_lens([1]), tokenizer)


def test_heads_are_maps_that_say_which_does_it_most(tokenizer):
    summary = a_summary([1, 2, 3])
    axes = attention_figure(summary, tokenizer).axes
    for panel, measure in zip(axes[:4], ("sink", "previous", "induction", "entropy"), strict=True):
        values = getattr(summary, measure)
        np.testing.assert_array_equal(panel.images[0].get_array(), values)
        best = values.argmin() if measure == "entropy" else values.argmax()
        layer, head = divmod(int(best), HEADS)
        assert f"layer {layer}, head {head}, {values[layer, head]:.2f}" in panel.get_title()
    assert [bar.get_ylabel() for bar in axes[4:]] == ["share of attention"] * 3 + ["nats"]
    gaps = attention_figure(a_summary([1]), tokenizer)
    assert "no numbers" in gaps.axes[0].get_title() and any("Grey: no number" in text for text in texts(gaps))


@pytest.mark.parametrize(("n", "numbered"), [(HEADS, True), (64, False)])
def test_the_heads_of_one_layer_are_bars(tokenizer, n, numbered):
    summary = AttentionSummary([1, 2, 3], *(rand(LAYERS, n) ** power for power in (1, 2, 3, 4)))
    summary.previous[1, 2] = torch.nan
    figure = layer_figure(summary, tokenizer, 1)
    for axes, measure in zip(figure.axes, ("sink", "previous", "induction", "entropy"), strict=True):
        values = getattr(summary, measure)[1].numpy()
        np.testing.assert_array_equal([bar.get_height() for bar in axes.patches], values)
        best = np.nanargmin(values) if measure == "entropy" else np.nanargmax(values)
        assert f"layer 1, head {best}, {values[best]:.2f}" in axes.get_title()
        (unlike,) = (
            head for head, bar in enumerate(axes.patches) if bar.get_facecolor() != axes.patches[best - 1].get_facecolor()
        )
        assert unlike == best
        numbers = ["–" if np.isnan(value) else f"{value:.2f}" if numbered else "" for value in values]
        assert [text.get_text() for text in axes.texts] == numbers
    assert sum("–: no number" in text for text in texts(figure)) == 1
    assert not any("–: no number" in text for text in texts(layer_figure(summary, tokenizer, 0)))
    with pytest.raises(RequestError, match="layer is 3"):
        layer_figure(summary, tokenizer, 3)


@pytest.mark.parametrize(("n", "numbered"), [(3, True), (40, False)])
def test_a_pattern_is_drawn_as_it_is(tokenizer, n, numbered):
    pattern = rand(n, n).tril()
    pattern[2] = torch.tensor([0.75, 0.004, 0.246] + [0.0] * (n - 3))
    axes = pattern_figure(pattern, list(range(n)), tokenizer, 5, 6).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), pattern)
    assert axes.yaxis_inverted() and (axes.get_xlabel(), axes.get_ylabel()) == ("looks at", "from")
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert bool(cells) == numbered
    if numbered:
        assert [cells[s, 2] for s in range(3)] == ["75", "", "25"]


def test_the_bars_of_an_attribution_add_up(tokenizer):
    found = an_attribution([1, 2, 3])
    layers, so_far, strongest = attribution_figure(found, tokenizer).axes
    assert sum(bar.get_width() for bar in layers.patches) == pytest.approx(found.total)
    widths = {round(bar.get_y() + bar.get_height() / 2, 2): bar.get_width() for bar in layers.patches}
    for layer in range(LAYERS):
        assert widths[layer + 0.21] == pytest.approx(found.ffns[layer].item())
        assert widths[layer - 0.21] == pytest.approx(found.heads[layer].sum().item())
    assert so_far.lines[0].get_xdata()[-1] == pytest.approx(found.total) and len(so_far.lines[0].get_xdata()) == LAYERS + 1
    parts = dict(found.parts())
    shown = [bar.get_width() for bar in strongest.patches]
    assert shown == pytest.approx(sorted(parts.values(), key=abs, reverse=True))
    assert names(strongest, "y")[0].startswith("layer ") and len(names(strongest, "y")) == len(parts)


def test_a_lead_is_not_called_a_logit(tokenizer):
    target, other = (f"“{fonts.token_label(tokenizer, token)}”" for token in (40, 41))
    figure = attribution_figure(an_attribution([1, 2, 3], other=41), tokenizer)
    shown = " ".join(texts(figure))
    assert f"adds to how far {target} is ahead of {other}" in shown and "share of the difference" in shown
    assert "two logits differ by" in shown and "own logit is" not in shown and "share of the logit" not in shown
    assert f"adds to the logit of {target}" in " ".join(texts(attribution_figure(an_attribution([1, 2, 3]), tokenizer)))


@pytest.mark.parametrize("n", [4, 5])
def test_the_first_token_stands_apart_from_the_others_median(tokenizer, n):
    stream = a_stream(list(range(n)))
    panels = norms_figure(stream, tokenizer).axes
    for axes, values in zip(panels, (stream.norm, stream.drift, stream.to_last), strict=True):
        curves = {tuple(line.get_xdata()): [] for line in axes.lines}
        for line in axes.lines:
            curves[tuple(line.get_xdata())].append(line.get_ydata())
        first, others = curves[tuple(depths(stream.points))]
        np.testing.assert_allclose(first, values[:, 0])
        np.testing.assert_allclose(others, np.median(values[:, 1:], axis=1), rtol=1e-6)
    assert panels[0].get_yscale() == "log"
    assert [text.get_text() for text in panels[0].get_legend().get_texts()][1] == f"the other {n - 1}: median"


@pytest.mark.parametrize("axis", ["position", "head"])
def test_a_grid_shows_the_share_that_comes_back(tokenizer, axis):
    grid = a_grid(axis, 4)
    axes, _ = grid_figure(grid, GridPair(grid, None, [1, 2, 3, 4], [1, 9, 3, 4], 5, 6), tokenizer).axes
    np.testing.assert_allclose(axes.images[0].get_array(), (grid.values + 1) / 3, rtol=1e-6)
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (-1, 1), "white is nothing"
    assert [text.get_text() for text in axes.texts[:4]] == [str(round(100 * share)) for share in (grid.values[0] + 1) / 3]
    if axis == "position":
        label = [fonts.token_label(tokenizer, token) for token in (2, 9)]
        assert names(axes, "x")[1] == f"{label[1]}\n← {label[0]}" and names(axes, "x")[2] == fonts.token_label(tokenizer, 3)
    else:
        assert names(axes, "x") == ["0", "1", "2", "3"]
    grid = a_grid(axis, 4, clean=1, corrupted=1)
    same = grid_figure(grid, GridPair(grid, None, [1] * 4, [1] * 4, 5, None), tokenizer).axes[0]
    assert {text.get_text() for text in same.texts} == {"–"} and same.images[0].get_array().mask.all()


def test_a_grid_of_positions_and_heads_shows_the_strongest_heads_and_lists_the_best(tokenizer):
    values = np.zeros((LAYERS, 3, HEADS), np.float32)
    values[1, 2, 3], values[1, 2, 0], values[0, 1, 2] = 0.5, 0.25, -0.75
    labels = tuple([str(i) for i in range(n)] for n in values.shape)
    grid = Grid(values, ("layer", "position", "head"), labels, "attention.head_output", 1.0, 0.0)
    figure = grid_figure(grid, GridPair(grid, None, [1, 2, 3], [1, 9, 3], 5, 6), tokenizer)
    expected = np.zeros((LAYERS, 3))
    expected[1, 2], expected[0, 1] = 0.5, -0.75
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)
    assert "what each position’s strongest head restores" in figure.get_suptitle().replace("\n", " ")
    name, caption = fonts.token_label(tokenizer, 3), figure.get_supxlabel().replace("\n", " ")
    assert f"Most: layer 1, {name}@2, head 3 50%; layer 1, {name}@2, head 0 25%; layer" in caption


@pytest.mark.parametrize("columns", [1, 16])
def test_a_grids_colours_stand_beside_it_and_their_name_is_on_the_sheet(tokenizer, columns):
    grid = a_grid("head", columns)
    figure = grid_figure(grid, GridPair(grid, None, [1], [2], 5, 6), tokenizer)
    figure.draw_without_rendering()
    axes, bar = figure.axes
    assert 0 < (bar.get_window_extent().x0 - axes.get_window_extent().x1) / figure.dpi < 0.2, "inches"
    name = bar.yaxis.label.get_window_extent()
    assert name.y0 >= 0 and name.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("restored", "extend"), [((-1, 1), "neither"), ((-1.5, 1), "min"), ((np.nan, 1.5), "max"), ((-1.5, 1.5), "both")]
)
def test_colours_have_a_point_where_a_cell_is_beyond_them(tokenizer, restored, extend):
    grid = Grid(np.array([restored], float), ("layer", "head"), (["0"], ["0", "1"]), "residual_pre", 1.0, 0.0)
    assert grid_figure(grid, GridPair(grid, None, [1], [2], 5, 6), tokenizer).axes[0].images[0].colorbar.extend == extend


def test_numbers_that_are_not_finite_are_gaps(tmp_path, tokenizer):
    lens, summary, stream = a_lens([1, 2, 3], target=4), a_summary([1, 2, 3]), a_stream([1, 2, 3])
    for values in (lens.top_probabilities, lens.target_probability, stream.norm, stream.drift, stream.to_last):
        values[3:] = torch.nan
    summary.sink[:] = torch.nan
    axes = lens_figure(lens, tokenizer).axes[0]
    assert axes.images[0].get_array().mask[2:].all() and [text.get_text() for text in axes.texts[6:]] == ["–"] * 6
    draw_lens(lens, tokenizer, tmp_path / "lens.png")
    draw_attention(summary, tokenizer, tmp_path / "attention.png")
    draw_norms(stream, tokenizer, tmp_path / "norms.png")
    draw_pattern(torch.full((3, 3), torch.nan), [1, 2, 3], tokenizer, 0, 0, tmp_path / "pattern.png")
    for filled in (torch.nan, 0.0):
        lens.target_probability[:] = filled
        draw_target(lens, tokenizer, tmp_path / "target.png")
    grid = a_grid("head", 4)
    grid.values[0, 0], grid.values[0, 1] = np.inf, np.nan
    draw_grid(grid, GridPair(grid, None, [1], [2], 3, 4), tokenizer, tmp_path / "grid.png")
    assert len(list(tmp_path.iterdir())) == 6


def test_the_head_that_wrote_most_is_drawn_from_its_whole_pattern(tmp_path, monkeypatch):
    module = importlib.import_module("llama_ref.study.analyses.overview")  # its name in the package is the function
    monkeypatch.setattr(module, "how_many_kept", lambda n_tokens: 4)  # as of a text of thousands of tokens
    llama = Llama.build(tiny_folder(tmp_path / "Tiny"), device="cpu", dtype="float32", max_seq_len=128)
    tokens = llama.encode("many tokens")
    found = overview(llama.model, tokens)
    draw_overview(found, llama.tokenizer, tmp_path / "all")
    layer, head = found.attribution.strongest_head
    assert not torch.allclose(found.patterns.unpack(layer, head).sum(-1), torch.ones(len(tokens)), atol=1e-3)
    draw_pattern(
        attention_pattern(llama.model, tokens, layer, head), tokens, llama.tokenizer, layer, head, tmp_path / "alone.png"
    )
    assert (tmp_path / "all" / "pattern.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_the_answer_rises_in_the_picture_of_the_real_model(llama):
    tokens = llama.encode("The capital of France is")
    found = logit_lens(llama.model, tokens, target=llama.tokenizer.encode(" Paris", bos=False, eos=False)[0])
    axes = lens_figure(found, llama.tokenizer).axes[0]
    assert [text.get_text() for text in axes.texts][-1] == "␣Paris"
    assert axes.images[0].get_array()[-1, -1] > 0.7 and axes.images[0].get_array()[:20, -1].max() < 1e-4
    below = target_figure(found, llama.tokenizer).axes[1].lines[0].get_ydata()
    assert below[-1] == 1 and below[: len(below) // 2].min() > 100


# ---- letters


def strange_tokens(tokenizer: Tokenizer) -> list[int]:
    return [token for text in STRANGE for token in tokenizer.encode(text, bos=False, eos=False)]


def test_a_token_is_drawn_as_it_is_whatever_matplotlib_makes_of_such_text(tokenizer):
    tokens = strange_tokens(tokenizer)
    figure = pattern_figure(rand(len(tokens), len(tokens)).tril(), tokens, tokenizer, 0, 0)
    figure.draw_without_rendering()
    ticks = figure.axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == [fonts.token_label(tokenizer, token) for token in tokens]
    assert any(tick.get_text().startswith("_") for tick in ticks)
    assert {"$", "\\", "%", "{", "\\u200d"} <= {tick.get_text() for tick in ticks}
    assert not any(tick.get_parse_math() for tick in ticks) and all(tick.get_visible() for tick in ticks)


def test_any_text_can_be_drawn(tokenizer, only_dejavu, tmp_path):
    encoded = (tokenizer.encode(text, bos=True, eos=False)[:8] for text in (PROSE | ODD).values())
    tokens = list(dict.fromkeys(token for some in encoded for token in some))
    for start in range(0, len(tokens), MOST_WORDS):
        draw_lens(a_lens(tokens[start : start + MOST_WORDS]), tokenizer, tmp_path / "lens.png")


def test_what_no_font_has_is_escaped(tokenizer, only_dejavu):
    assert fonts.drawable("한국 a🙂é中") == "\\ud55c\\uad6d a\\U0001f642é\\u4e2d"
    assert fonts.style("한") == {"family": ["DejaVu Sans"], "parse_math": False}
    assert fonts.drawable("\u0301x") == "◌\u0301x", "a mark has something to hang on"
    korean, plain = (tokenizer.encode(text, bos=False, eos=False) for text in ("한", "plain"))
    assert fonts.prompt(tokenizer, korean) == "Text: \\ud55c\n\\u…: a character that no installed font has."
    assert fonts.prompt(tokenizer, plain, plain * 300, names=["A", "B"]) == f"A: plain\nB: …{'│plain' * 49}"


def test_what_a_font_has_is_drawn_in_it(tokenizer, korean_font, tmp_path):
    assert fonts.drawable("한 x") == "한 x"
    assert fonts.style("␣한x")["family"] == ["DejaVu Sans", korean_font]
    assert fonts.em("한") == pytest.approx(1, abs=1e-4)
    assert fonts.drawable("국") == "\\uad6d", "its glyph is blank"
    tokens = tokenizer.encode("한", bos=False, eos=False)
    figure = pattern_figure(torch.ones(1, 1), tokens, tokenizer, 0, 0)
    (tick,) = figure.axes[0].get_xticklabels()
    assert tick.get_text() == "한" and tick.get_family() == ["DejaVu Sans", korean_font]
    draw_all(tmp_path, [*tokens, *strange_tokens(tokenizer)], tokenizer)


def test_words_that_run_to_the_left_keep_their_place(tokenizer, only_dejavu):
    mark = "\u200e"
    assert fonts._left_to_right("␣שלום<0xD7>") == f"␣{mark}שלום{mark}<0xD7>"
    assert fonts._left_to_right("cafe\u0301") == "cafe\u0301"
    token = tokenizer.encode(" שלום", bos=False, eos=False)[0]
    assert fonts.em(fonts.token_label(tokenizer, token)) == fonts.em(fonts.token_label(tokenizer, token).replace(mark, ""))


def test_a_label_is_cut_to_its_room_and_lines_to_their_width(only_dejavu):
    long = "W" * 40
    assert fonts.cut(long, 5).endswith("…") and fonts.em(fonts.cut(long, 5)) <= 5
    assert fonts.cut("short", 5) == "short"
    assert fonts.cut(f"ab\n{long}", 5).startswith("ab\nWW")
    lines = fonts.wrapped("one two three│four│five six\nseven", 6).split("\n")
    assert "".join(lines).replace(" ", "") == "onetwothree│four│fivesixseven" and lines[-1] == "seven"
    assert all(fonts.em(line) <= 6 for line in lines)


def test_labels_neither_touch_nor_are_lost(tokenizer):
    """Drawn widths equal the computed ones, so that labels do not overlap."""
    tokens = tokenizer.encode(PROSE["english"] + PROSE["russian"], bos=True, eos=False)[:30]
    figure = lens_figure(a_lens(tokens), tokenizer)
    figure.draw_without_rendering()
    for labels in (figure.axes[0].get_xticklabels(), *([text] for text in figure.axes[0].texts)):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(left.overlaps(right) for left, right in pairwise(boxes))
    width = figure.axes[0].get_window_extent().width / len(tokens)
    assert max(text.get_window_extent().width for text in figure.axes[0].texts) <= width


# ---- images


def an_image_attention(n_tokens: int, n_layers: int = 2, size: tuple[int, int] = (90, 60)) -> ImageAttention:
    """Attention to an image in patches of 14 × 14 pixels; the first token does not see it."""
    width, height = size
    rows, columns = -(-height // 14), -(-width // 14)
    shares = rand(n_layers, n_tokens, rows * columns + 2)
    shares[:, 0] = 0
    shares = (shares / shares.sum(-1, keepdim=True)).nan_to_num(0)
    pixels = (rand(height, width, 3) * 255).to(torch.uint8)
    patches = shares[..., 2:].unflatten(-1, (rows, columns))
    before = [2 * i + 1 for i in range(n_layers)]
    return ImageAttention(list(range(n_tokens)), before, None, pixels, (14, 14), patches, shares[..., 0], shares[..., 1])


def panels_of(figure: Figure) -> dict[str, np.ndarray]:
    """The shares that each panel draws over its image, by the first line of its title."""
    drawn = [axes for axes in figure.axes if len(axes.images) == 2]
    return {axes.get_title().split("\n")[0]: np.asarray(axes.images[1].get_array()) for axes in drawn}


def test_each_token_that_sees_an_image_has_a_panel(tokenizer):
    found = an_image_attention(4)
    panels = panels_of(tokens_figure(found, tokenizer))
    assert [name.split("@")[1] for name in panels] == ["1", "2", "3"]
    for t, drawn in enumerate(panels.values(), 1):
        np.testing.assert_allclose(drawn, found.patches[:, t].mean(0).numpy())
    of_layer = panels_of(tokens_figure(found, tokenizer, 1))
    np.testing.assert_allclose(list(of_layer.values())[2], found.patches[1, 3].numpy())


def test_each_cross_attention_layer_has_a_panel(tokenizer):
    found = an_image_attention(4, 3)
    panels = panels_of(layers_figure(found, tokenizer, 2))
    assert list(panels) == ["mean over layers", *(f"cross layer {i} (before layer {2 * i + 1})" for i in range(3))]
    for drawn, expected in zip(panels.values(), (found.patches[:, 2].mean(0), *found.patches[:, 2]), strict=True):
        np.testing.assert_allclose(drawn, expected.numpy())


def test_a_share_is_drawn_over_its_part_of_the_image(tokenizer):
    """90 × 60 pixels have 7 × 5 patches of 14: the last ones reach beyond the image, and are cut."""
    axes = tokens_figure(an_image_attention(2), tokenizer).axes[0]
    image, shares = axes.images
    assert image.get_extent() == [0, 90, 60, 0] and shares.get_extent() == [0, 98, 70, 0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 90), (60, 0))
    assert axes.get_title().endswith("%") and "class" in axes.get_title()


@pytest.mark.parametrize(("size", "most"), [((9, 300), 40), ((300, 9), 2), ((1000, 600), 2)])
def test_images_of_any_shape_are_drawn(tokenizer, tmp_path, size, most):
    """The maximum number of the tallest panels."""
    found = an_image_attention(most, most, size)
    draw_image_attention(found, tokenizer, tmp_path / "image.png")
    draw_image_layers(found, tokenizer, tmp_path / "layers.png")
    for path in tmp_path.iterdir():
        assert max(struct.unpack(">II", path.read_bytes()[16:24])) <= 150 * TALLEST, path.name


def test_only_the_last_of_many_panels_are_drawn(tokenizer):
    found = an_image_attention(40, 30)
    for figure, words in (
        (tokens_figure(found, tokenizer), "Only the last 24 of 39 tokens."),
        (layers_figure(found, tokenizer), "Only the last 23 of 30 layers."),
    ):
        assert words in figure.get_supxlabel().replace("\n", " ")
        assert len(panels_of(figure)) == 24


def test_what_no_token_sees_is_not_drawn(tokenizer):
    with pytest.raises(RequestError, match="nothing to draw: none of the requested tokens sees the image"):
        layers_figure(an_image_attention(3), tokenizer, 0)
    with pytest.raises(RequestError, match="nothing to draw"):
        tokens_figure(an_image_attention(1), tokenizer)
