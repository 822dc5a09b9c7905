"""The tiny model that is served when none is named; ``scripts/make_tiny_model.py`` makes its files."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAME = "neo-tiny"
