"""Meanings and what people wrote for them: a dialogue act with its slots, and the sentences a booking assistant says.

System turns of MultiWOZ and CamRest676, grouped by act and slots in the templates that convlab ships
({act: {"Slot;Slot;": [text, ...]}}, values replaced by #ACT-SLOT#). Kept are texts that name each slot of their group
exactly once, and no other: 966 meanings with 7,925 texts, and 99 with 1,617. Values stay out (`[area]`), so a text can
be checked slot by slot. Some texts say more than their meaning, with values that the templates did not take out.

Splits go by meaning: no meaning of one part has a text in another. A data set of your own is a folder with train.jsonl,
validation.jsonl and test.jsonl, one line per meaning: {"meaning": text, "texts": [text, ...]}; slots are unknown there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck import assets, paths
from limbeck.params import one_of
from limbeck.tasks import classification

_ASSET = "meanings"
FILES = {f"{name}_meanings": f"auto_system_template_nlg_{name}.json" for name in ("multiwoz", "camrest")}
_PLACEHOLDER = re.compile(r"#([^#\s]+)#")
_SLOT = re.compile(r"\[([^\[\]\s]+)\]")


@dataclass(frozen=True)
class Meaning:
    """What is to be said: an act and its slots, or any words as `act`; and the texts that say it, each once."""

    act: str
    slots: tuple[str, ...]
    texts: tuple[str, ...]


def meanings(name: str) -> list[Meaning]:
    """Every meaning of a data set, in the order of acts and slots."""
    one_of("data", name, FILES)
    content = json.loads((assets.path(_ASSET) / FILES[name]).read_text(encoding="utf-8"))
    parsed = [_meaning(act, key, texts) for act, groups in content.items() for key, texts in groups.items()]
    return sorted((meaning for meaning in parsed if meaning.texts), key=lambda meaning: (meaning.act, meaning.slots))


def _meaning(act: str, key: str, texts: Sequence[str]) -> Meaning:
    """The meaning of one group; without texts where a slot occurs twice, or none fits."""
    slots = tuple(slot.lower() for slot in key.split(";") if slot)
    expected = sorted(f"{act}-{slot}".lower() for slot in slots)
    fitting = [text for text in texts if sorted(map(str.lower, _PLACEHOLDER.findall(text))) == expected]
    bracketed = (_PLACEHOLDER.sub(lambda match: f"[{match[1].rpartition('-')[2].lower()}]", text) for text in fitting)
    distinct = dict.fromkeys(" ".join(text.split()) for text in bracketed)
    return Meaning(act, slots, tuple(distinct) if len(set(slots)) == len(slots) else ())


def splits(name: str, sizes: Sequence[int], *, seed: int) -> list[list[Meaning]]:
    """Disjoint random meanings to train on, to validate on and to test on; one size may be -1, for all that is left.

    A folder is split already: there a size is that of its first meanings, -1 for all.
    """
    if name in FILES:
        return classification.draw(meanings(name), sizes, seed=seed)
    if not Path(name).is_dir():
        raise ValueError(f"received data {name!r}, expected a folder, or one of {', '.join(FILES)}")
    parts = zip(("train", "validation", "test"), sizes, strict=True)
    return [_lines(Path(name) / f"{part}.jsonl")[: None if size == -1 else size] for part, size in parts]


def _lines(file: Path) -> list[Meaning]:
    """Raises ValueError, naming file and line, for one that is not {"meaning": text, "texts": [text, ...]}."""
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), start=1):
        try:
            row = paths.parse_json(line) if line.strip() else None
            if row is not None:
                act, texts = row["meaning"], row["texts"]
                if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in (act, *texts)):
                    raise ValueError(f"got {row!r:.200}")
                found.append(Meaning(act, (), tuple(dict.fromkeys(texts))))
        except (KeyError, TypeError, ValueError) as error:
            expected = 'expected {"meaning": text, "texts": [text, ...]}'
            raise ValueError(f"{file}, line {number}: {expected}, cannot read it: {error}") from None
    if not found:
        raise ValueError(f"expected meanings in {file}, found none")
    return found


def prompt(meaning: Meaning) -> str:
    """The meaning in words; a text follows after a space."""
    if not meaning.slots:
        return f"{meaning.act}\nText:"
    act = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", meaning.act).replace("-", " ").lower()
    return f"{act}: {', '.join(f'[{slot}]' for slot in meaning.slots)}\nText:"


def slot_errors(meaning: Meaning, text: str) -> int:
    """Slots that are missing, that were not asked for, or that come again: 0 if each stands there exactly once."""
    named_slots = _SLOT.findall(text)
    extra = sum(slot not in meaning.slots for slot in named_slots)
    return extra + sum(abs(named_slots.count(slot) - 1) for slot in meaning.slots)
