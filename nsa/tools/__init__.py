"""Command-line tools: ``python -m nsa.tools.<name>``."""
