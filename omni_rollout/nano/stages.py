"""Finished work on disk: a stage is a folder with a `stage.json` that says what was asked and what came out."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RECORD = "stage.json"


def run_stage(folder: Path, asked: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `work(folder)` unless `folder` already holds its result for exactly the same request.

    Args:
        folder: where the stage writes; emptied first if it holds another request's or an unfinished result.
        asked: everything the result depends on (settings, seed, upstream stages), JSON-serialisable.
        work: does the stage and returns its measurements, JSON-serialisable.

    Returns:
        The record: `asked`, `seconds` (wall time of the work) and `measured`.
    """
    asked = json.loads(json.dumps(asked))  # tuples become lists, as they are in a record read back
    path = folder / RECORD
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["asked"] == asked:
            logger.info("%s: finished earlier with the same settings, reused", folder)
            return record
        logger.info("%s: holds a result for other settings, made anew", folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    start = time.monotonic()
    measured = work(folder)
    record = {"asked": asked, "seconds": round(time.monotonic() - start, 1), "measured": measured}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record
