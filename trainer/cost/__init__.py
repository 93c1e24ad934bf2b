"""What a run uses: written down while it works (``book``, ``ledger``), read from devices (``power``, ``gpu``), added up
with stated factors (``sums``), and put into words (``text``)."""
