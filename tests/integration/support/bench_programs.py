"""Processes of a turn as `bench.common.run_programs` starts them, without anything to measure."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bench import timing

if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    match sys.argv[1]:
        case "serve":
            asyncio.run(timing.until_figures(folder))
        case "call":
            timing.write_figures({"servers": len(list(folder.glob("up-*")))}, folder)
        case other:
            print(f"no such side: {other}")
            sys.exit(3)
