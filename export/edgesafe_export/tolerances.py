"""Tolerances of the parity checks, each with its reason."""

# Float graphs against transformers: the same float32 arithmetic in another order. Twelve to twenty-four blocks add up to a few
# 1e-6 relative to the largest feature (seen: 2e-6); an exit one block off differs by more than 1e-2.
FLOAT_RELATIVE = 1e-4
# Quantized graphs against the float graphs: share of whole greedy answers that stay the same, over the parity rows of
# all exits.
# A changed answer may happen now and then (the certificate judges what the answers are); one in ten is a broken scheme.
ANSWER_AGREEMENT = 0.90
# At a single exit: shallow exits see little, their answers sit near ties.
ANSWER_AGREEMENT_ONE_EXIT = 0.75
PARITY_ROWS = 32
