"""`llama-ref completion`."""

from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command


@command(Section.OTHER)
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Flag("bash, zsh or fish")]) -> None:
    """Print a completion script for a shell.

    Load it in the shell's startup file:

      bash  ~/.bashrc                   eval "$(llama-ref completion bash)"
      zsh   ~/.zshrc, after compinit    eval "$(llama-ref completion zsh)"
      fish  ~/.config/fish/config.fish  llama-ref completion fish | source

    The script contains all commands and flags of this version, so pressing Tab does not start
    Python. Arguments are completed to the checkpoints under ~/.llama/checkpoints and to files.
    """
    from llama_ref.cli import commands
    from llama_ref.cli.parsing.completion import SCRIPTS

    print(SCRIPTS[shell]({name: commands.load(name) for name in commands.names()}), end="")
