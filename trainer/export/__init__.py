"""Weights, inference config, lineage and model card of a finished run, and their check in a fresh process."""
