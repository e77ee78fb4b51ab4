"""The exception tree. Each class has its own exit code, so that a script can tell what went wrong."""

from __future__ import annotations


class EdgesafeError(Exception):
    """What happened, where, what was expected and what to do; the base of every error of ours.

    Args:
        what: What happened, as a sentence without a full stop.
        where: The file, option or row it happened in.
        expected: What would have been right.
        todo: What the reader can do about it.

    >>> str(InputError("the prompt is empty", where="--prompt", expected="a question", todo="write one"))
    'the prompt is empty (--prompt). Expected: a question. To do: write one.'
    """

    exit_code: int = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", todo: str = "") -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.todo = todo
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what.rstrip(".") + (f" ({self.where})" if self.where else "") + "."
        if self.expected:
            text += f" Expected: {self.expected.rstrip('.')}."
        if self.todo:
            text += f" To do: {self.todo.rstrip('.')}."
        return text


class ConfigError(EdgesafeError):
    """A TOML file, an option or the install is wrong."""

    exit_code = 10


class InputError(EdgesafeError):
    """A picture, prompt, checkpoint, suite or other input can't be used."""

    exit_code = 11


class AlignError(EdgesafeError):
    """Alignment can't continue."""

    exit_code = 20


class DivergedError(AlignError):
    """A loss or gradient stopped being finite."""

    exit_code = 21


class ExportError(EdgesafeError):
    """A checkpoint can't be turned into a bundle."""

    exit_code = 30


class ParityError(ExportError):
    """An exported graph doesn't compute what transformers computes."""

    exit_code = 31


class UnsupportedModelError(ExportError):
    """The checkpoint's family isn't one that the exporter knows."""

    exit_code = 32


class BundleError(EdgesafeError):
    """The folder isn't a bundle, or its manifest is not valid."""

    exit_code = 40


class FormatVersionError(BundleError):
    """A file has a format version that this edgesafe doesn't read."""

    exit_code = 41


class IntegrityError(BundleError):
    """A file's bytes are not those that were sealed."""

    exit_code = 43


class SignatureError(BundleError):
    """A signature is missing, of another key, or of other bytes."""

    exit_code = 44


class CertificateError(EdgesafeError):
    """A certificate can't be used or written."""

    exit_code = 50


class UncertifiedExitError(CertificateError):
    """No passed verdict allows the exit that was asked for."""

    exit_code = 51


class CertificateMismatchError(CertificateError):
    """The certificate was measured on other bytes."""

    exit_code = 52


class CertificationFailedError(CertificateError):
    """The suite ran and a limit was exceeded. 42 is the code that ``edgesafe smoke`` promises."""

    exit_code = 42


class DeviceError(EdgesafeError):
    """The device can't do what was asked."""

    exit_code = 60


class NoExitFitsError(DeviceError):
    """The budget is below the fastest certified exit."""

    exit_code = 61


class NotMeasuredError(DeviceError):
    """A prediction was asked for that neither a measurement nor the profile supports."""

    exit_code = 62


class SessionError(EdgesafeError):
    """A session can't take or finish a request."""

    exit_code = 70


class BusyError(SessionError):
    """Another answer is being made, and the session was opened to refuse rather than wait."""

    exit_code = 71


class CancelledError(SessionError):
    """The request was cancelled before its answer ended."""

    exit_code = 72


class ClosedError(SessionError):
    """The session was closed."""

    exit_code = 73


class EndpointError(EdgesafeError):
    """A server that answers over the network can't be asked: its address, key, model or replies are wrong."""

    exit_code = 80


class EndpointUnavailableError(EndpointError):
    """A server gave no usable reply in spite of several tries; the same command continues later."""

    exit_code = 81


class HubError(EdgesafeError):
    """The Hugging Face hub says no: no such repository or revision, a missing token or right, or no bundle there."""

    exit_code = 90


class HubUnavailableError(HubError):
    """The hub can't be reached, or not all of a bundle is here; the same command continues later."""

    exit_code = 91
