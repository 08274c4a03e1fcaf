"""Programs that are run by hand, each as `python -m tools.NAME`."""
