"""What a certificate is worth on this machine: the exits whose verdict speaks for what runs here."""

from __future__ import annotations

from dataclasses import dataclass

from edgesafe.errors import EdgesafeError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import Certificate, certified_exits
from edgesafe.format.exits import Exit
from edgesafe.runtime.engine import Engine
from edgesafe.runtime.kernels import kernels_here, kernels_of
from edgesafe.runtime.smoke_record import Ran, read_records


@dataclass(frozen=True)
class Standing:
    """The exits that are certified here, ascending; ``why`` says why others that passed are not, a clause."""

    exits: tuple[Exit, ...] = ()
    why: str = ""


def standing(bundle: Bundle, certificate: Certificate | None, engine: Engine) -> Standing:
    """Which passed exits are certified with this engine on this machine.

    All of them where the same kernels run that made the certificate. Elsewhere those that ``edgesafe smoke`` passed here. A run
    that failed here, or whose record can't be read, takes all of them away, wherever the certificate was made.

    Raises:
        CertificateError: The certificate says in a wrong type what made it.
    """
    passed = certified_exits(certificate)
    if certificate is None or not passed:
        return Standing()
    here, made = kernels_here(engine), kernels_of(certificate)
    try:
        records = read_records(bundle, Ran(bundle.digest, certificate.digest, here))
    except EdgesafeError as error:
        return Standing((), f"the record of `edgesafe smoke` here can't be used: {error.what} ({error.where})")
    failed = [record for record in records if not record.passed]
    if failed:
        return Standing((), f"`edgesafe smoke` failed here: {failed[0].reasons[0]}")
    if made == here:
        return Standing(passed)
    ran = {exit for record in records for exit in record.exits}
    if ran:
        left = ", ".join(str(exit) for exit in passed if exit not in ran)
        why = f"`edgesafe smoke` didn't run exits {left} here" if left else ""
        return Standing(tuple(exit for exit in passed if exit in ran), why)
    if made is None:
        return Standing((), "the certificate doesn't say what computed its answers, and `edgesafe smoke` has not passed here")
    return Standing((), f"the certificate was made elsewhere and `edgesafe smoke` has not passed here: {made.unlike(here)}")
