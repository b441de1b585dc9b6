"""The experiments of KDRL, each with the module that has its `Params`, `cells` and `run`. Read as text: a literal."""

EXPERIMENTS = {
    "fig_kl_gradients": "kl_gradients",
    "table_starts": "starting_models",
    "table_main": "comparison",
    "ablations": "comparison",
    "fig_real_model": "real_model",
}
