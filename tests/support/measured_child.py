"""A process for `vllm_fusedq.measure.process` that needs no engine: it does what it is asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vllm_fusedq import errors
from vllm_fusedq.measure.process import OnReport, answer


def main(request: dict[str, Any], folder: Path, report: OnReport) -> None:
    print("said by the child")
    report({"pid": os.getpid(), "session": os.getsid(0)})
    match request["do"]:
        case "raise":
            error = getattr(errors, request["type"], None) or type(
                request["type"], (Exception,), {}
            )
            raise error(request["message"])
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            report({"grandchild": grandchild.pid})
            time.sleep(600)
    (folder / "answer").write_text(request["do"])


if __name__ == "__main__":
    answer(main)
