"""Completion for shells: the scripts, and the answers that they ask for."""

from typing import Annotated, Any

import typer

from surgery.cli import output
from surgery.errors import UsageError, closest

_SCRIPTS = {
    "bash": """\
_surgery() {
    mapfile -t COMPREPLY < <(surgery completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o bashdefault -o default -F _surgery surgery""",
    "zsh": """\
#compdef surgery
_surgery() {
    local -a found
    found=("${(@f)$(surgery completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then compadd -a found; else _files; fi
}
compdef _surgery surgery""",
    "fish": """\
function __surgery_complete
    surgery completion fish -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c surgery -a '(__surgery_complete)'""",
}
_INSTALL = {
    "bash": "surgery completion bash >> ~/.bashrc",
    "zsh": "surgery completion zsh > ~/.zfunc/_surgery",
    "fish": "surgery completion fish > ~/.config/fish/completions/surgery.fish",
}


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORDS]...", help="Words typed so far: print what the last may become.", hidden=True),
    ] = None,
) -> None:
    """Print a script that lets a shell complete commands, options and aliases.

    Examples:

      surgery completion bash >> ~/.bashrc

      surgery completion zsh > ~/.zfunc/_surgery

      surgery completion fish > ~/.config/fish/completions/surgery.fish
    """
    if shell not in _SCRIPTS:
        raise UsageError("shell", f"no completion for '{shell}'", hint=closest(shell, list(_SCRIPTS)))
    if words:
        found = candidates(words)
        if found:
            output.data("\n".join(found))
        return
    output.data(_SCRIPTS[shell])
    output.note(f"to keep it: {_INSTALL[shell]}")


def candidates(words: list[str]) -> list[str]:
    """What the last of `words` may become: commands, options, aliases; nothing where a file belongs."""
    from surgery.cli.main import app

    *before, last = words
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="surgery")
    awaited = False  # a value of the option before
    for word in before:
        options = {name: p for p in command.get_params(context) for name in getattr(p, "opts", ())}
        awaited = word in options and not getattr(options[word], "is_flag", True)
        if word.startswith("-") or not hasattr(command, "get_command"):
            continue
        inner = command.get_command(context, word)
        if inner is None:
            return []
        command, context = inner, inner.context_class(inner, info_name=word, parent=context)
    if awaited:
        return []
    if last.startswith("-"):
        names = (o for p in command.get_params(context) for o in (*p.opts, *p.secondary_opts) if o.startswith("-"))
        return sorted(name for name in names if name.startswith(last))
    if hasattr(command, "list_commands"):
        return [name for name in command.list_commands(context) if name.startswith(last)]
    if not last:
        return []
    from surgery.store.names import known_aliases

    return sorted(name for name in known_aliases() if name.startswith(last))
