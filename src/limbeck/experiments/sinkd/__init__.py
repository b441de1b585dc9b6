"""The experiments of SinKD, each with the module that has its `Params`, `cells` and `run`. Read as text: a literal."""

EXPERIMENTS = {
    "fig_toy_divergences": "fig_toy_divergences",
    "fig_gradient_shift": "fig_gradient_shift",
    "table_encoder": "comparison",
    "table_divergences": "comparison",
    "table_baselines": "comparison",
    "table_ablation": "comparison",
    "fig_transport_plan": "fig_transport_plan",
    "fig_permutation": "fig_permutation",
    "fig_hyperparameters": "sweep",
    "fig_debiased": "fig_debiased",
    "table_decoder": "table_decoder",
    "table_encoder_decoder": "table_encoder_decoder",
}
