"""Scoring and generation, answers to questions, and the statistics of accuracies."""
