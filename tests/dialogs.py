"""Dialogs to encode: handwritten ones, and strategies for messages of every role."""

from hypothesis import strategies as st

from corpus import WHOLE

BUILTIN = ("brave_search", "wolfram_alpha", "photogen")
TEXTS = st.lists(st.sampled_from(list(WHOLE.values())) | st.text(), max_size=3).map("".join)
JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
CUSTOM_CALLS = st.fixed_dictionaries(
    {"tool_name": st.text(min_size=1), "arguments": st.dictionaries(st.text(), JSON | st.lists(JSON, max_size=2), max_size=3)}
).filter(lambda call: call["tool_name"] not in {*BUILTIN, "code_interpreter"})
SEARCHES = st.fixed_dictionaries({"tool_name": st.sampled_from(BUILTIN), "arguments": st.fixed_dictionaries({"query": TEXTS})})
PROGRAMS = st.fixed_dictionaries(
    {"tool_name": st.just("code_interpreter"), "arguments": st.fixed_dictionaries({"code": TEXTS})}
)
STOP_REASON = {"stop_reason": st.sampled_from(["end_of_turn", "end_of_message", "out_of_tokens", None])}
OTHERS = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXTS}, optional=STOP_REASON)
ASSISTANTS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS},
    optional=STOP_REASON | {"tool_calls": st.lists(CUSTOM_CALLS | SEARCHES | PROGRAMS, max_size=2)},
)

DIALOGS = {
    "one turn": [{"role": "user", "content": "What does 감사합니다 mean?"}],
    "several turns": [
        {"role": "system", "content": "Answer in one line.\n"},
        {"role": "user", "content": "  Why is the sky blue? "},
        {"role": "assistant", "content": "Rayleigh scattering. 🌤️"},
        {"role": "user", "content": ""},
    ],
    "search": [
        {"role": "user", "content": "Tides at Dover?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"tool_name": "brave_search", "arguments": {"query": "Dover tides"}}],
            "stop_reason": "end_of_message",
        },
        {"role": "tool", "content": '{"high": "04:12"}'},
    ],
    "code": [
        {"role": "user", "content": "2**100?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"tool_name": "code_interpreter", "arguments": {"code": "print(2**100)"}}],
            "stop_reason": "end_of_message",
        },
        {"role": "tool", "content": "1267650600228229401496703205376"},
        {"role": "assistant", "content": "A 31-digit number.", "stop_reason": "end_of_turn"},
        {"role": "user", "content": "Thanks"},
    ],
    "custom tools": [
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {"tool_name": "weather", "arguments": {"city": "서울", "days": [1, 2], "metric": True, "at": None}},
                {"tool_name": "weather", "arguments": "already a string"},
            ],
        }
    ],
}
