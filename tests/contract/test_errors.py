"""The exit codes are a promise to scripts: the numbers below are the written list, not read from the classes."""

from __future__ import annotations

import pytest

from edgesafe import errors

CODES = {
    "EdgesafeError": 1,
    "ConfigError": 10,
    "InputError": 11,
    "AlignError": 20,
    "DivergedError": 21,
    "ExportError": 30,
    "ParityError": 31,
    "UnsupportedModelError": 32,
    "BundleError": 40,
    "FormatVersionError": 41,
    "CertificationFailedError": 42,
    "IntegrityError": 43,
    "SignatureError": 44,
    "CertificateError": 50,
    "UncertifiedExitError": 51,
    "CertificateMismatchError": 52,
    "DeviceError": 60,
    "NoExitFitsError": 61,
    "NotMeasuredError": 62,
    "SessionError": 70,
    "BusyError": 71,
    "CancelledError": 72,
    "ClosedError": 73,
    "EndpointError": 80,
    "EndpointUnavailableError": 81,
    "HubError": 90,
    "HubUnavailableError": 91,
}
PARENTS = {
    "DivergedError": "AlignError",
    "ParityError": "ExportError",
    "UnsupportedModelError": "ExportError",
    "FormatVersionError": "BundleError",
    "IntegrityError": "BundleError",
    "SignatureError": "BundleError",
    "CertificationFailedError": "CertificateError",
    "UncertifiedExitError": "CertificateError",
    "CertificateMismatchError": "CertificateError",
    "NoExitFitsError": "DeviceError",
    "NotMeasuredError": "DeviceError",
    "BusyError": "SessionError",
    "CancelledError": "SessionError",
    "ClosedError": "SessionError",
    "EndpointUnavailableError": "EndpointError",
    "HubUnavailableError": "HubError",
}


def test_every_error_has_its_own_written_exit_code():
    found = {n: c.exit_code for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}
    assert found == CODES
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("name", sorted(CODES))
def test_the_tree(name):
    parent = PARENTS.get(name, "EdgesafeError" if name != "EdgesafeError" else "Exception")
    assert getattr(errors, name).__mro__[1].__name__ == parent


def test_message_says_what_where_expected_and_what_to_do():
    error = errors.InputError("it broke", where="row 3", expected="a whole one.", todo="mend it")
    assert str(error) == "it broke (row 3). Expected: a whole one. To do: mend it."
    assert str(errors.InputError("it broke")) == "it broke."
