"""Losses: functions of tensors, a scalar out, the gradient to the student or the policy only."""
