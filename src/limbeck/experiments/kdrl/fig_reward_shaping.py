"""KDRL's joint loss beside the teacher in the reward, before and after the group's normalisation (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
