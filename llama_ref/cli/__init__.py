"""The command line, `llama-ref`: words and printing."""


def main(argv: list[str] | None = None) -> int:
    """Run `llama-ref` with these words (default: the process's own); return the exit code."""
    from llama_ref.cli import commands  # only now: a part of cli/ should not import every command

    return commands.main(argv)
