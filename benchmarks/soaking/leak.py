"""A worker that leaks on purpose: `soak.py --leak` must fail on it.

It keeps, of each request, a buffer of the request's own size: the hidden states of its prompt.
"""

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

KEPT: list[torch.Tensor] = []


class LeakingWorker(CPUWorker):
    """`--worker-cls soaking.leak.LeakingWorker`, with this folder's parent on PYTHONPATH."""

    def execute_model(self, scheduler_output: Any) -> Any:
        config = self.model_config
        for new in scheduler_output.scheduled_new_reqs:
            size = (len(new.prompt_token_ids), config.get_hidden_size())
            KEPT.append(torch.ones(size, dtype=config.dtype))
        return super().execute_model(scheduler_output)
