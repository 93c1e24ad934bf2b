"""Keep out of the output what libraries say by themselves: ranks write to a pipe, and one line of ours says it.

Progress bars of transformers, and the warning of DeepSpeed, which transformers has imported whenever a model is saved.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import other as unwrapping
from transformers.utils import logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No progress bars from transformers inside; as before afterwards."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def without_importing_deepspeed() -> Iterator[None]:
    """Save a model without a look for DeepSpeed's engine around it, unless somebody here has imported DeepSpeed.

    transformers has accelerate unwrap a model before it is saved, and accelerate imports DeepSpeed for the type of its
    engine wherever it is installed: two seconds and a warning. What nobody has imported wraps nothing.
    """
    if "deepspeed" in sys.modules:
        yield
        return
    look = unwrapping.is_deepspeed_available
    unwrapping.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        unwrapping.is_deepspeed_available = look
