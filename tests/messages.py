"""Patterns of error messages, for the `match` of pytest.raises."""

import re


def with_words(*words):
    """A message with all the words, in any order."""
    return r"(?s)\A" + "".join(f"(?=.*{re.escape(str(word))})" for word in words)


def about(argument, *words):
    """A message that begins with the argument's name and has all the words."""
    return with_words(*words) + re.escape(f"{argument}:")
