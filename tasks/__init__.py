"""The tasks that are simulated elsewhere than in envs.py, and the schedule of each task. See README.md."""
