"""Rank 6 of 8: stage 1 of 2.

F0 runs the forward of microbatch 0, B0 its backward; B0>4 sends the result to rank 4; 4>[F0] begins to receive from
rank 4 what F0 takes. A send and the receive that follows it start together.
"""

COORDINATES = {"dp": 1, "pp": 1, "tp": 0}
GROUPS = {"dp": (2, 6), "pp": (4, 6), "tp": (6, 7)}
STAGES = (1,)
SCHEDULE = (
    "4>[F0]  4>[F1]  F0  B0>4  F1  4>[F2]  B1>4  F2  4>[F3]  B2>4  F3  B3>4"
)
