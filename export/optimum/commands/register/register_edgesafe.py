"""``optimum-cli export edgesafe``: `edgesafe export` for people who export with optimum; the same code writes the same bundle.

optimum finds this file by its place, a namespace package in which any distribution registers commands: no ``__init__.py`` here.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class EdgesafeExportCommand(BaseOptimumCLICommand):
    """The command; what it imports waits until it runs, because optimum loads it with every other one."""

    COMMAND = CommandInfo(name="edgesafe", help="Export a vision-language model with all its exits to an edgesafe bundle.")

    def __init__(self, subparsers: Any, *args: Any, from_defaults_factory: bool = False, **more: Any) -> None:
        # optimum registers a file once for each place of the path that has it, as a clone beside an install.
        if from_defaults_factory or self.COMMAND.name not in subparsers.choices:
            super().__init__(subparsers, *args, from_defaults_factory=from_defaults_factory, **more)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """``--model`` and OUT as optimum's own exports have them; the other options are those of `edgesafe export`."""
        from edgesafe.commands import export
        from edgesafe.commands._shared import add_export, folder

        parser.description, parser.allow_abbrev = export.__doc__.partition("\n\nExample:")[0], False
        text = "checkpoint folder, or ORG/NAME[@REVISION] on the Hugging Face hub"
        parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=text)
        parser.add_argument("out", type=folder, metavar="OUT", help="folder of the bundle")
        add_export(parser)

    def run(self) -> None:
        """Export; ends the process with the error's exit code where it fails, as `edgesafe export` does."""
        from edgesafe import cli
        from edgesafe.commands import export

        sys.exit(cli.guarded("export", lambda: export.run(self.args)))


REGISTER_COMMANDS = [(EdgesafeExportCommand, ExportCommand)]
