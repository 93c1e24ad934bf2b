"""Make a bare checkout runnable: ``kernels/`` and ``launch/`` are source roots beside this package.

Any install, wheel or editable, already provides both packages; then this does nothing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
for _folder in ("kernels", "launch"):
    if find_spec(f"trainer_{_folder}") is None and (CHECKOUT / _folder).is_dir():
        sys.path.append(str(CHECKOUT / _folder))  # appended: it can never shadow anything
