"""Rank 0 of 8: stage 0 of 2.

F0 runs the forward of microbatch 0, B0 its backward; F0>2 sends the result to rank 2; 2>B0 first receives from rank
2. A send and the receive that follows it start together.
"""

COORDINATES = {"dp": 0, "pp": 0, "tp": 0}
GROUPS = {"dp": (0, 4), "pp": (0, 2), "tp": (0, 1)}
STAGES = (0,)
SCHEDULE = (
    "F0>2  F1>2  2>B0  F2>2  2>B1  F3>2  2>B2  2>B3"
)
