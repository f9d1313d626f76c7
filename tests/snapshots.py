"""A folder as Hugging Face's cache has it: ``snapshots/<revision>`` of symbolic links to ``blobs``, named by hash."""

import hashlib
import pathlib
import shutil


def snapshot(folder, cache):
    """Copy ``folder`` into the cache; returns the snapshot's path."""
    folder, revision = pathlib.Path(folder), pathlib.Path(cache) / "models--a--b" / "snapshots" / "0123abc"
    blobs = revision.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for file in (each for each in folder.rglob("*") if each.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = revision / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(link.relative_to(revision.parents[1]).parts) - 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    return revision
