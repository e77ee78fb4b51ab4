"""A camera that asks about what moved: once for each motion, on a Raspberry Pi, with picamera2's arrays.

Answers go to standard output, and everything to a log without pictures: refusals, exits, verdicts, times and errors.

  python camera.py BUNDLE --question "What is in front of the door?" --log camera.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesafe import Budget, EdgesafeError, Session, refuses

SIZE = (640, 480)
BUDGET_MS = 10_000  # beyond it a person would want to see progress
STEP = 8  # every so many-th pixel is compared
CHANGED = 16.0  # of 255, by which a pixel's brightness changes when something moves; a sensor's noise stays below
MOVED = 0.02  # share of pixels that make a motion
STILL_FRAMES = 5  # after so many frames without motion, the next one counts as another
LIGHTS = 0.8  # where as many pixels change at once, the light did


@dataclass
class Motion:
    """Tells the frame to ask about: the first one that is still again after a motion began, or the last one that waits.

    Args:
        patience: Frames after which a motion that doesn't end is asked about all the same.
    """

    patience: int = 30
    _last: np.ndarray | None = None
    _moving: int = 0
    _still: int = STILL_FRAMES
    _asked: bool = False

    def asks(self, frame: np.ndarray) -> bool:
        """Whether this frame, uint8 [H,W,3], is the one of its motion to ask about."""
        small = frame[::STEP, ::STEP].mean(axis=2)
        last, self._last = self._last, small
        if last is None or last.shape != small.shape:
            return False
        share = float((np.abs(small - last) > CHANGED).mean())
        if MOVED <= share < LIGHTS:
            self._moving, self._still = self._moving + 1, 0
        else:
            self._still += 1
        if self._still >= STILL_FRAMES and self._asked:
            self._moving, self._asked = 0, False
        due = self._moving and not self._asked and (self._still > 0 or self._moving >= self.patience)
        self._asked = self._asked or bool(due)
        return bool(due)


def watch(frames: Iterable[np.ndarray], session: Session, question: str, log: Path, motion: Motion) -> Iterator[dict[str, Any]]:
    """Ask once for each motion; what was asked and answered, as it is kept.

    Args:
        frames: uint8 [H,W,3], red first.
        session: An opened bundle.
        question: Asked each time.
        log: One JSON object a line, appended to.
        motion: Picks the frames.
    """
    for frame in frames:
        if not motion.asks(frame):
            continue
        row: dict[str, Any] = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "question": question}
        try:
            answer = session.ask(frame, question, Budget(ttft_ms=BUDGET_MS, on_miss="shallowest"))
            row |= {"refused": refuses(answer.text, question), **answer.to_dict()}
        except EdgesafeError as error:
            row["error"] = f"{type(error).__name__}: {error}"
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"bundle": session.bundle.digest}) + "\n")
        yield row


def pictures() -> Iterator[np.ndarray]:
    """The camera's frames, red first, for ever; newer ones replace those that nobody took."""
    try:
        from picamera2 import Picamera2  # of Raspberry Pi OS: sudo apt install python3-picamera2
    except ImportError:
        sys.exit("no picamera2 here: sudo apt install python3-picamera2, in an environment made with --system-site-packages")
    with Picamera2() as camera:
        # The format that is named BGR888 has red first in its arrays.
        camera.configure(camera.create_video_configuration(main={"size": SIZE, "format": "BGR888"}))
        camera.start()
        while True:
            yield camera.capture_array("main")


def main(arguments: list[str] | None = None) -> int:
    """Watch until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="certified and measured on this board")
    parser.add_argument("--question", default="What is it?", metavar="TEXT", help="asked at each motion (%(default)s)")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="everything but pictures, a JSON object a line")
    args = parser.parse_args(arguments)
    try:
        args.log.open("a").close()
        with Session.open(args.bundle) as session:
            if not session.certified:
                parser.exit(51, f"no exit is certified on this board: {session.standing.why or 'the bundle has none'}\n")
            for row in watch(pictures(), session, args.question, args.log, Motion()):
                print(row.get("text", row.get("error")), flush=True)
    except EdgesafeError as error:
        parser.exit(error.exit_code, f"{type(error).__name__}: {error}\n")
    except OSError as error:
        parser.exit(11, f"{error.filename}: {error.strerror}\n")
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
