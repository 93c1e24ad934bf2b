"""The parts of one rank's work, in the order in which ``worker.py`` goes through them."""
