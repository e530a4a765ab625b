"""Candidates judged, and judgements turned into preference pairs."""
