"""Helpers that several files of this folder use."""

BUILT_IN = ["CartPole", "DrawerOpen", "Soccer", "SweepInto"]
