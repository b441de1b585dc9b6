"""The experiments of SinKD, each with the module that has its `Params`, `cells` and `run`. Read as text: a literal."""

EXPERIMENTS = {
    "fig_toy_divergences": "toy_divergences",
    "fig_gradient_shift": "gradient_shift",
    "table_encoder": "comparison",
    "table_divergences": "comparison",
    "table_baselines": "comparison",
    "table_ablation": "comparison",
    "fig_transport_plan": "transport_plan",
    "fig_permutation": "permutation",
    "fig_hyperparameters": "sweep",
    "fig_debiased": "debiased",
    "table_decoder": "decoder",
    "table_encoder_decoder": "generation",
}
