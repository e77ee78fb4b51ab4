"""From a checkpoint folder to a bundle: one graph per piece of the vision tower, one decoder, every weight once."""

from edgesafe_export.export import export_bundle

__all__ = ["export_bundle"]
