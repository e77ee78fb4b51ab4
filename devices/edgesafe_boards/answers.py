"""The tokens of every answer to the suite's rows for devices, at every certified exit, one JSON line each.

Runs on this machine and, with nothing but the wheel beside it, on a board: python answers.py BUNDLE > LINES.
"""

from __future__ import annotations

import json
import sys

from edgesafe import Session
from edgesafe.certify.certify import suite_of
from edgesafe.format.certificate import certified_exits
from edgesafe.format.suite import MAX_NEW_TOKENS
from edgesafe.progress import bar
from edgesafe.runtime.tokenizer import encode_prompt


def main(bundle: str) -> None:
    """Print the lines."""
    # Uncertified too: on a board no certificate counts before smoke has passed there.
    with Session.open(bundle, allow_uncertified=True) as session:
        suite, exits = suite_of(session), certified_exits(session.certificate)
        rows = suite.smoke_rows()
        for row in bar(rows, len(rows), "answers"):
            path = suite.image_path(row)
            features, cut = session.vision_states(path, exits), session.cut(path)
            ids = encode_prompt(session.tokenizer, session.manifest, row.prompt, cut)
            for exit in exits:
                tokens = [int(token) for token in session.tokens(features[exit], ids, MAX_NEW_TOKENS)]
                print(json.dumps({"exit": str(exit), "id": row.id, "tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1])
