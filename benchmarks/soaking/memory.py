"""Memory of a server and all its processes while it serves: sampled, and the slope of it."""

import threading
import time

from soaking.processes import resident_bytes

Samples = list[tuple[float, int]]

WARM_UP = 0.3
"""Share of the samples before memory is expected to be flat: queues, pools and caches fill."""


class Sampler(threading.Thread):
    """Samples `(seconds, resident bytes)` of a server's processes until it is stopped."""

    def __init__(self, session: int, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.samples: Samples = []
        self._session, self._every = session, every
        self._stopped = threading.Event()

    def run(self) -> None:
        start = time.monotonic()
        while not self._stopped.is_set():
            self.samples.append((time.monotonic() - start, resident_bytes(self._session)))
            self._stopped.wait(self._every)

    def stop(self) -> Samples:
        self._stopped.set()
        self.join()
        return self.samples


def slope(samples: Samples, warm_up: float = WARM_UP) -> float:
    """MB (10^6 bytes) that memory grows by in a minute: the least-squares line through `samples`
    without the first share `warm_up` of them; 0 where fewer than two are left."""
    kept = samples[int(len(samples) * warm_up) :]
    if len(kept) < 2:
        return 0.0
    mean_x = sum(x for x, _ in kept) / len(kept)
    mean_y = sum(y for _, y in kept) / len(kept)
    spread = sum((x - mean_x) ** 2 for x, _ in kept)
    return sum((x - mean_x) * (y - mean_y) for x, y in kept) / spread * 60 / 1e6
