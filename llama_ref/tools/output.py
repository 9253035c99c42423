"""Format a tool's output as the text of a message with the role `tool`."""


def tool_output(stdout: str = "", stderr: str = "", *, failed: bool = False) -> str:
    """A program's output in the format of Meta's code.

    Any other text, such as JSON, is fine as a result too.
    """
    lines = ["failed" if failed else "completed"]
    if stdout:
        lines.append(f"[stdout]{stdout}[/stdout]")
    if stderr:
        lines.append(f"[stderr]{stderr}[/stderr]")
    return "\n".join(lines)
