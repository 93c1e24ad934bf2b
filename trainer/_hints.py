"""Keep out of the output of every process what a library says while it is imported, before anybody could ask it not to.

bitsandbytes, which peft imports wherever it is installed, warns on processors with bf16 that a kernel for inference was
not fetched from the Hub. Nothing here uses that kernel (``quantised.py`` keeps weights as they are trained).
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
