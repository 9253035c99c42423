"""What `llama-ref guard` prints, and `chat --guard` about a message that it holds back."""

import json

from llama_ref.formatting import short
from llama_ref.guard.judge import Guard
from llama_ref.guard.verdict import Verdict


def print_verdict(verdict: Verdict, guard: Guard, *, as_json: bool) -> None:
    """Print the verdict, its probabilities and categories, one per line; or all as JSON."""
    if as_json:
        print(json.dumps(_as_json(verdict, guard), indent=2))
        return
    print(f"{verdict.word}  P(unsafe) {verdict.unsafe_probability:.3g}, P(safe) {verdict.safe_probability:.3g}")
    for category in verdict.categories:
        print(f"{category.code}  {category.title}")
    for code in verdict.unknown:
        print(f"{code}  not among the prompt's categories")
    for code in verdict.excluded:
        print(f"{code}  excluded, does not count")
    if not verdict.is_expected:
        print(f"answer: {short(verdict.answer)}")


def reasons(verdict: Verdict) -> str:
    """Format a verdict as one line: "unsafe (S9 Indiscriminate Weapons)"."""
    if verdict.word == "unexpected":
        return f"no verdict, the guard answered {short(verdict.answer)}"
    names = [f"{category.code} {category.title}" for category in verdict.categories]
    return f"{verdict.word} ({', '.join([*names, *verdict.unknown]) or 'no category named'})"


def print_guard_prompt(ids: list[int], text: str, *, as_json: bool) -> None:
    """Print a prompt with its special tokens written out; as JSON also its ids."""
    print(json.dumps({"prompt": text, "tokens": ids}, indent=2) if as_json else text)


def _as_json(verdict: Verdict, guard: Guard) -> dict:
    return {
        "verdict": verdict.word,
        "unsafe_probability": verdict.unsafe_probability,
        "safe_probability": verdict.safe_probability,
        "unsafe_ratio": verdict.unsafe_ratio,
        "threshold": guard.threshold,
        "categories": [{"code": category.code, "name": category.title} for category in verdict.categories],
        "excluded": list(verdict.excluded),
        "unknown": list(verdict.unknown),
        "answer": verdict.answer,
        "is_expected": verdict.is_expected,
        "guard_version": guard.version.name,
    }
