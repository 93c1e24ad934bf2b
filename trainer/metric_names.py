"""What the figures of an evaluation are called and how they are read: by the model card, and by those who show runs."""

METRICS = {
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "valid_labels": "answers that are one of the labels",
    "token_f1": "token F1",
    "rouge1": "ROUGE-1 (F)",
    "rouge2": "ROUGE-2 (F)",
    "rougeL": "ROUGE-L (F)",
    "stopped": "answers that stop by themselves",
    "perplexity": "perplexity per token",
}
"""In the order of the table."""
MAIN = ("exact_match", "token_f1", "rougeL", "perplexity")
"""What a model is summed up by: the first of these that was measured."""
LOWER_IS_BETTER = ("perplexity",)
SHARES = ("exact_match", "accuracy", "valid_labels", "stopped")
"""Means of yes-or-no per row, whose uncertainty follows from the number of rows."""
