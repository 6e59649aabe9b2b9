"""What a report says of the models that were merged: where they lay, what the hub calls them, what their files are told by."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.lora import model_and_adapter
from samerge_ext.checkpoints.places import ADAPTER_WEIGHTS
from samerge_ext.checkpoints.reading import CheckpointError

IN_MEMORY = "(in memory)"  # the path of models that came from no folder

PLACES, PLACE_BYTES = 16, 4096  # of a file, that its fingerprint is made of


def described(name: str, role: str, path: str | Path) -> dict:
    """A model: its "name", "role" ("base", or "expert" of the task ``name``), "path", "hub" name and weight "files", each with
    its "bytes" and "fingerprint".

    path: a folder, a weight file, MODEL+ADAPTER, or `IN_MEMORY`; of one that is gone by now there are no files.
    """
    files = [{"file": f.name, "bytes": f.stat().st_size, "fingerprint": fingerprint(f)} for f in weight_files(path)]
    return {"name": name, "role": role, "path": str(path), "hub": hub_name(path), "files": files}


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """The files that a model's tensors, and an adapter's on top, lie in; none where there is no model."""
    try:
        model, adapter = model_and_adapter(path)
        of_adapter = [adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()] if adapter else []
        if model is None:
            return tuple(of_adapter[:1])
        with open_checkpoint(model, beside_adapter=True) as checkpoint:
            return (*checkpoint.files, *of_adapter[:1])
    except (OSError, CheckpointError):
        return ()


def fingerprint(path: Path) -> str:
    """SHA-256, cut to 16 digits, of a file's size in decimal and of 4 KiB at each of 16 places that are evenly spread, from its
    first byte to its last: it tells models apart at the cost of 64 KiB, and does not prove that no byte was changed."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as file:
        for place in range(PLACES):
            begin = max(0, size - PLACE_BYTES) * place // (PLACES - 1)
            digest.update(os.pread(file.fileno(), PLACE_BYTES, begin))
    return digest.hexdigest()[:16]


def hub_name(path: str | Path) -> str | None:
    """What the hub calls a model that lies in its cache (…/models--OWNER--NAME/snapshots/…); None for all other folders, whose
    names say nothing of the hub."""
    for part in reversed(Path(path).absolute().parts):
        if found := re.fullmatch(r"models--([\w.-]+?)(?:--([\w.-]+))?", part):
            return "/".join(filter(None, found.groups()))
    return None
