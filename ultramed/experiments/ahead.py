"""What notebooks 11 and 21 to 26 will ask the store for, as tasks for several processes, most of them of one seed.

They stand in such an order that nobody waits for long: first what many need, then seed by seed what hangs on it. A task makes
whatever it needs that is not there yet, so that any part of them can be run, in any order. Left to the notebooks is what takes
seconds or no model of ours: words, losses on held-out rows, GSM8K and MMLU, public pairs, a judge.
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
    """One process's share: `call` makes artifacts that the `notebooks` ask for."""

    notebooks: frozenset[str]
    what: str
    call: Callable[[], object]


def task(notebooks: str, what: str, call: Callable[[], object]) -> Task:
    """`notebooks`: their numbers, '22 23'."""
    return Task(frozenset(notebooks.split()), what, call)


def tasks_of(profile: Profile, notebooks: Collection[str]) -> list[Task]:
    """The tasks of the notebooks with these numbers ('11')."""
    made = [found for study in MedAlpaca.all_of(profile) for found in _rates(study)]
    if profile.ultramedical:
        made = [*made, *_ultramedical(UltraMedical.of(profile))]
    made += [found for study in MedAlpaca.all_of(profile) for found in _arms(study)]
    return [found for found in made if found.notebooks & set(notebooks)]


def _rates(study: MedAlpaca) -> Iterator[Task]:
    for arm in reversed(study.tuned_arms):  # adapters in 8 bits, which take longest, stand last
        for rate in study.grid(arm):
            yield task("11", f"{study.key(arm)} at {rate:g}", partial(study.try_rate, arm, rate))


def _arms(study: MedAlpaca) -> Iterator[Task]:
    def examine(arm: str, seed: int) -> None:
        rate = study.main_rates(study.tune_rates())[arm]
        study.examine(study.train_arm(arm, seed, learning_rate=rate), seed)

    for arm in reversed(study.arm_names):
        for seed in study.seeds(arm):
            yield task("11", f"{study.key(arm)}, seed {seed}", partial(examine, arm, seed))
    yield task("11", study.key("base"), lambda: study.examine_base(better(study.examine_dev())))
    yield task("11", study.key("other rates and forms"), lambda: study.examine_variants(study.tune_rates()))


def _ultramedical(study: UltraMedical) -> Iterator[Task]:
    settings, iteration = study.settings, Iteration(study)
    mixtures, preferred, first = list(settings.sft.mixtures), study.preferred.values(), study.seeds[0]
    learning = dict.fromkeys(mix for mix, _ in preferred)

    def each(notebooks: str, seeds: list[int], what: str, call: Callable[[int], object]) -> Iterator[Task]:
        for seed in seeds:
            yield task(notebooks, f"{what}, seed {seed}", partial(call, seed))

    def asked(mix: str, arm: str = "sft", **how) -> Callable[[int], object]:
        return lambda seed: study.examine_policy(mix, arm, seeds=[seed], **how)

    def bench(seed: int) -> None:
        for domain in DOMAINS:
            for arm in settings.reward.arms:
                study.score_pairs(arm, study.make_bench(domain), [seed])

    def rerank(seed: int) -> None:
        study.examine_policy(settings.rerank.mixture, seeds=[seed])
        sampled = study.sample_test(lambda s: study.train_sft(settings.rerank.mixture, s), [seed])
        for ranker in study.rankers or [seed]:
            study.score(sampled[seed], ranker)

    def heated(temperature: float) -> None:
        study.sample_dev(study.train_sft(settings.rerank.mixture, study.rerank_seeds[0]), temperature)

    def longer(arm: str, seed: int) -> None:
        study.examine(iteration.train_longer(arm, list(iteration.train_rounds(arm, seed)), seed), seed)

    def ensemble(seed: int) -> None:
        chosen, _ = study.choose_policy("ultramix")
        study.sample_test(lambda s: study.train_policy("ultramix", chosen, s), [seed])

    for domain in DOMAINS:
        yield task(
            "21" if settings.reward.sources else "21 24", f"candidates, {domain}", partial(study.rank_candidates, domain)
        )
        yield task("21 24" if domain == "medical" else "24", f"bench, {domain}", partial(study.make_bench, domain))
    for mix in mixtures:
        yield from each("22 23" if mix in study.mixtures else "23", study.seeds, mix, asked(mix))
    yield task("22 23", "base", study.examine_base)
    yield task("23", "base, general", partial(study.examine_base, "general"))
    for mix in study.mixtures:
        yield task("21 22" if mix in learning else "21", f"pairs of {mix}", partial(study.preference_pairs, mix, first))
    for mix in learning:
        yield from each("22", study.seeds[1:], f"pairs of {mix}", partial(study.preference_pairs, mix))
    for arm in settings.reward.arms:
        where = "24"
        if arm == settings.rerank.reward_arm:
            where = "22 24 25 26" if iteration.arms else "24 25"
        yield from each(where, study.reward_seeds, f"reward model, {arm}", partial(study.train_reward_model, arm))
    for mix, arm in preferred:
        yield from each("22", study.seeds, f"{mix} {arm}", asked(mix, arm))
    yield from each("25", study.rerank_seeds, "re-ranking", rerank)
    for heat in settings.rerank.temperatures:
        yield task("25", f"dev samples at T {heat}", partial(heated, heat))
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
        yield from each("22 26", iteration.seeds, f"iterative {arm}", lambda s, a=arm: list(iteration.train_rounds(a, s)))
    for arm in iteration.arms if iteration.arms and iteration.settings.control else ():
        yield from each("26", iteration.seeds, f"{arm} for longer", partial(longer, arm))
    if study.has_ensemble:
        for arm in ("sft", *(arm for mix, arm in preferred if mix == "ultramix")):
            yield from each("22", study.seeds, f"ultramix {arm}, dev", asked("ultramix", arm, dev=True))
        yield from each("22", study.rerank_seeds, "ensemble", ensemble)
