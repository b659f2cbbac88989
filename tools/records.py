"""Records of what ``make bench`` has measured, in results/speed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from mitoseg_lib import __version__
from mitoseg_lib.files import write_whole
from mitoseg_lib.recording import device_name

FOLDER = Path(__file__).resolve().parents[1] / "results" / "speed"


@contextmanager
def recording(name: str) -> Iterator[dict]:
    """Add what is measured to ``NAME.json``."""
    path = FOLDER / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    yield record
    record |= {
        "date": date.today().isoformat(), "device": device_name(), "cores": os.cpu_count(),
        "library_version": __version__,
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
