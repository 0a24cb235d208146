"""`python -m dalle_fast` is the command `dalle-fast`."""

import sys

from dalle_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
