"""From files to documents: sources, legal data, chat templates and masks, splits, checks, batches."""
