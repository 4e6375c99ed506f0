"""What an inspection leaves behind, in one folder:

inspection.json   drift, seams, joins, faults, timings: everything but the single frames
frames.parquet    one row a frame: its time, every measure, and how much its change stands out
inspection.html   the page, one file that loads nothing
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from pipeline.inspection import INSPECTION_VERSION, Inspection
from pipeline.page import render_page


def frame_table(inspection: Inspection) -> pyarrow.Table:
    """One row a frame: `time_s`, every measure (float32), and `z_<change>` for how it stands out."""
    columns: dict[str, Any] = {"time_s": inspection.table["time_s"]}
    columns |= {k: v.astype(np.float32) for k, v in inspection.table.items() if k != "time_s"}
    columns |= {f"z_{k}": v.astype(np.float32) for k, v in inspection.found.z.items()}
    frames = np.arange(len(columns["time_s"]), dtype=np.int32)
    metadata = {"longtake.inspection": str(INSPECTION_VERSION), "film": inspection.film}
    return pyarrow.table({"frame": frames, **columns}, metadata=metadata)


def write_inspection(inspection: Inspection, out: Path) -> dict[str, Path]:
    """Write the three files into `out`, which is made; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(inspection.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    parquet = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(frame_table(inspection), parquet)
    files = {
        "json": (out / "inspection.json", (text + "\n").encode()),
        "parquet": (out / "frames.parquet", parquet.getvalue().to_pybytes()),
        "page": (out / "inspection.html", render_page(inspection).encode()),
    }
    for path, data in files.values():
        _write_whole(path, data)
    return {name: path for name, (path, _) in files.items()}


def _write_whole(path: Path, data: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
