"""`python -m tests.ecosystem`: see runner.py."""

import sys

from tests.ecosystem.runner import main

if __name__ == "__main__":
    sys.exit(main())
