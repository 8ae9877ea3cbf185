"""Our errors on the wire."""

import pytest
from grpclib.const import Status
from grpclib.metadata import encode_grpc_message

from cknix_csi.api import errors
from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Code, Situation
from cknix_csi.csi.errors import MAX_ENCODED_MESSAGE, fitting, grpc_error, status_of

# The numbers of gRPC's canonical codes.
NUMBERS = {
    Code.INVALID_ARGUMENT: 3,
    Code.NOT_FOUND: 5,
    Code.ALREADY_EXISTS: 6,
    Code.RESOURCE_EXHAUSTED: 8,
    Code.FAILED_PRECONDITION: 9,
    Code.ABORTED: 10,
    Code.OUT_OF_RANGE: 11,
    Code.UNIMPLEMENTED: 12,
    Code.INTERNAL: 13,
    Code.UNAVAILABLE: 14,
}


@pytest.mark.parametrize("code", list(Code))
def test_a_code_keeps_its_name_and_number(code: Code) -> None:
    assert status_of(code).value == NUMBERS[code]
    assert status_of(code).name == code.value


def test_transient_codes_are_those_after_which_kubelet_promises_to_unpublish() -> None:
    # kubelet's isFinalError: Canceled, DeadlineExceeded, Unavailable, ResourceExhausted and Aborted are not final.
    not_final = {
        Status.CANCELLED,
        Status.DEADLINE_EXCEEDED,
        Status.UNAVAILABLE,
        Status.RESOURCE_EXHAUSTED,
        Status.ABORTED,
    }
    assert {status_of(code) for code in Code if code.transient} == not_final - {
        Status.CANCELLED,
        Status.DEADLINE_EXCEEDED,
    }


@pytest.mark.parametrize("kind", [errors.Conflict, errors.NotFound, errors.InProgress, errors.MountFailed])
def test_an_error_has_its_message_and_no_details(kind: type[CknixError]) -> None:
    translated = grpc_error(kind("what happened"))
    assert (translated.message, translated.details) == ("what happened", None)


def test_an_error_without_words_says_its_reason() -> None:
    assert grpc_error(CknixError("", Situation.WRONG_SYSTEM)).message == "WrongSystem"


@pytest.mark.parametrize("filler", ["x", "\n", "é", "…", "漢", "😀"])
def test_a_message_that_would_not_fit_a_trailer_keeps_its_beginning_and_end(filler: str) -> None:
    message = fitting("Expression default/hello failed: " + filler * 20_000 + " error: attribute 'helo' missing")
    assert len(encode_grpc_message(message)) <= MAX_ENCODED_MESSAGE
    assert message.startswith("Expression default/hello failed: ")
    assert message.endswith(" error: attribute 'helo' missing")


def test_a_message_that_fits_stays_as_it_is() -> None:
    assert fitting("a\nb … é") == "a\nb … é"


def test_a_file_name_that_is_no_text_can_be_sent() -> None:
    assert fitting("bad \udcff name") == "bad ? name"
