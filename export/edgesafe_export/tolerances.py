"""Tolerances of the parity checks, each with its reason. Seen: the reference model, float32, 2 cores, x86-64."""

# Float graphs against transformers, image features and logits: the same float32 arithmetic in another order. The reference
# model's twelve blocks and four layers add up to about 1e-6 relative to the largest value (seen: 1.1e-6); an exit one block off
# differs by more than 1e-2.
FLOAT_RELATIVE = 1e-4
# Probes that each exit's features, and each exit's logits with and without a cache, are compared on. A wrong graph is wrong on
# every picture; more probes only cost time.
FEATURE_ROWS = 4
LOGIT_ROWS = 2
# Whole answers compared with transformers' generate, and their length: the loop around the graphs, not the graphs.
GENERATE_ROWS = 4
GENERATE_TOKENS = 12
# Quantized graphs against the float graphs on tiny random models, root mean square difference over that of the float values.
# int8-dynamic features of three blocks were seen to be off by 0.01 to 0.07, an exit one block off by 0.3 to 1.1; int8-block32
# logits by up to 0.025.
QUANTIZED_FEATURES = 0.1
QUANTIZED_LOGITS = 0.05
# Requests that the finished bundle answers, at every exit of a model that is compared whole.
PARITY_ROWS = 32
# Of a model that is compared in pieces, where a picture may cost a minute: half of the requests at the reference, half at the
# shallowest exit, and so many about each picture.
LARGE_ROWS = 24
ROWS_PER_PICTURE = 4
# What a quantized piece adds to the state that it is given, against what the float one adds, root mean square: four bits in
# blocks of 32 were seen at 0.06 to 0.12 and int8 at 0.01 to 0.05 on random weights. Another block's weights are off by 1.4, a
# missing piece by 1.
PIECE_QUANTIZED = 0.5
# Tokens that the decoder's pieces are compared on, and how many of them come one run later, on top of a cache. A layer computes
# the same for every token; more only cost time.
PIECE_TOKENS = 24
PIECE_CACHED = 2
# A model with more weights than this is compared piece by piece alone. All of it in float32 beside its float graphs would
# not fit the memory that an export is meant to keep to (SmolVLM-256M: beyond 4 GiB), and its answers at every exit would take
# far longer than the export (SmolVLM reads a picture as 17 tiles).
WHOLE_WEIGHTS = 100_000_000
# The finished bundle's answers beside the checkpoint's: Kullback-Leibler divergence over the next token, nats, in each place. A
# near tie that turns diverges by about 0.01. Seen: the damage study, `tests/bench/results/damage-reference.json`.
# Share of an exit's tokens that may diverge by more than so much. Of damage that loses at most 2 points of any rate at most
# 0.3 % did, of damage that loses more than 10 points at least 2.7 %.
DIVERGED_NATS = 0.3
DIVERGED_TOKENS = 0.015
# Share of an exit's answers in which no token may diverge by more than so much. In long answers the tokens that turn a refusal
# into help are few. Of the harmless damage all were kept, of the harmful at most 88 %.
LOST_NATS = 1.0
KEPT_ANSWERS = 0.90
# Plain text (`held_out`) read by the finished bundle beside the checkpoint: the share of places where both think the same token
# likeliest, and the mean divergence, nats.
SAME_TOKENS = 0.90
TEXT_NATS = 0.05
# Tokens of neutral text that errors are compensated on, and of one sequence of them; requests with pictures come on top.
CALIBRATION_TOKENS = 20_480
CALIBRATION_WINDOW = 512
CALIBRATION_REQUESTS = 8
