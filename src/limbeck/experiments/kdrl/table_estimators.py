"""KDRL with other estimators of the teacher's divergence: k3, exact, and top-K forms (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
