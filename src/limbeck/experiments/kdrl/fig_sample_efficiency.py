"""How fast GRPO, distillation and KDRL learn, from students that succeed more or less often (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
