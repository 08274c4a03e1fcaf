"""The tasks that need a package or a simulator of their own, and the schedule of every task."""
