"""SinKD's hyperparameters, one at a time around the released ones (`sweep`)."""

from limbeck.experiments.sinkd.sweep import Params, cells, run

__all__ = ["Params", "cells", "run"]
