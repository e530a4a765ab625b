"""The whole book of profile paper-8b from a folder in the hub's layout (see test_profiles_from_hub.py): the longest test, in a
module of its own so that another process can run the others."""

from test_profiles_from_hub import environment, runs_to_its_end  # noqa: F401


def test_every_notebook_runs_to_its_end(environment):  # noqa: F811
    runs_to_its_end(environment, "paper-8b")
