"""Trimtab: fine-tune language models on one GPU or many, with proof, and without losing a run."""

from trainer import _checkout as _checkout
from trainer import _hints as _hints

__version__ = "0.1.0"
