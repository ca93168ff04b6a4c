"""The `sublet` command: finds the subcommand and loads only what it needs."""

import sys
from importlib import import_module

from sublet.cli.errors import ERROR, USAGE, CommandError, guarded, say

# name -> (module, function, what it does), in the order in which help tells them.
RENTERS = {
    "run": ("sublet.cli.run", "run", "Run a container on somebody's GPU"),
    "init": ("sublet.cli.init", "init", "Write a sublet.yaml for a folder"),
    "ps": ("sublet.cli.jobs", "ps", "List your jobs"),
    "logs": ("sublet.cli.logs", "logs", "Show a job's output; -f follows it"),
    "top": ("sublet.cli.top", "top", "Show what a job uses: GPU, memory, disk"),
    "inspect": ("sublet.cli.jobs", "inspect", "Show all about a job"),
    "checkpoints": ("sublet.cli.checkpoints", "checkpoints", "Show what a job has saved"),
    "wait": ("sublet.cli.wait", "wait", "Wait for a job; exits with its code"),
    "cancel": ("sublet.cli.stopping", "cancel", "End a job"),
    "pause": ("sublet.cli.stopping", "pause", "Checkpoint a job and stop it, for now"),
    "resume": ("sublet.cli.jobs", "resume", "Go on with a paused job, or raise its budget"),
    "download": ("sublet.cli.download", "download", "Fetch a job's outputs"),
    "events": ("sublet.cli.logs", "events", "Show a job's history"),
    "finetune": ("sublet.cli.finetune", "finetune", "LoRA on a text classifier, as a preset"),
}
MONEY = {
    "offers": ("sublet.cli.market", "offers", "List the market's offers, cheapest first"),
    "balance": ("sublet.cli.money", "balance", "Show your account"),
    "statement": ("sublet.cli.money", "statement", "Show a job's charges and their receipts"),
    "receipts": ("sublet.cli.receipts", "receipts", "Export a job's evidence; verify it offline"),
    "fund": ("sublet.cli.money", "fund", "Credit an account (the operator's key)"),
    "whoami": ("sublet.cli.market", "whoami", "Show your party id and your broker"),
}
# These belong to other packages, with the extra that brings them, and have their own help.
OTHERS = {
    "provide": ("sublet_agent.main", "main", "agent", "Put this machine's GPUs on the market"),
    "provider": ("sublet_agent.main", "provider_main", "agent", "status, drain, reclaim, earnings"),
    "broker": ("sublet_broker.main", "main", "broker", "Run a market"),
    "demo": ("sublet.demo.main", "main", "demo", "See it all on this machine (--quick: 30 s)"),
}

_EXAMPLE = """\
  sublet run --gpus 1x24GB --max-price 0.40 --budget 5 --input data.csv:/data/data.csv \\
      --outputs /out pytorch/pytorch@sha256:... python train.py"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) == 2 and arguments[0] == "help":
            return main([arguments[1], "--help"])
        print(help_text())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("version", "--version", "-V"):
        return _version()
    if name in OTHERS:
        return _other(name, rest)
    found = RENTERS.get(name) or MONEY.get(name)
    if found is None:
        say(CommandError(f"{name}: there is no such command", _nearest(name)))
        return USAGE
    module, function, _ = found
    command = getattr(import_module(module), function)
    try:
        return guarded(lambda: int(command(rest)), as_json=_wants_json(name, rest))
    except SystemExit as leaving:
        # argparse leaves so after --help.
        return leaving.code if isinstance(leaving.code, int) else ERROR


def help_text() -> str:
    """Return the help of the whole command."""
    from sublet.terminal.text import paint

    lines = ["Run containers on idle GPUs; resumed elsewhere when a machine goes.", ""]
    lines.append(f"{paint('Usage:', 'bold')} sublet COMMAND [OPTIONS]")
    owners = {
        name: (module, function, says) for name, (module, function, _, says) in OTHERS.items()
    }
    for title, commands in (("Jobs", RENTERS), ("Market and money", MONEY), ("GPUs", owners)):
        lines += ["", paint(f"{title}:", "bold")]
        lines += [f"  {paint(n.ljust(13), 'cyan')}{says}" for n, (_, _, says) in commands.items()]
    lines += ["", paint("Example:", "bold"), _EXAMPLE, ""]
    lines.append("`sublet COMMAND --help` says more. SUBLET_BROKER names your broker.")
    return "\n".join(lines)


def _other(name: str, rest: list[str]) -> int:
    module, function, extra, _ = OTHERS[name]
    try:
        command = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        say(CommandError(f"{name}: {missing} is not installed", f"pip install 'sublet[{extra}]'"))
        return ERROR
    try:
        return int(command(rest))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else ERROR


def _wants_json(name: str, rest: list[str]) -> bool:
    # What follows IMAGE is the job's own command, and may well have a --json of its own.
    return name != "run" and "--json" in rest


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*RENTERS, *MONEY, *OTHERS, "version"], 1)
    return f"did you mean `sublet {near[0]}`?" if near else "see: sublet --help"


def _version() -> int:
    from importlib.metadata import version

    print(f"sublet {version('sublet')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
