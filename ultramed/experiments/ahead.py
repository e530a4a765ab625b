"""What notebooks 11 and 21 to 26 will ask the store for, as tasks for several processes, most of them of one seed.

They stand in such an order that nobody waits for long: first what many need, then seed by seed what hangs on it. A task makes
whatever it needs that is not there yet, so that any part of them can be run, in any order.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from ultramed.core.profile import Profile
from ultramed.evaluate.arms import better
from ultramed.experiments.iteration import Iteration
from ultramed.experiments.medalpaca import MedAlpaca
from ultramed.experiments.ultramedical import CONTROLS, DOMAINS, UltraMedical


@dataclass(frozen=True)
class Task:
    """One process's share: `call` makes the artifacts, `notebook` is the first that asks for them."""

    notebook: str
    what: str
    call: Callable[[], object]


def tasks_of(profile: Profile, notebooks: Collection[str]) -> list[Task]:
    """The tasks of the notebooks with these numbers ('11')."""
    made = [task for study in MedAlpaca.all_of(profile) for task in _rates(study)]
    if profile.ultramedical:
        made = [*made, *_ultramedical(UltraMedical.of(profile))]
    made += [task for study in MedAlpaca.all_of(profile) for task in _arms(study)]
    return [task for task in made if task.notebook in notebooks]


def _rates(study: MedAlpaca) -> Iterator[Task]:
    for arm in reversed(study.tuned_arms):  # adapters in 8 bits, which take longest, stand last
        for rate in study.grid(arm):
            yield Task("11", f"{study.key(arm)} at {rate:g}", partial(study.try_rate, arm, rate))


def _arms(study: MedAlpaca) -> Iterator[Task]:
    def examine(arm: str, seed: int) -> None:
        rate = study.main_rates(study.tune_rates())[arm]
        study.examine(study.train_arm(arm, seed, learning_rate=rate), seed)

    for arm in reversed(study.arm_names):
        for seed in study.seeds(arm):
            yield Task("11", f"{study.key(arm)}, seed {seed}", partial(examine, arm, seed))
    yield Task("11", study.key("base"), lambda: study.examine_base(better(study.examine_dev())))
    yield Task("11", study.key("other rates and forms"), lambda: study.examine_variants(study.tune_rates()))


def _ultramedical(study: UltraMedical) -> Iterator[Task]:
    settings, iteration = study.settings, Iteration(study)
    mixtures, preferred = list(settings.sft.mixtures), study.preferred.values()
    learning = dict.fromkeys(mix for mix, _ in preferred)

    def each(notebook: str, seeds: list[int], what: str, call: Callable[[int], object]) -> Iterator[Task]:
        for seed in seeds:
            yield Task(notebook, f"{what}, seed {seed}", partial(call, seed))

    def asked(mix: str, arm: str = "sft", **how) -> Callable[[int], object]:
        return lambda seed: study.examine_policy(mix, arm, seeds=[seed], **how)

    def bench(seed: int) -> None:
        for domain in DOMAINS:
            for arm in settings.reward.arms:
                study.score_pairs(arm, study.make_bench(domain), [seed])

    def rerank(seed: int) -> None:
        study.examine_policy(settings.rerank.mixture, seeds=[seed])
        sampled = study.sample_test(lambda s: study.train_sft(settings.rerank.mixture, s), [seed])
        for ranker in study.rankers if len(study.rankers) > 1 else [seed]:
            study.score(sampled[seed], ranker)

    def heated(temperature: float) -> None:
        study.sample_dev(study.train_sft(settings.rerank.mixture, study.rerank_seeds[0]), temperature)

    def iterate(arm: str, seed: int) -> None:
        rounds = list(iteration.train_rounds(arm, seed))
        if iteration.settings.control:
            study.examine(iteration.train_longer(arm, rounds, seed), seed)

    def ensemble(seed: int) -> None:
        chosen, _ = study.choose_policy("ultramix")
        study.sample_test(lambda s: study.train_policy("ultramix", chosen, s), [seed])

    for domain in DOMAINS:
        yield Task("21", f"candidates, {domain}", partial(study.rank_candidates, domain))
        yield Task("24", f"bench, {domain}", partial(study.make_bench, domain))
    for mix in mixtures:
        yield from each("22" if mix in study.mixtures else "23", study.seeds, mix, asked(mix))
    yield Task("22", "base", study.examine_base)
    yield Task("23", "base, general", partial(study.examine_base, "general"))
    for mix in learning:
        yield from each("22", study.seeds, f"pairs of {mix}", partial(study.preference_pairs, mix))
    for arm in settings.reward.arms:
        yield from each("24", study.reward_seeds, f"reward model, {arm}", partial(study.train_reward_model, arm))
    for mix, arm in preferred:
        yield from each("22", study.seeds, f"{mix} {arm}", asked(mix, arm))
    yield from each("25", study.rerank_seeds, "re-ranking", rerank)
    for heat in settings.rerank.temperatures:
        yield Task("25", f"dev samples at T {heat}", partial(heated, heat))
    for control in CONTROLS if settings.preference.controls else ():
        yield from each("22", study.seeds, control, lambda s, c=control: study.examine_control("ultramed", c, [s]))
    if settings.rerank.control:
        yield from each("25", study.rerank_seeds, "control", asked("control"))
    yield from each("24", study.reward_seeds, "benches", bench)
    for mix in mixtures:
        yield from each("23", study.seeds, f"{mix}, general", asked(mix, domain="general"))
    for mix in ("", *mixtures):
        yield from each("23", study.seeds, f"{mix or 'base'}, closed book", lambda s, m=mix: study.examine_closed_book(m, [s]))
    for arm in iteration.arms:
        yield from each("22", iteration.seeds, f"iterative {arm}", partial(iterate, arm))
    if study.has_ensemble:
        for arm in ("sft", *(arm for mix, arm in preferred if mix == "ultramix")):
            yield from each("22", study.seeds, f"ultramix {arm}, dev", asked("ultramix", arm, dev=True))
        yield from each("22", study.rerank_seeds, "ensemble", ensemble)
