"""`python -m castalia.pages [FOLDER]`: write the generated pages to FOLDER, by default docs/."""

import sys
from pathlib import Path

from castalia.core.errors import CastaliaError
from castalia.pages.all import PAGES, write_pages


def main(words: list[str]) -> int:
    """Write the pages and name those that changed; 1 after an error."""
    folder = Path(words[0] if words else "docs")
    try:
        changed = write_pages(folder)
    except CastaliaError as error:
        print(f"castalia.pages: error: {error}", file=sys.stderr)
        return 1
    for name in PAGES:
        state = "current"
        if name in changed:
            state = "written"
        print(f"{folder / name}: {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
