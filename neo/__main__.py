"""``python -m neo``."""

import sys


def main() -> None:
    """Entry point. Imports take a moment, in which Ctrl-C must not look like a fault."""
    try:
        from neo.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
