"""Few shots of digits that a small ViT has not seen: seven ways to learn from them (`few_shot`)."""

from limbeck.experiments.nola.few_shot import cells, run
from limbeck.experiments.nola.vision_section import Section as Params

__all__ = ["Params", "cells", "run"]
