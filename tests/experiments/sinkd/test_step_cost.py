import pytest
import torch

from limbeck.experiments.sinkd import step_cost


@pytest.mark.parametrize(("name", "tolerance"), [("fallback", 1e-5), ("recipe", 1e-5), ("pot", 1e-3)])
def test_what_is_timed_beside_ours_computes_the_same_gradient(name, tolerance):
    """POT ends on rows instead of columns, which after 20 iterations still shows in the third digit."""
    losses = step_cost.losses(32, 17)
    torch.testing.assert_close(losses[name](), losses["sinkhorn"](), rtol=tolerance, atol=tolerance)


def test_a_round_has_every_loss_with_its_ratio_to_kl_and_its_share_of_a_step():
    frame = step_cost.measure("smoke")
    assert list(frame["loss"]) == ["kl", "sinkhorn", "fallback", "recipe", "pot", "geomloss", "step"]
    kl, step = (frame.loc[frame["loss"] == name, "bench/seconds"].item() for name in ("kl", "step"))
    assert frame["bench/ratio"].tolist() == pytest.approx((frame["bench/seconds"] / kl).tolist())
    assert frame["bench/share"].tolist() == pytest.approx(((frame["bench/seconds"] - kl) / step).tolist())
