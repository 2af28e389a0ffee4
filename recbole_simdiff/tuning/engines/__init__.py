"""Search engines, all optional: one file each, behind ``trials.Engine``."""

from recbole_simdiff.tuning.engines import hyperopt, optuna, ray

# Name, as given to ``--engine`` -> engine; the first is the default.
ENGINES = {module.ENGINE.name: module.ENGINE for module in (optuna, hyperopt, ray)}
