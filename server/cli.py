"""The `strongroom` command: finds the verb's module, runs it, and turns an error into one clear line."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import pkgutil
import sys
from typing import TYPE_CHECKING, Protocol, cast

import server.commands
from server.errors import SealError, StrongroomError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Command(Protocol):
    """What a module in `server/commands/` holds."""

    HELP: str
    EPILOG: str

    @staticmethod
    def configure(parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""
        ...

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Do it; return the exit code."""
        ...


def verbs() -> list[str]:
    """Return the names of all verbs, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(server.commands.__path__))


def load_command(verb: str) -> Command:
    """Import one verb's module; others stay unloaded, for some need optional packages."""
    return cast("Command", importlib.import_module(f"server.commands.{verb}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="strongroom",
        description="An on-premise inference server for code assistants. 'strongroom VERB --help' tells more of each.",
        epilog="Example: strongroom serve --config configs/strongroom.yaml",
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    names = verbs()
    if arguments and arguments[0] in names:
        command = load_command(arguments[0])
        parser = argparse.ArgumentParser(
            prog=f"strongroom {arguments[0]}",
            description=command.HELP[:1].upper() + command.HELP[1:].rstrip(".") + ".",
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(parser)
        try:
            return command.run(parser.parse_args(arguments[1:]))
        except SealError as err:
            print(f"strongroom: {err} {err.detail}", file=sys.stderr)
            return 1
        except StrongroomError as err:
            print(f"strongroom: {err}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # `strongroom … | head`
            sys.stderr.close()
            return 0
    top.add_argument("verb", nargs="?", help="one of: " + ", ".join(names), metavar="VERB")
    args = top.parse_args(arguments[:1])
    if args.version:
        print(importlib.metadata.version("strongroom"))
        return 0
    if args.verb is None:
        top.print_help()
        return 2
    print(f"strongroom: there is no verb {args.verb!r}; choose from {', '.join(names)}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
