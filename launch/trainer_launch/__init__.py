"""Start the ranks of one machine and see them through to their end. Standard library only."""
