"""KDRL over the weight of the teacher, between GRPO and distillation alone (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
