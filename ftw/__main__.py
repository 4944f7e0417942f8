"""`python -m ftw` is `ftw`."""

import sys

from ftw.cli import main

if __name__ == "__main__":
    sys.exit(main())
