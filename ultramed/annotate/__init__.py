"""Candidates scored and ranked by a rule, a reward model or a judge (a language model), and rankings turned into pairs."""
