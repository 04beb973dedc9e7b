"""The weight types' records: names that users see, and facts that follow from one encoding."""

import copy
import pickle

import pytest

from fusedq_kernels.encodings import STORED, Codebook, Codes
from fusedq_kernels.types import WeightType

FACTS = {
    "uint4": (4, None, True),
    "uint4b8": (4, 8, False),
    "uint8": (8, None, True),
    "uint8b128": (8, 128, False),
    "nf4": (4, None, False),
    "fp4": (4, None, False),
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


@pytest.mark.parametrize("encoding", [Codes(4, STORED), Codes(4, 8), Codebook(4, (0.0,))])
def test_an_encoding_survives_a_copy(encoding):
    """The compiler's cache compares copies, and a copied marker is the marker."""
    for again in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert again == encoding
        assert getattr(again, "zero", None) is getattr(encoding, "zero", None)


def test_a_codebook_has_an_entry_for_every_code():
    books = [each.encoding for each in WeightType if isinstance(each.encoding, Codebook)]
    assert books
    assert all(len(each.values) == 1 << each.bits for each in books)
