"""Exit maps from unlabelled pictures: the states of every depth are gathered, and a ridge regression solved for each."""

PICTURES = 600  # used at most, where nobody says otherwise
