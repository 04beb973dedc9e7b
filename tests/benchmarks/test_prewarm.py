"""What `prewarm.py` compiles before others are timed."""

import prewarm
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.types import WeightType


def test_every_group_size_that_is_timed_by_default_is_compiled() -> None:
    found = set(prewarm.compilations(device_by_name("h200")))
    groups = {(each.spec.weight_type, each.spec.group_size) for each in found}
    for weight_type in prewarm.WEIGHT_TYPES:
        usual = {64} if weight_type is WeightType.NF4 else {128, 32}
        assert usual <= {group for of_type, group in groups if of_type is weight_type}
