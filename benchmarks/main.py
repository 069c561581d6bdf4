"""`frd bench`: which of the benchmark's programs an invocation means."""

from __future__ import annotations

import sys

from . import against, compare, cpu

HELP = """also:
  frd bench compare A.json B.json   what has changed from one result file to another
  frd bench --against REV           this version against another git revision, in turns
Each explains itself with --help. In a source checkout, with a GPU: python -m benchmarks.gpu
"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    if any(argument.split("=")[0] == "--against" for argument in arguments):
        return against.main(arguments)
    try:
        return cpu.main(arguments)
    except SystemExit:
        if "--help" in arguments or "-h" in arguments:
            print(HELP, end="")
        raise


if __name__ == "__main__":
    sys.exit(main())
