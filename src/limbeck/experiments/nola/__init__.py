"""The experiments of NOLA, each with the module that has its `Params`, `cells` and `run`. Read as text: a literal."""

EXPERIMENTS = {
    "table_text": "comparison",
    "table_text_full": "comparison",
    "table_text_second": "comparison",
    "ablations": "ablations",
    "table_instruction": "instruction",
    "table_vision": "few_shot",
    "table_vision_full": "few_shot",
    "fig_convolution": "convolution",
    "fig_rank": "rank",
    "fig_pranc_loss": "pranc_loss",
    "table_storage": "storage",
}
