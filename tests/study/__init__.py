"""The study of the alignment methods: a plan of runs, their raw answers, and every table recomputed from those."""
