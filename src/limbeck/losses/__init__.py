"""Losses: functions of tensors, a scalar out, the gradient to the student or the policy only."""

from limbeck.losses.baselines import dkd, pkd, rkd_angle, rkd_distance
from limbeck.losses.chunked import chunked_reverse_kl
from limbeck.losses.divergence import (
    forward_kl,
    forward_kl_per_token,
    jensen_shannon,
    jensen_shannon_per_token,
    reverse_kl,
    reverse_kl_per_token,
    total_variation,
    total_variation_per_token,
)
from limbeck.losses.estimates import kl_estimate, top_k_reverse_kl, top_k_reverse_kl_per_token
from limbeck.losses.kdrl import kd_mask, kd_per_token, kd_schedule, kd_weights, kdrl_loss, shaped_advantages
from limbeck.losses.masking import masked_mean
from limbeck.losses.policy import group_advantages, grpo_loss, surrogate_per_token, token_weights
from limbeck.losses.sinkd import annealed_temperature, batch_sinkhorn, sequence_sinkhorn, sinkd_loss
from limbeck.losses.transport import (
    sample_index_cost_per_row,
    sample_l1,
    sample_value_cost,
    sample_zero_one,
    sinkhorn_distance,
    sinkhorn_plan,
)

__all__ = [
    "annealed_temperature",
    "batch_sinkhorn",
    "chunked_reverse_kl",
    "dkd",
    "forward_kl",
    "forward_kl_per_token",
    "group_advantages",
    "grpo_loss",
    "jensen_shannon",
    "jensen_shannon_per_token",
    "kd_mask",
    "kd_per_token",
    "kd_schedule",
    "kd_weights",
    "kdrl_loss",
    "kl_estimate",
    "masked_mean",
    "pkd",
    "reverse_kl",
    "reverse_kl_per_token",
    "rkd_angle",
    "rkd_distance",
    "sample_index_cost_per_row",
    "sample_l1",
    "sample_value_cost",
    "sample_zero_one",
    "sequence_sinkhorn",
    "shaped_advantages",
    "sinkd_loss",
    "sinkhorn_distance",
    "sinkhorn_plan",
    "surrogate_per_token",
    "token_weights",
    "top_k_reverse_kl",
    "top_k_reverse_kl_per_token",
    "total_variation",
    "total_variation_per_token",
]
