"""What every test may count on: one thread, no network to a hub, the same seed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # noqa: TID251  (set before torch is imported anywhere)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # noqa: TID251
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # noqa: TID251
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # noqa: TID251
