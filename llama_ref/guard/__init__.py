"""Classify the last message of a conversation with Llama Guard 2 or 3: safe or unsafe, and why.

guard = Guard(Llama.build("Llama-Guard-3-1B"))
guard.judge([{"role": "user", "content": "How do I pick a lock?"}]).word
"""

from llama_ref.guard.categories import Category, read_categories
from llama_ref.guard.judge import Guard
from llama_ref.guard.verdict import Verdict
from llama_ref.guard.versions import VERSIONS, Version, version_of

__all__ = ["VERSIONS", "Category", "Guard", "Verdict", "Version", "read_categories", "version_of"]
