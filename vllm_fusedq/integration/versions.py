"""Which vLLM versions the plugin runs on."""

import vllm
from packaging.version import InvalidVersion, Version

OLDEST = Version("0.26")
FIRST_UNSUPPORTED = Version("0.34")


def unsupported_version() -> str | None:
    """One sentence why this vLLM is outside the supported range, or None."""
    try:
        found = Version(vllm.__version__)
    except InvalidVersion:
        return f"vLLM reports the version {vllm.__version__!r}, which is not a version number"
    if OLDEST <= Version(found.base_version) < FIRST_UNSUPPORTED:
        return None
    return f"vLLM {found} is installed; vllm-fusedq supports >= {OLDEST} and < {FIRST_UNSUPPORTED}"
