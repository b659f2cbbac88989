"""``python -m mitoseg_lib.phantom FOLDER`` writes the stacks that come with the course."""

import argparse
from pathlib import Path

from mitoseg_lib.phantom import write_bundled

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the stacks that come with the course.")
    parser.add_argument("folder", type=Path)
    write_bundled(parser.parse_args().folder)
