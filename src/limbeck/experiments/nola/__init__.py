"""The experiments of NOLA, each with the module that has its `Params`, `cells` and `run`. Read as text: a literal."""

EXPERIMENTS = {
    "table_text": "text",
    "table_text_full": "text",
    "table_text_second": "text",
    "ablations": "ablations",
    "table_instruction": "table_instruction",
    "table_vision": "table_vision",
    "table_vision_full": "table_vision_full",
    "fig_convolution": "fig_convolution",
    "fig_rank": "fig_rank",
    "fig_pranc_loss": "fig_pranc_loss",
    "table_storage": "table_storage",
}
