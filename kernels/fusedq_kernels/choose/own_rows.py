"""The user's own measured rows: `fusedq tune` writes them, `tuning.table_for` puts them first.

They lie in the user's cache folder as `tuned/triton-<minor>/<device>.json`, in the format of the
packaged files: one for each device and minor version of Triton. No other file serves, and none that
breaks the format; `own_rows` says which were left alone and why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusedq_kernels.choose.tuned_file import TunedTable, minor, read
from fusedq_kernels.types import DeviceSpec
from fusedq_kernels.user_cache import user_cache

_TRITON = "triton-"


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The user's `table` for a device, None without one; `unused` says why other files are not."""

    table: TunedTable | None = None
    unused: tuple[str, ...] = ()


def own_file(device: DeviceSpec, triton: str) -> Path:
    """The file of a device and a version of Triton, which need not exist."""
    version = ".".join(map(str, minor(triton)))
    return user_cache("tuned") / f"{_TRITON}{version}" / f"{device.name}.json"


def own_rows(device: DeviceSpec, triton: str | None) -> OwnRows:
    """What the user has measured on a device under this Triton, None if none is installed."""
    if triton is None:
        return OwnRows()
    path = own_file(device, triton)
    unused = list(_of_others(device, triton, path))
    if not path.is_file():
        return OwnRows(None, tuple(unused))
    try:
        tables = read(path, device.capability, yours=True)
    except (OSError, ValueError) as error:
        return OwnRows(None, (f"{path}: not used, as it cannot be read: {error}", *unused))
    found = next((table for table in tables if minor(table.triton) == minor(triton)), None)
    if found is None:
        versions = ", ".join(table.triton for table in tables) or "none"
        unused.append(f"{path}: not used: measured with Triton {versions}, this is {triton}")
    return OwnRows(found, tuple(unused))


def _of_others(device: DeviceSpec, triton: str, own: Path) -> Iterator[str]:
    for path in sorted(user_cache("tuned").glob(f"{_TRITON}*/*.json")):
        version = path.parent.name.removeprefix(_TRITON)
        if path == own:
            continue
        if path.stem != device.name:
            yield f"{path}: not used: measured on {path.stem}, this is {device.name}"
        else:
            yield f"{path}: not used: measured with Triton {version}, this is {triton}"
