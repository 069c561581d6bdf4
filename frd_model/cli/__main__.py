"""`python -m frd_model.cli`: the `frd` command."""

import sys

from frd_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
