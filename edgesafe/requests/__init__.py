"""From lists of requests to suites that can be certified, and to training rows."""
