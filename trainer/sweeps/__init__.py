"""Searching settings: one file of a search space, and many runs of it."""
