"""How far words alone get on a profile's examinations (notebook 10; evaluate/words.py)."""

from ultramed.core.config import arm_config
from ultramed.core.profile import Profile
from ultramed.data.sources import names_in
from ultramed.evaluate.arms import Arms
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import UltraMedical


def by_words(profile: Profile) -> Arms:
    """The yardstick on the questions and rows of notebooks 11 and 22, once seeing the options only. A notebook whose questions are
    of other data sets than its training rows has none: nothing could be counted."""
    found = []
    if profile.usmle:
        study = MedAlpaca.of(profile)
        found.append(("11", study, profile.usmle.questions, arm_config(profile, study.method_arms[0]).mixture))
    if profile.ultramedical:
        study = UltraMedical.of(profile)
        section = study.settings
        found.append(("22", study, section.test.questions["medical"], section.sft.mixtures[study.mixtures[0]]))
    arms = Arms()
    for notebook, study, questions, mixture in found:
        if set(names_in(questions)) <= set(names_in(mixture)):
            arms[f"{notebook}: options alone"] = study.examine_words("options")
            arms[f"{notebook}: question and options"] = study.examine_words("question")
    return arms
