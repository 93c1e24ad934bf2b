"""A run as the driver sees it: its folder, its lock, and the processes that do its stages. Never imports torch."""
