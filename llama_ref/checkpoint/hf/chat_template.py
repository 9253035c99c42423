"""ChatFormat as a Jinja template for Hugging Face's `apply_chat_template`."""

import json

from llama_ref.chat import BUILTIN_ARGUMENT, STOP_REASONS, WRITTEN_ROLE
from llama_ref.checkpoint.hf.vision.image_token import IMAGE
from llama_ref.vocabulary import Vocabulary

# `{%-` and `{{-` strip the whitespace of this layout from the output. All output text is inside
# expressions, which Jinja writes unchanged. `tojson` is Hugging Face's: with ensure_ascii it writes
# what json.dumps writes.
TEMPLATE = r"""
{%- set written_role = WRITTEN_ROLE %}
{%- set builtin_argument = BUILTIN_ARGUMENT %}
{%- if tools %}
    {{- raise_exception('this format has no section for tools: describe them in the text of a message') }}
{%- endif %}
{%- if not messages %}
    {{- raise_exception('a dialog is a list of at least one message') }}
{%- endif %}
{{- BEGIN_OF_TEXT }}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] if message['content'] is defined else none %}
    {%- set calls = message['tool_calls'] or [] %}
    {%- set stop_reason = message['stop_reason'] if message['stop_reason'] is defined else none %}
    {%- if role not in written_role %}
        {{- raise_exception('unknown role ' ~ role ~ ': it is one of ' ~ written_role.keys() | join(', ')) }}
    {%- endif %}
    {%- if calls and role != 'assistant' %}
        {{- raise_exception("only an assistant's message has tool_calls") }}
    {%- endif %}
    {%- if content is none and calls %}
        {%- set content = '' %}
    {%- endif %}
    {%- if content is string %}
        {%- set items = [{'type': 'text', 'text': content}] %}
    {%- elif content is sequence and content is not mapping and content %}
        {%- set items = content %}
    {%- else %}
        {{- raise_exception("a message's content is a string, or a list of items") }}
    {%- endif %}
    {%- set texts = namespace(joined='') %}
    {%- for item in items %}
        {%- if item['type'] == 'text' and item['text'] is string %}
            {%- set texts.joined = texts.joined + item['text'] %}
        {%- elif item['type'] == 'image' and IMAGE and role == 'user' %}
            {%- set texts.joined = texts.joined + IMAGE %}
        {%- else %}
            {{- raise_exception('an item of the content has the type text' ~ (', of a user also image' if IMAGE else '')) }}
        {%- endif %}
    {%- endfor %}
    {%- set content = texts.joined %}
    {%- if stop_reason is not none and stop_reason not in STOP_REASONS %}
        {{- raise_exception('unknown stop_reason ' ~ stop_reason) }}
    {%- endif %}
    {{- START_HEADER + written_role[role] + END_HEADER + '\n\n' }}
    {%- for call in calls %}
        {%- set call = call['function'] or call %}
        {%- set name = call['tool_name'] if call['tool_name'] is defined else call['name'] %}
        {%- set arguments = call['arguments'] %}
        {%- if name is not string or arguments is not defined %}
            {{- raise_exception('a tool call has a name and arguments') }}
        {%- endif %}
        {%- if loop.first %}
            {{- (PYTHON_TAG if name == 'code_interpreter' else '') + content }}
        {%- endif %}
        {%- if name not in builtin_argument %}
            {{- {'type': 'function', 'name': name, 'parameters': arguments} | tojson(ensure_ascii=true) }}
        {%- elif arguments is not mapping or arguments[builtin_argument[name]] is not string %}
            {{- raise_exception('a call of ' ~ name ~ ' has the argument ' ~ builtin_argument[name]) }}
        {%- elif name == 'code_interpreter' %}
            {{- arguments['code'] }}
        {%- else %}
            {%- set query = arguments['query'] | replace('\\', '\\\\') | replace('"', '\\"') %}
            {{- name + '.call(query="' + query + '")' }}
        {%- endif %}
    {%- else %}
        {{- content }}
    {%- endfor %}
    {{- END_OF_MESSAGE if role == 'assistant' and stop_reason == 'end_of_message' else END_OF_TURN }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- START_HEADER + 'assistant' + END_HEADER + '\n\n' }}
{%- endif %}
""".strip()


def chat_template(vocabulary: Vocabulary, *, images: bool = False) -> str:
    """The template with this vocabulary's special tokens; with `images`, a vision model's template.

    It writes the text that ChatFormat encodes, rejects what ChatFormat rejects, and also accepts
    tool calls in Hugging Face's form (`{"function": {"name", "arguments"}}`, content None). The
    library then encodes the text as a whole. So, unlike in ChatFormat, a special token's text in a
    message becomes that special token. The text of a message that begins with a line break, or has
    text before a tool call, may be split into different tokens.
    """
    values = {
        "WRITTEN_ROLE": WRITTEN_ROLE,
        "BUILTIN_ARGUMENT": BUILTIN_ARGUMENT,
        "STOP_REASONS": STOP_REASONS,
        "BEGIN_OF_TEXT": vocabulary.special_text("<|begin_of_text|>"),
        "START_HEADER": vocabulary.special_text("<|start_header_id|>"),
        "END_HEADER": vocabulary.special_text("<|end_header_id|>"),
        "PYTHON_TAG": vocabulary.special_text("<|python_tag|>"),
        "END_OF_MESSAGE": vocabulary.special_text("<|eom_id|>"),
        "END_OF_TURN": vocabulary.special_text("<|eot_id|>"),
        "IMAGE": IMAGE if images else "",
    }
    template = TEMPLATE
    for name, value in values.items():
        template = template.replace(name, json.dumps(value, ensure_ascii=False))
    return template


def is_llama_3_template(template: str) -> bool:
    """Whether a template seems to write Llama 3's headers, under any names if it is the one above."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return all(name in template for name in names) or template.startswith(TEMPLATE[: TEMPLATE.index("WRITTEN_ROLE")])
