"""What several fields of a config say together: combinations that cannot be meant.

A field that has no effect beside another one is an error too. Ignoring it would let somebody believe that they froze
layers or set a rank. Every rule looks at the config alone; what is on disk is looked at in ``inputs.py``.
"""

from trainer.config import Config
from trainer.errors import Problem
from trainer.rules.added_tokens import added_token_rules
from trainer.rules.data import legal_rules, source_rules, split_rules
from trainer.rules.evaluation import generation_rules, task_rules, validation_rules
from trainer.rules.launch import launch_rules
from trainer.rules.launch_slurm import slurm_rules
from trainer.rules.matrix import matrix_rules
from trainer.rules.run_folder import name_rules, secret_rules
from trainer.rules.tracking import tracking_rules
from trainer.rules.training import method_rules, model_rules, optim_rules, packing_rules, parallel_rules

__all__ = ["check"]

RULES = (
    name_rules,
    model_rules,
    added_token_rules,
    source_rules,
    split_rules,
    legal_rules,
    task_rules,
    method_rules,
    optim_rules,
    packing_rules,
    parallel_rules,
    launch_rules,
    matrix_rules,
    slurm_rules,
    generation_rules,
    validation_rules,
    tracking_rules,
    secret_rules,
)
"""In the order in which their problems are listed."""


def check(config: Config) -> list[Problem]:
    """Return every combination of fields that cannot be meant; empty: none."""
    return [problem for rule in RULES for problem in rule(config)]
