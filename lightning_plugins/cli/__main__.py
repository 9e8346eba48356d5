"""``python -m lightning_plugins.cli`` is ``lightning-plugins``."""

import sys

from lightning_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
