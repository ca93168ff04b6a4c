"""The `sublet` command: finds the subcommand and loads only what it needs."""

import sys
from importlib import import_module

OTHERS = {
    "broker": ("sublet_broker.main", "main", "broker"),
    "provide": ("sublet_agent.main", "main", "agent"),
    "provider": ("sublet_agent.main", "provider_main", "agent"),
    "demo": ("sublet.demo.main", "main", "demo"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    module, function, _extra = OTHERS[arguments[0]]
    return int(getattr(import_module(module), function)(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
