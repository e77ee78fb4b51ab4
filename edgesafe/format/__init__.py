"""Everything of edgesafe that lies on disk: bundles, certificates, suites. Standard library, and Pillow for suites."""
