"""`python -m megascale`, which is what torchrun starts."""

import sys

from megascale.cli import main

if __name__ == "__main__":
    sys.exit(main())
