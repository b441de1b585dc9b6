"""MultiWOZ user acts: what a user says to a booking assistant, and which of 17 dialogue acts it is.

Human utterances, grouped by act and slots in the templates that convlab ships (3.3 MB of JSON:
{act: {"slot;slot;": [text, ...]}}), 40,073 texts. convlab warns that some could be inappropriate.
"""

import json

from limbeck import assets

NAME = "multiwoz_acts"


def pairs() -> list[tuple[str, str]]:
    """Every (text, act), duplicates included, in the file's order."""
    templates = json.loads((assets.path(NAME) / "auto_user_template_nlg.json").read_text(encoding="utf-8"))
    return [(text, act) for act, groups in templates.items() for texts in groups.values() for text in texts]
