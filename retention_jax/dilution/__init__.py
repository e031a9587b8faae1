"""Attention dilution: how much attention falls on tokens that are of no use, with a full cache and with what was kept.

With U the tokens useful to a query and a its attention weights, dilution is 1 - sum_{i in U} a_i (arXiv 2605.09649).
A query of the recall task asks for one fact: U is the six tokens that tell of it, `recall.facts_at` says which.
Dilution is measured where the answer is predicted, in every layer and query head; where all of U is evicted it is 1.
`off_facts` is the same with the tokens of any fact for U. Heads that do other work than to look facts up, as all of the
shipped backbone's first layer, are diluted whatever is kept.

`measure.py` weighs attention, `sweep.py` runs policies and budgets, `statements.py` says what must hold, `plots.py`
draws. `python -m retention_jax.dilution` is the command.
"""

from retention_jax.dilution.sweep import run

__all__ = ["run"]
