"""``python -m foveate_dvis.exporter -o foveate_export.py``: the exporter as a file to copy."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORTER = Path(__file__).with_name("foveate_export.py")


def main(arguments: list[str] | None = None) -> None:
    """Write the file that an old environment needs; see docs/video.md."""
    parser = argparse.ArgumentParser(prog="python -m foveate_dvis.exporter", description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, help="where to write it (default: stdout)")
    chosen = parser.parse_args(arguments)
    text = EXPORTER.read_text(encoding="utf-8")
    if chosen.output is None:
        print(text, end="")
        return
    target = chosen.output / EXPORTER.name if chosen.output.is_dir() else chosen.output
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
