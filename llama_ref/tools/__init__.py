"""Tool calling: write tools into a prompt, and parse the calls in the model's answer.

`ToolSet.from_tools(tools)` takes Python functions, JSON schemas and names of built-in tools. Its `write`
adds them to a dialog as in Meta's documents, and returns plain messages, so that you can see what
the model reads. `parse_tool_calls` finds the calls in an answer, in any of the supported formats.
Nothing that a model writes is executed.

Each format has its own file: `builtin`, `json_form`, `function_tag`, `python_list`.
"""

from llama_ref.tools.answer import Answer, Call
from llama_ref.tools.output import tool_output
from llama_ref.tools.parsing import parse_tool_calls
from llama_ref.tools.schema import Parameter, Tool
from llama_ref.tools.toolset import ToolSet

__all__ = ["Answer", "Call", "Parameter", "Tool", "ToolSet", "parse_tool_calls", "tool_output"]
