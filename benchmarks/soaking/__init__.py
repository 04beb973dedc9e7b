"""What `soak.py` does to a server: requests, clients, memory, kills.

`local_server`, which starts one, lies with the examples.
"""

import sys
from pathlib import Path

if (_examples := str(Path(__file__).resolve().parents[2] / "examples")) not in sys.path:
    sys.path.append(_examples)
