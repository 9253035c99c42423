"""What a tool gave, as the text of a message with the role `tool`."""


def tool_output(stdout: str = "", stderr: str = "", *, failed: bool = False) -> str:
    """A program's output as Meta's code writes it for the model. Any other text is fine too, such as JSON."""
    lines = ["failed" if failed else "completed"]
    if stdout:
        lines.append(f"[stdout]{stdout}[/stdout]")
    if stderr:
        lines.append(f"[stderr]{stderr}[/stderr]")
    return "\n".join(lines)
