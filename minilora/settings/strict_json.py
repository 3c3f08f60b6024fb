"""JSON from untrusted files, read more strictly than Python does."""

import json
from collections import Counter


def parse_json(text: str | bytes):
    """Return the value of JSON text.

    Raises ValueError also for what Python's parser accepts or crashes on: a duplicate key, half a
    character ("\\ud800"), and too many brackets.
    """

    def without_doubles(pairs: list[tuple[str, object]]) -> dict:
        once = dict(pairs)
        if len(once) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice} occurs twice")
        return once

    try:
        value = json.loads(text, object_pairs_hook=without_doubles)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    return value
