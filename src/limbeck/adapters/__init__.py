"""Adapters: NOLA (arXiv 2310.02556) as a method of PEFT, registered by this import, and what it is compared with."""

from limbeck.adapters.baselines import attach_pranc
from limbeck.adapters.checkpoint import quantise, to_lora
from limbeck.adapters.config import NolaConfig
from limbeck.adapters.peft_tables import register

register()

__all__ = ["NolaConfig", "attach_pranc", "quantise", "to_lora"]
