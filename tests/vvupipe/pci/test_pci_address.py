import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress


@pytest.mark.parametrize(
    ("text", "full"), [("0000:00:10.0", "0000:00:10.0"), ("00:1f.7", "0000:00:1f.7"), ("ABCD:Ef:00.1", "abcd:ef:00.1")]
)
def test_accepted_forms(text, full):
    assert str(PciAddress.parse(text)) == full


@pytest.mark.parametrize(
    "text", ["", "10.0", "00:20.0", "00:10.8", "0:10.0", "0000:00:10", "00:10.0 x", "g0:10.0", "00000:00:10.0"]
)
def test_malformed_address_is_named_in_one_line(text):
    with pytest.raises(UserError) as error:
        PciAddress.parse(text)
    assert "write it like 0000:00:10.0" in str(error.value)
    assert "\n" not in str(error.value)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7))
def test_text_and_back(domain, bus, device, function):
    address = PciAddress(domain, bus, device, function)
    assert PciAddress.parse(str(address)) == address
    assert str(address).endswith(address.short)
