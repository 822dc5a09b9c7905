"""``python -m neo``."""

from neo.cli import main

if __name__ == "__main__":
    main()
