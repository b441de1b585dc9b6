"""KDRL from a good teacher, a mediocre one, and a good one of another style (`comparison`)."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
