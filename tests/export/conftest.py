"""One traced checkpoint that the export tests share; a test that changes a part makes its own dictionary of them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def job(tiny_llava: Path):
    """The plan of an export of the tiny checkpoint: exits 1 to 3 of 4 blocks, no suite."""
    from edgesafe.device import load_device
    from edgesafe_export.export import Job
    from edgesafe_export.family import load_family

    return Job(load_family(tiny_llava), tiny_llava, "tiny", "0" * 64, load_device("host"), "chain", (1, 2, 3), None, {}, 0)


@pytest.fixture(scope="package")
def parts(job):
    """Its float graphs."""
    from edgesafe_export.export import trace

    return trace(job)


@pytest.fixture(scope="package")
def standalone_parts(job):
    """The same exits as one whole graph each."""
    from dataclasses import replace

    from edgesafe_export.export import trace

    return trace(replace(job, layout="standalone"))


@pytest.fixture(scope="package")
def trained_job():
    """The plan of an export of the reference model, exits 6 and 12: random weights sit near ties, trained ones answer."""
    import edgesafe
    from edgesafe.device import load_device
    from edgesafe_export.export import Job
    from edgesafe_export.family import load_family

    folder = Path(edgesafe.__file__).parent / "reference" / "weights"
    return Job(load_family(folder), folder, "reference", "0" * 64, load_device("host"), "chain", (6, 12), None, {}, 0)


@pytest.fixture(scope="package")
def trained_parts(trained_job):
    """Its float graphs."""
    from edgesafe_export.export import trace

    return trace(trained_job)
