"""Amounts of bytes.  Expected values: the table of TestQuantityParse in k8s.io/apimachinery, quantity_test.go."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.quantity import MAXIMUM, format_quantity, parse_quantity

FROM_KUBERNETES = {
    "1": 1,
    "9": 9,
    "1Ki": 1024,
    "8Ki": 8 * 1024,
    "7Mi": 7 * 1024**2,
    "6Gi": 6 * 1024**3,
    "5Ti": 5 * 1024**4,
    "4Pi": 4 * 1024**5,
    "3Ei": 3 * 1024**6,
    "100Ti": 100 * 1024**4,
    "8k": 8_000,
    "50k": 50_000,
    "7M": 7_000_000,
    "6G": 6_000_000_000,
    "300T": 300 * 10**12,
    "2P": 2 * 10**15,
    "1E": 10**18,
    "1e3": 1_000,
    "1E6": 1_000_000,
    "1e14": 10**14,
    "1E18": 10**18,
    "1.2e3": 1_200,
    "1.3E+6": 1_300_000,
    "1.53E12": 1_530_000_000_000,
    "100.035k": 100_035,
    "10.035M": 10_035_000,
    "7.123456M": 7_123_456,
    "6.987654321G": 6_987_654_321,
    "1.01E": 1_010_000_000_000_000_000,
    "0.5Mi": 512 * 1024,
    "1.": 1,
    "1.G": 1_000_000_000,
    "9Ei": MAXIMUM,
    "9223372036854775807Ki": MAXIMUM,
    # Kept exactly there and rounded up by Value().
    "100.035Ki": 102_436,
    "0.05Gi": 53_687_092,
    "1E-3": 1,
    "0.5": 1,
    "9.01": 10,
    ".001": 1,
    ".0001k": 1,
    "0.0005k": 1,
    "0.000000000001Ki": 1,
}


@pytest.mark.parametrize(("text", "expected"), FROM_KUBERNETES.items())
def test_a_quantity_is_what_kubernetes_takes_it_for(text: str, expected: int) -> None:
    assert parse_quantity(text) == expected
    assert parse_quantity(f"+{text}") == expected


INVALID_IN_KUBERNETES = ["1.1.M", "1+1.0M", "0.1mi", "0.1am", "aoeu", ".5i", "1i", "-3.01i", "-3.01e-"]
NO_QUANTITY = [".", "+", "Gi", "1e", "1e1.5", "1Kii", "1e3M", "1_000", "٣Gi", "0x10", "--1", "inf", "1K"]
NOT_WHOLLY_ONE = ["", " 1", "1 ", "1\n", "1" * 65]


@pytest.mark.parametrize("text", [*INVALID_IN_KUBERNETES, *NO_QUANTITY, *NOT_WHOLLY_ONE])
def test_what_is_no_quantity_by_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of bytes; write for example 10Gi"):
        parse_quantity(text)


@pytest.mark.parametrize("text", ["-1", "-10Gi", "0", "0Gi", "-0", "0e9", "0.000"])
def test_an_amount_that_nothing_fits_into_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount that anything fits into"):
        parse_quantity(text)


def test_thousandths_of_bytes_are_taken_for_the_slip_they_are() -> None:
    with pytest.raises(ValueError, match="'500m' is a fraction of a byte; for megabytes write 500M, or 500Mi"):
        parse_quantity("500m")


@pytest.mark.parametrize(
    ("text", "meant"), [("10GB", "10G"), ("10 GiB", "10Gi"), ("1.5gb", "1.5G"), ("10K", "10k"), ("5gi", "5Gi")]
)
def test_units_as_people_write_them_elsewhere_get_a_hint(text: str, meant: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_quantity(text)
    assert repr(text) in str(refused.value)
    assert str(refused.value).endswith(f"did you mean {meant}?")
    parse_quantity(meant)


@given(st.integers(1, 10**40), st.integers(-(10**12), 10**12))
def test_any_exponent_is_answered_at_once(mantissa: int, exponent: int) -> None:
    value = parse_quantity(f"{mantissa}e{exponent}")
    if abs(exponent) < 1000:
        exact = mantissa * Fraction(10) ** exponent
        assert value - 1 < exact <= value or (value == MAXIMUM < exact)
    else:
        assert value == (MAXIMUM if exponent > 0 else 1)


@given(st.integers(1, MAXIMUM))
def test_an_amount_survives_being_written_and_read(amount: int) -> None:
    assert parse_quantity(format_quantity(amount)) == amount


def test_amounts_are_written_in_the_largest_unit_that_fits_them() -> None:
    assert [format_quantity(amount) for amount in (0, 1, 1023, 1024, 1536 << 20, 10 << 30)] == [
        *("0", "1", "1023", "1Ki", "1536Mi", "10Gi")
    ]


@pytest.mark.parametrize("text", ["1" * 1_000_000 + "x", "1" * 1_000_000, "." * 1_000_000, " " * 1_000_000])
def test_however_long_a_text_is_it_is_refused_at_once(text: str) -> None:
    # In time that grows with its square, this would take a day.
    with pytest.raises(ValueError, match="is not an amount of bytes"):
        parse_quantity(text)
