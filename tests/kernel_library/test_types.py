"""The weight types' records: names that users see, and facts that follow from one encoding."""

import copy
import pickle

import pytest
import torch

from fusedq_kernels.encodings import STORED, Codebook, Codes, Floats
from fusedq_kernels.types import WeightType

FACTS = {
    "uint4": (4, None, True),
    "uint4b8": (4, 8, False),
    "uint8": (8, None, True),
    "uint8b128": (8, 128, False),
    "nf4": (4, None, False),
    "fp4": (4, None, False),
    "float8_e4m3fn": (8, None, False),
    "float4_e2m1f": (4, None, False),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_type_is_known_by_its_name_and_says_its_facts(name):
    weight_type = WeightType(name)
    assert (weight_type.value, weight_type.name) == (name, name.upper())
    assert (weight_type.bits, weight_type.bias, weight_type.has_zero_points) == FACTS[name]
    assert (weight_type.codebook is None) == isinstance(weight_type.encoding, Codes)
    assert pickle.loads(pickle.dumps(weight_type)) is weight_type
    assert copy.deepcopy(weight_type) is weight_type


def test_every_type_is_listed():
    assert [each.value for each in WeightType] == list(FACTS)


ENCODINGS = [Codes(4, STORED), Codes(4, 8), Codebook(4, (0.0,)), Floats(4, 3, nan=True)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_encoding_survives_a_copy(encoding):
    """The compiler's cache compares copies, and a copied marker is the marker."""
    for again in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert again == encoding
        assert getattr(again, "zero", None) is getattr(encoding, "zero", None)


def test_a_codebook_has_an_entry_for_every_code():
    books = [each.encoding for each in WeightType if isinstance(each.encoding, Codebook)]
    assert books
    assert all(len(each.values) == 1 << each.bits for each in books)


def test_floats_are_those_of_torch():
    """E5M2 as well, whose largest exponent is infinity and NaN with IEEE."""
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, floats in (
        (torch.float8_e4m3fn, WeightType.FLOAT8_E4M3FN.encoding),
        (torch.float8_e5m2, Floats(5, 2, nan=False)),
    ):
        values = codes.view(dtype).double()
        found = torch.tensor(floats.values, dtype=torch.float64)
        numbers = values.isfinite()
        assert torch.equal(found[numbers], values[numbers])
        assert torch.equal(found[numbers].signbit(), values[numbers].signbit())
    assert WeightType.FLOAT8_E4M3FN.nan_codes == (0x7F, 0xFF)
    assert not WeightType.NF4.nan_codes


def test_e2m1_is_that_of_the_ocp():
    """Table 5 of the OCP's Microscaling Formats, version 1.0."""
    sizes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert WeightType.FLOAT4_E2M1F.codebook == (*sizes, *(-size for size in sizes))
    assert not WeightType.FLOAT4_E2M1F.nan_codes
