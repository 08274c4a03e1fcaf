"""Run by hand: python -m tools.NAME. See README.md."""
