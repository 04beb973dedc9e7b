"""Where this machine's user keeps what is made here: compiled libraries, measured rows."""

import os
from pathlib import Path


def user_cache(what: str) -> Path:
    """The folder for `what` in $XDG_CACHE_HOME, else in ~/.cache; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vllm-fusedq" / what
