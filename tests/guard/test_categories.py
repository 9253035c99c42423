"""Lists of categories, and files that define them."""

import pytest

from llama_ref.errors import RequestError
from llama_ref.guard.categories import GUARD_2, GUARD_3, GUARD_3_8B, Category, read_categories, without


def test_the_releases_lists_differ():
    assert [len(each) for each in (GUARD_2, GUARD_3, GUARD_3_8B)] == [11, 13, 14]
    assert GUARD_2[4] == Category("S5", "Specialized Advice")
    assert GUARD_3[4] == Category("S5", "Defamation")
    assert {category.title for category in GUARD_2} - {category.title for category in GUARD_3} == set()


def test_a_file_holds_names_and_descriptions(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(
        "\ufeff# ours\nS1: Pies & $prices\n\nS2 : Cakes. \n    Should not\n     - praise {cakes}\n    Can\n", encoding="utf-8"
    )
    assert read_categories(file) == (
        Category("S1", "Pies & $prices"),
        Category("S2", "Cakes.", "Should not\n - praise {cakes}\nCan"),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty file"),
        ("# nothing\n", "has no categories"),
        ("S1: A\nS1: B\n", "the category S1 twice"),
        ("S1: A\nViolence\n", "line 2 of"),
        ("1: A\n", 'expected "S1: Name"'),
        ("  indented\n", "line 1 of"),
        ("S1:\n", "line 1 of"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, text, says):
    file = tmp_path / "own.txt"
    file.write_text(text)
    with pytest.raises(RequestError, match=says):
        read_categories(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"S1: caf\xe9\n")
    for name in ("nowhere", "latin", "a\0b"):
        with pytest.raises(RequestError, match="cannot read the categories in"):
            read_categories(tmp_path / name)


def test_others_keep_their_codes_without_the_excluded_ones():
    assert [category.code for category in without(GUARD_2[:4], ["S2", "S1"])] == ["S3", "S4"]
    with pytest.raises(RequestError, match=r"no category 'S12' to exclude, expected some of S1, S2"):
        without(GUARD_2[:2], ["S12"])
    with pytest.raises(RequestError, match="has no categories"):
        without(GUARD_2[:1], ["S1"])


@pytest.mark.parametrize(("code", "name"), [("S", "A"), ("s1", "A"), ("S1\n", "A"), ("S1", ""), ("S1", "A\nB"), ("S1", " ")])
def test_a_category_that_no_answer_could_name_is_refused(code, name):
    with pytest.raises(RequestError, match="expected"):
        Category(code, name)
