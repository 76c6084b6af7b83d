"""``python -m benchmarks [NAME ...]``: run the benchmarks named, or list them."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if "\ndef main() -> None:" in path.read_text("utf-8"))


def main() -> int:
    """Run benchmarks by name; each module has a ``main()``."""
    unknown = [name for name in sys.argv[1:] if name not in NAMES]
    if unknown or not sys.argv[1:]:
        print(f"usage: python -m benchmarks NAME ...   names: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in sys.argv[1:]:
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
