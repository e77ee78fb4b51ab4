"""What computes the answers: two machines on which this is the same run the same code on a bundle's numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgesafe.errors import CertificateError
from edgesafe.format.certificate import Certificate
from edgesafe.format.fields import Fields
from edgesafe.processor import instruction_sets
from edgesafe.runtime.engine import Engine


@dataclass(frozen=True)
class Kernels:
    """An engine, the bytes of its program where it tells, its execution providers, and what it picks its kernels by."""

    engine: str
    engine_version: str
    engine_build: str
    providers: tuple[str, ...]
    instruction_sets: str

    def __str__(self) -> str:
        return f"{self.engine} {self.engine_version} on {self.instruction_sets}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "providers": list(self.providers)}

    def unlike(self, other: Kernels) -> str:
        """Which of them differ, as a clause; empty where none does.

        >>> ours = Kernels("onnxruntime", "1.32.0", "ab12", ("CPUExecutionProvider",), "aarch64 asimddp")
        >>> ours.unlike(ours), ours.unlike(Kernels("onnxruntime", "1.31.0", "ab12", ("CPUExecutionProvider",), "aarch64"))
        ('', 'onnxruntime 1.31.0 instead of onnxruntime 1.32.0, instruction sets aarch64 instead of aarch64 asimddp')
        """
        mine, theirs = self._told(), other._told()
        unlike = [name for name in mine if mine[name] != theirs[name]]
        # Another version, or one for another architecture, is another build of course.
        if "engine" in unlike or self.instruction_sets.partition(" ")[0] != other.instruction_sets.partition(" ")[0]:
            unlike = [name for name in unlike if name not in ("build", "providers")]
        return ", ".join(f"{'' if name == 'engine' else name + ' '}{theirs[name]} instead of {mine[name]}" for name in unlike)

    def _told(self) -> dict[str, str]:
        return {
            "engine": f"{self.engine} {self.engine_version}",
            "build": self.engine_build or "unknown",
            "providers": ", ".join(self.providers) or "unknown",
            "instruction sets": self.instruction_sets,
        }


def kernels_here(engine: Engine) -> Kernels:
    """What an engine runs on this machine. ``build`` and ``providers`` are an engine's own to tell or to leave out."""
    return Kernels(
        engine.name,
        engine.version,
        str(getattr(engine, "build", "")),
        tuple(getattr(engine, "providers", ())),
        instruction_sets(),
    )


def kernels_of(certificate: Certificate) -> Kernels | None:
    """What made a certificate's answers; None where an earlier edgesafe didn't write it down.

    Raises:
        CertificateError: It is written down in a wrong type.
    """
    fields = Fields(certificate.environment, "the certificate: environment", CertificateError)
    return read_kernels(fields) if fields.has("instruction_sets") else None


def read_kernels(fields: Fields) -> Kernels:
    """The kernels of a table; whoever reads more of it goes on with the same fields."""
    return Kernels(
        engine=fields.text("engine"),
        engine_version=fields.text("engine_version"),
        engine_build=fields.text("engine_build"),
        providers=fields.texts("providers"),
        instruction_sets=fields.text("instruction_sets"),
    )
