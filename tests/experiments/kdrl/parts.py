"""What the tests of KDRL's experiments share: a size of seconds, and a section with other values in any part."""

import dataclasses

from limbeck import params

SMALL = {
    "terms": (2, 2),
    "longer_terms": (3, 3),
    "train_sizes": (120, 20, 20),
    "test_size": 8,
    "validation_size": 6,
    "longest": 12,
    "measured": ("in_domain", "larger"),
    "names": ("teacher", "base", "student"),
    "begins": ("nothing", "nothing", "base"),
    "start_seeds": (0, 1, 2),
    "mistakes": (0.0, 0.0, 0.2),
    "terse": (0.0, 0.0, 0.3),
    "start_steps": (120, 60, 4),
    "rates": (0.02, 0.02, 0.005),
    "start_batch": 32,
}


def changed(section, **changes):
    """The section with other values of some keys; they are checked as when it is loaded."""
    mine, theirs = {}, {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            inside = {name: changes[name] for name in changes.keys() & params.flat(value).keys()}
            theirs |= {field.name: changed(value, **inside)}
        elif field.name in changes:
            mine[field.name] = changes[field.name]
    return dataclasses.replace(section, **theirs, **mine)
