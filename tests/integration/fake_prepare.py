"""In place of slim_core.data.prepare: does what the file `behaviour` beside the source says, `hang` or a status."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--source") + 1]).parent
behaviour = (folder / "behaviour").read_text()
if behaviour == "hang":
    (folder / "pid.tmp").write_text(str(os.getpid()))
    (folder / "pid.tmp").rename(folder / "pid")
    time.sleep(600)
sys.stderr.write("the reason\n")
sys.exit(int(behaviour))
