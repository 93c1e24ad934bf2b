"""The built-in legal tasks, derived on the user's machine from the package ``licensedcode-data`` (CC-BY-4.0).

Nothing is redistributed: the licence texts belong to their authors, and some may only be passed on verbatim. The way
of a row: ``reading`` (files of the package) -> ``clauses`` and ``tasks`` (rows of six tasks) -> ``similarity`` (no row
twice, none near a test row) -> ``derive`` (the whole, with frozen splits by licence family) -> ``store`` (cache).
"""

from trainer.data.legal.store import TASKS, LegalRows, legal_records

__all__ = ["TASKS", "LegalRows", "legal_records"]
