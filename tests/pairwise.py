"""Few rows in which every pair of levels of every two factors meets at least once."""

import itertools
import random


def all_pairs(factors, allowed=lambda row: True, tries=40):
    """Rows (dicts) that cover every allowed pair of levels; always the same rows."""
    rng = random.Random(0)
    names = list(factors)
    missing = [
        {a: x, b: y}
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    ]
    rows = []
    while missing:
        # A pair is dropped if `tries` random rows with it are not allowed.
        candidates = []
        for _ in range(tries):
            row = {name: rng.choice(factors[name]) for name in names} | missing[0]
            if allowed(row):
                candidates.append(row)
        if not candidates:
            missing.pop(0)
            continue
        best = max(candidates, key=lambda row: sum(pair.items() <= row.items() for pair in missing))
        missing = [pair for pair in missing if not pair.items() <= best.items()]
        rows.append(best)
    return rows
