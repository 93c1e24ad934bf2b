"""Held-out loss, generation, scores and their report."""
