"""The loading benchmark measures every packing at every width, through the formats themselves."""

import time

import torch

from bench_load import DEVICES, describe, measure
from random_layers import random_layers


def test_every_random_layer_loads_on_both_devices() -> None:
    descriptions = []
    for made in random_layers(64, 256, 128):
        layer = describe(made)
        assert (layer.n, layer.k) == (64, 256)
        descriptions.append(layer.description)
        for device in DEVICES:
            seconds, packed = measure(
                layer, made.tensors, device, 1, time.perf_counter, torch.device("cpu")
            )
            assert packed > 64 * 256 * layer.spec.weight_type.bits // 8
            assert len(seconds) == 1
    formats = {name.split()[0] for name in descriptions}
    assert formats == {"gptq", "awq", "compressed-tensors", "bitsandbytes"}
    widths = [sum(f"{bits}-bit" in name for name in descriptions) for bits in range(2, 9)]
    assert all(count >= 2 for count in widths)
