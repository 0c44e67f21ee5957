"""Whether a checkpoint is whole: every file is there and is, byte for byte, the one that was written."""

from collections.abc import Iterator
from pathlib import Path

from weft.parallel.checkpoint.errors import CheckpointError
from weft.parallel.checkpoint.files import checksum_of
from weft.parallel.checkpoint.manifest import MANIFEST, read_manifest


def problems_of(directory: Path) -> Iterator[str]:
    """Each thing that is wrong with a checkpoint, as a sentence; nothing when it is whole. Reads all of it."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        yield str(error)
        return
    for name, record in manifest.files.items():
        path = directory / name
        try:
            size = path.lstat().st_size
            if size != record.bytes:
                yield f"{path} is damaged: it has {size} bytes instead of {record.bytes}"
            elif f"{checksum_of(path):08x}" != record.crc32:
                yield f"{path} is damaged: its checksum is not the manifest's"
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror or error})"
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST and path.name not in manifest.files:
            yield f"{path} is not listed in the manifest"
