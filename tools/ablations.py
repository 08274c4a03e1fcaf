"""Leave one part of the algorithm out, to see what it is good for.

    python -m tools.ablations relabelling --env CartPole        old transitions keep their first reward
    python -m tools.ablations critic-reset --env DrawerOpen     the critics go on from the values of novelty
    python -m tools.ablations relabelling --resume FOLDER       goes on with such a run

What this is: train.py with one class exchanged for a subclass that does less. All arguments after the name are those of
train.py. What a setting can leave out has no name here: to explore without novelty is --seed-steps as many as
--explore-steps, one network in the ensemble is --ensemble-size 1.  `python -m tools.sweep what_matters` runs them all.
Which STEPs: 5 relabel every stored transition with the new reward, 6 improve the policy with SAC on the learned reward.
Differs from the paper: it has both parts; its code has the second (the critics), its text does not mention it.
Shapes: those of sac.py.  Names: OnlyNewRewards, KeptCritics, ABLATIONS, train_without.

To use it elsewhere:
    from support.settings import Config
    from tools.ablations import train_without
    rows = train_without("relabelling", Config(env="CartPole", total_steps=700, out="runs/no_relabelling"))
"""
import argparse
import functools
import sys


# ---- STEP 5, left out ----
class OnlyNewRewards:
    """Mix into ReplayBuffer: a new reward model rewards only the transitions that have no reward yet."""

    def relabel(self, reward_fn, only_new=False, **settings):
        return super().relabel(reward_fn, only_new=True, **settings)


# ---- the fresh critics of STEP 6, left out ----
class KeptCritics:
    """Mix into SAC: the critics of STEP 0, which have learned what is novel, stay when there is a reward."""

    def reset_critic(self):
        if not hasattr(self, "critic"):  # the constructor makes the first ones by this very function
            super().reset_critic()


# name: (the part that is exchanged, what is mixed into it)
ABLATIONS = {"relabelling": ("ReplayBuffer", OnlyNewRewards), "critic-reset": ("SAC", KeptCritics)}


def mixed(kind, made):
    """A class, or a functools.partial of one (a class with some settings) -> the same with kind mixed in."""
    if isinstance(made, functools.partial):
        return functools.partial(mixed(kind, made.func), *made.args, **made.keywords)
    return type(kind.__name__ + made.__name__, (kind, made), {})


def train_without(name, config):
    """train.train(config) without one part -> the rows of metrics.csv.  name: one of ABLATIONS, or ValueError."""
    import train
    from support import run, settings

    if name not in ABLATIONS:
        raise ValueError(f"no ablation {name!r}; there are {', '.join(ABLATIONS)}")
    parts = run.choose_parts(settings.resolve(config))
    part, kind = ABLATIONS[name]
    setattr(parts, part, mixed(kind, getattr(parts, part)))
    program, updates = getattr(settings, "PROGRAM", None), train.RESET_UPDATES
    try:
        # The run folder, its report and every "go on with:" must name this command, not train.py.
        settings.PROGRAM = ("python", "-m", "tools.ablations", name)
        if name == "critic-reset":
            train.RESET_UPDATES = 0  # what fresh critics would have to catch up with
        return train.train(config, parts)
    finally:
        settings.PROGRAM, train.RESET_UPDATES = program, updates


def main(arguments=None):
    from support import settings

    parser = argparse.ArgumentParser(prog="python -m tools.ablations", allow_abbrev=False,
                                     description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=ABLATIONS, help="the part that is left out")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of train.py: see python train.py --help")
    options = parser.parse_args(arguments)
    try:
        config = settings.parse_args(options.arguments)
        import code_as_reward  # after a wrong flag has been answered: these take a while
        import envs
        import vlm_query
    except settings.UserError as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        return 2
    try:
        train_without(options.name, config)
    except (settings.UserError, vlm_query.VLMError, code_as_reward.CodeAsRewardError, envs.BadEnvironment) as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"ablations.py: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
