"""Names of parametrized tests."""

import re


def described(value):
    """A case's value without addresses, so that a test has the same name in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))
