"""KDRL with reward-guided masks: who learns from the teacher, at a constant and an annealed weight (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
