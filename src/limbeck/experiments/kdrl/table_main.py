"""KDRL beside SFT, GRPO and on-policy distillation, in domain and on harder chains (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
