"""Every exit of a checkpoint, asked and judged: rates, paired tests, reports."""
