"""Checks of options."""


def check_count(name: str, value: int, at_least: int) -> None:
    """Checks an option that counts something.

    Raises:
        ValueError: It is no integer, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"Expected {name} to be an integer of at least {at_least}, got {value!r}."
        )
