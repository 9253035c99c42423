"""Prompts and answers in Meta's prompt format documents, read from the package llama-models."""

import re
from pathlib import Path

import llama_models

PAGES = {"3.1": "llama3_1/prompt_format.md", "3.2": "llama3_2/text_prompt_format.md"}
SECTION = re.compile(
    r"^##### Input Prompt Format\n```\n(.*?)\n*^```$.*?^##### Model Response Format\n```\n(.*?)\n^```$",
    re.MULTILINE | re.DOTALL,
)


def printed_pairs(release: str) -> list[tuple[str, str]]:
    """Each prompt, without the line breaks at its end, and the answer after it."""
    page = Path(llama_models.__file__).parent / PAGES[release]
    return SECTION.findall(page.read_text(encoding="utf-8"))
