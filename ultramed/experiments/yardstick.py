"""How far words alone get on a profile's examinations (notebook 10; evaluate/words.py)."""

from ultramed.core.profile import Profile
from ultramed.evaluate.arms import Arms
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical


def by_words(profile: Profile) -> Arms:
    """The yardstick on the questions and rows of notebooks 11 and 22, once seeing the options only. A notebook whose questions
    are of other data sets than its training rows has none: nothing could be counted."""
    studies = {"11": MedAlpaca.of(profile)} if profile.usmle else {}
    studies |= {"22": UltraMedical.of(profile)} if profile.ultramedical else {}
    arms = Arms()
    for notebook, study in studies.items():
        if study.has_words:
            arms[f"{notebook}: options alone"] = study.examine_words("options")
            arms[f"{notebook}: question and options"] = study.examine_words("question")
    return arms
