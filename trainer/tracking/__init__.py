"""The process beside the training that shows a run to trackers. It reads the run folder; nothing waits for it."""
