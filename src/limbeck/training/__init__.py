"""Training loops as generators: one optimiser step per `next`; what is minimised is an argument.

`supervised.fit` and `grpo.fit` are the loops; `arm` and `objective` are what the second one minimises.
"""

from limbeck.models.language import require_one_vocabulary
from limbeck.training.objectives import arm, objective
from limbeck.training.rollouts import Problem, Rollout, Run, Settings, Verdict

__all__ = ["Problem", "Rollout", "Run", "Settings", "Verdict", "arm", "objective", "require_one_vocabulary"]
