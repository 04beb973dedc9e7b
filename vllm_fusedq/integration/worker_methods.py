"""The worker's side of the HTTP endpoint: one method that `collective_rpc` can call by name.

vLLM asks endpoint plugins to bring their engine side along. The method is added (nothing of vLLM's
is replaced), and only in processes that run `--quantization fusedq`.
"""

from typing import Any

REPORT_METHOD = "fusedq_report"


def install_worker_methods() -> None:
    """Give vLLM's workers the method `fusedq_report`; idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, REPORT_METHOD, _report)


def _report(worker: Any) -> dict[str, Any]:
    """This worker's live report, as in `docs/schemas/plan.v1.json`."""
    return worker.vllm_config.quant_config.worker.document()
