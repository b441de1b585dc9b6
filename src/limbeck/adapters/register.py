"""PEFT learns of NOLA here.

`register_peft_method` refuses names outside PEFT's own enum, so the entries go into the tables that it would fill.
PEFT reads them by key alone; `tests/adapters/test_register.py` fails where a release changes that. A process that
loads an adapter has to import `limbeck.adapters` first.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from limbeck.adapters.config import NolaConfig
from limbeck.adapters.model import NolaModel

NAME = "NOLA"


def register() -> None:
    """Enter the config, the tuner and the prefix of its parameters."""
    PEFT_TYPE_TO_CONFIG_MAPPING[NAME] = NolaConfig
    PEFT_TYPE_TO_TUNER_MAPPING[NAME] = NolaModel
    PEFT_TYPE_TO_PREFIX_MAPPING[NAME] = NolaModel.prefix
