"""Command line of training: one arm of a profile by hand. Also what `accelerate launch` starts, through train/launch.py."""

import json
from typing import Annotated

import typer

from ultramed.cli.common import ProcessesOption, ProfileOption, SetOption, console
from ultramed.core import config

train_app = typer.Typer(no_args_is_help=True, help="Train one arm of a profile by hand.")


@train_app.command("sft")
def train_sft(
    arm: Annotated[str, typer.Option(help="An arm of the profile's usmle section: full, lora, lora_8bit, ...")] = "full",
    profile: ProfileOption = "laptop",
    seed: Annotated[int, typer.Option(help="Rows, order and adapter initialisation.")] = 0,
    overrides: SetOption = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """Supervised fine-tuning of one arm on the profile's first model. Ctrl-C saves a checkpoint; run again to go on."""
    from ultramed.core.log import quiet_libraries
    from ultramed.experiments.medalpaca import MedAlpaca

    quiet_libraries()
    resolved = config.load_profile(profile, overrides)
    art = MedAlpaca.of(resolved).train_arm(arm, seed)
    console.print_json(json.dumps(art.metrics))
    console.print(f"model: sft/{art.key}  (ultramed chat sft/{art.key})")


def _experiment(profile: str, overrides: list[str]):
    from ultramed.core.log import quiet_libraries
    from ultramed.experiments.ultramedical import UltraMedical

    quiet_libraries()
    return UltraMedical.of(config.load_profile(profile, overrides))


@train_app.command("preference")
def train_preference(
    arm: Annotated[str, typer.Option(help="An arm of ultramedical.preference.arms: dpo, kto, ...")] = "dpo",
    mix: Annotated[
        str,
        typer.Option(
            help="The SFT policy to start from: a name of ultramedical.sft.mixtures. Without: UltraMix, if there is one."
        ),
    ] = "",
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """Preference learning from an SFT policy, with everything it needs: policies, candidates, feedback, pairs."""
    experiment = _experiment(profile, overrides)
    art = experiment.train_preference(mix or experiment.mixtures[-1], arm)
    console.print_json(json.dumps(art.metrics))
    console.print(f"model: preference/{art.key}  (ultramed chat preference/{art.key})")


@train_app.command("reward")
def train_reward(
    arm: Annotated[str, typer.Option(help="An arm of ultramedical.reward.arms: medical, general, mixed.")] = "medical",
    profile: ProfileOption = "laptop",
    overrides: SetOption = [],  # noqa: B006
    processes: ProcessesOption = 0,
) -> None:
    """A Bradley-Terry reward model, with everything it needs: policies, candidates, feedback, pairs."""
    art = _experiment(profile, overrides).train_reward_model(arm)
    console.print_json(json.dumps(art.metrics))
    console.print(f"model: reward/{art.key}  (ultramed reward --model reward/{art.key} --pairs FILE --out DIR)")
