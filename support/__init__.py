"""What surrounds a run: settings, run folder, labelers, report, baselines. See README.md."""
