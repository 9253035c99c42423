"""Run the code of docs/notebooks/*.md on the demo, and make a notebook of each.

    python scripts/notebooks.py

Each page is the only source of its notebook: prose, and blocks of Python, each with its output.
This updates the outputs in the pages and writes the notebooks next to them (with nbformat, from the
extra `dev`). Other blocks, such as commands for Llama 3, count as prose: they are not run.
"""

from pathlib import Path

import tour

PAGES = tour.REPOSITORY / "docs" / "notebooks"
FROM_THE_ROOT = """import os
from pathlib import Path

if Path.cwd().name == "notebooks":  # the notebook's folder; paths are from the repository's root
    os.chdir("../..")
"""


def pages() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


def executed(page: Path) -> list[tour.Part]:
    """A page's parts, with new outputs from running its code."""
    return list(tour.run(tour.parse(page.read_text(encoding="utf-8"))))


def notebook(page: Path) -> str:
    """A page as a notebook, with the outputs in the page."""
    return tour.notebook(tour.parse(page.read_text(encoding="utf-8")), page.stem, FROM_THE_ROOT)


def main() -> None:
    for page in pages():
        page.write_text("".join(part.markdown for part in executed(page)), encoding="utf-8")
        page.with_suffix(".ipynb").write_text(notebook(page), encoding="utf-8")


if __name__ == "__main__":
    main()
