"""The check of an option that is a word."""


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {', '.join(choices)}")
