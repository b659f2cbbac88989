"""The addresses of others that the course names: ``python tools/links.py [--check]`` lists them, or asks each.

The tests run without a network; a scheduled workflow runs ``make check-links``. It ends with 1 if an address answers
with an error. One that answers "forbidden" or "too many requests" is there, and is listed as unclear.
"""

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"https?://\w[^\s<>\"'`\\]*")
OURS = ("YOUR_ORGANISATION", "127.0.0.1", "localhost", "example.org", "10.0.0.1")
UNCLEAR = (401, 403, 405, 406, 429, 503)
BROWSER = {"User-Agent": "Mozilla/5.0 (link check of a course)"}


def sources() -> list[Path]:
    """Files whose addresses readers can follow."""
    named = ["README.md", "CONTRIBUTING.md", "LICENSE-TEXT.md", "intro.md", "references.bib", "CITATION.cff"]
    folders = ["chapters/*.md", "chapters/*.ipynb", "data/**/*.md", "results/*.md", "mitoseg_lib/**/*.py"]
    return [ROOT / name for name in named] + [path for folder in folders for path in sorted(ROOT.glob(folder))]


def links_in(text: str) -> set[str]:
    """Addresses in a text, without what follows them in a sentence or in Markdown."""
    found = set()
    for link in LINK.findall(text):
        while link.endswith((".", ",", ";", ":", "*", "}", "|")) or (link.endswith(")") and "(" not in link):
            link = link[:-1]
        link = link.split(")](")[0].split("](")[0]
        if not any(name in link for name in OURS) and "{" not in link:
            found.add(link)
    return found


def text_of(path: Path) -> str:
    """What a reader sees of a file; of a notebook its cells, not its outputs."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def all_links() -> dict[str, list[str]]:
    """Each address, with the files that name it."""
    named = defaultdict(list)
    for path in sources():
        for link in links_in(text_of(path)):
            named[link].append(path.relative_to(ROOT).as_posix())
    return dict(sorted(named.items()))


def answer(link: str) -> str:
    """Ask an address: "" if it is there, "unclear ..." if it doesn't say, else what is wrong."""
    try:
        with urllib.request.urlopen(urllib.request.Request(link, headers=BROWSER), timeout=30):
            return ""
    except urllib.error.HTTPError as error:
        return f"unclear ({error.code})" if error.code in UNCLEAR else f"error {error.code}"
    except (OSError, ValueError) as error:
        return f"no answer ({error})"


def main() -> None:
    """List or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="ask each address")
    named = all_links()
    if not parser.parse_args().check:
        for link, files in named.items():
            print(link, *sorted(set(files)))
        return
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(named, pool.map(answer, named), strict=True))
    for link, said in answers.items():
        if said:
            print(f"{said}: {link} ({', '.join(sorted(set(named[link])))})")
    broken = [link for link, said in answers.items() if said and not said.startswith("unclear")]
    print(f"{len(named)} addresses, {len(broken)} broken")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
