"""What runs on a rank: collectives, parameters, the schedule and the Trainer. Imports nothing of the compiler."""

from meshwright.runtime.buffers import batch_norm, store
from meshwright.runtime.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    invariant_to_replicated,
    part_of_mean,
    reduce_scatter,
    replicated_to_partial,
    shard,
    shard_range,
)
from meshwright.runtime.errors import BundleError, MeshwrightError, PlanError, RankError
from meshwright.runtime.one_process import run_in_one_process
from meshwright.runtime.random import (
    alpha_dropout,
    attention_with_dropout,
    dropout,
    feature_alpha_dropout,
    feature_dropout,
    rand,
    rand_like,
    randn,
    randn_like,
)
from meshwright.runtime.trainer import Trainer

__all__ = [
    "BundleError",
    "MeshwrightError",
    "PlanError",
    "RankError",
    "Trainer",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "alpha_dropout",
    "attention_with_dropout",
    "batch_norm",
    "dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "invariant_to_replicated",
    "part_of_mean",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "reduce_scatter",
    "replicated_to_partial",
    "run_in_one_process",
    "shard",
    "shard_range",
    "store",
]
