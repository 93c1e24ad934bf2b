"""The training loop and all that it needs to be exact, guarded and resumable."""
