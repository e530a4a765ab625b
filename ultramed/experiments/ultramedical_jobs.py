"""What UltraMedical's notebooks will train and ask: the configurations that the verbs give the stages, for plans."""

from ultramed.core.config import preference_config
from ultramed.experiments.iteration import Iteration
from ultramed.experiments.jobs import Job, prompts_of
from ultramed.experiments.ultramedical import CONTROLS, WITHOUT_MODEL, UltraMedical


def jobs_of(study: UltraMedical) -> list[Job]:
    """Training and replies of notebooks 21 to 26."""
    settings, made, asked = study.settings, [], sum(study.settings.test.questions["medical"].values())
    candidates, preferred, sample = settings.candidates, settings.preference, settings.sample
    pool = sum(member.n for member in candidates.pool if member.policy not in WITHOUT_MODEL)
    prompts = {domain: sum(spec.values()) for domain, spec in candidates.prompts.items()}
    pairs_of = {domain: prompts_of(spec) for domain, spec in preferred.prompts.items()}

    for seed in study.seeds:
        for name in settings.sft.mixtures:
            notebook = "22" if name in study.mixtures else "23"
            made += with_answers(study, Job.sft(notebook, f"SFT {name}, seed {seed}", study.sft_config(name, seed)))
    for seed in study.seeds:
        counts = {
            mix: sum(n for domain, n in pairs_of.items() if domain == "medical" or mix == "ultramix")
            for mix, _ in study.preferred.values()
        }
        for mix, count in counts.items() if preferred.source == "policy" else ():
            made.append(Job.replies("22", f"samples of {mix}, seed {seed}", count, sample, preferred.on_policy.n))
        for mix, arm in study.preferred.values():
            config = preference_config(study.profile, arm, seed=seed)
            made += with_answers(study, Job.preference("22", f"{arm} on {mix}, seed {seed}", config, counts[mix]))
        for control in CONTROLS if preferred.controls else ():
            what, config = f"control, {control}, seed {seed}", study.control_config("ultramed", control, seed)
            made += with_answers(study, Job("22", "sft", what, config, pairs_of["medical"]))
    for domain, count in prompts.items():
        held = sum(candidates.held_prompts[domain].values())
        made.append(Job.replies("21", f"candidates, {domain}", count + held, sample, pool))
    for arm, domains in settings.reward.arms.items():
        count, replies = sum(n or prompts[d] for d, n in domains.items()), pool
        if settings.reward.sources:  # rows there are pairs
            count, replies = sum(prompts_of(settings.reward.sources[d]) for d in domains), 2
        for seed in study.reward_seeds:
            made.append(Job.reward("24", f"reward model, {arm}, seed {seed}", study.reward_config(seed), count, replies))
    many = len(study.rerank_seeds) * asked
    made.append(Job.replies("25", "samples of every test question", many, sample, settings.rerank.n))
    for temperature in settings.rerank.temperatures:
        count = prompts_of(settings.rerank.dev_questions)
        made.append(Job.replies("25", f"dev samples at T {temperature}", count, sample, settings.rerank.n))
    if study.has_ensemble:
        made.append(Job.replies("22", "samples of the best policy", many, sample, settings.rerank.n))
    for seed in study.rerank_seeds if settings.rerank.control else ():
        made += with_answers(study, Job.sft("25", f"control, seed {seed}", study.sft_config("control", seed)))
    return [*made, *_iterated(study)]


def with_answers(study: UltraMedical, job: Job) -> list[Job]:
    """The training of a policy, and its examination on a seed's medical test questions."""
    asked = sum(study.settings.test.questions["medical"].values())
    return [job, Job.replies(job.notebook, f"{job.what}: answers", asked, study.asking)]


def _iterated(study: UltraMedical) -> list[Job]:
    iteration, made = Iteration(study), []
    for arm in iteration.arms:
        section = iteration.settings
        fresh = sum(section.prompts.values())
        for seed in iteration.seeds:
            for number in range(section.rounds):
                what = f"iterative {arm}, seed {seed}"
                made.append(Job.replies("26", f"{what}: samples", fresh, study.settings.sample, section.n))
                config = iteration.round_config(arm, number, seed)
                made += with_answers(study, Job.preference("26", f"{what}, round {number + 1}", config, fresh))
            if section.control:
                config = iteration.round_config(arm, 0, seed)
                made.append(Job.preference("26", f"as many more steps of {arm}, seed {seed}", config, section.rounds * fresh))
    return made
