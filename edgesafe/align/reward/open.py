"""Opens the reward that a config asks for."""

from __future__ import annotations

from edgesafe.align.reward.overlap import Reward, TargetReward
from edgesafe.align.settings import RewardConfig


def open_reward(config: RewardConfig) -> Reward:
    """The reward that a config asks for.

    Raises:
        ConfigError: the reward model can't be loaded.
    """
    if not config.model:
        return TargetReward(config.harmlessness, config.helpfulness)
    from edgesafe.align.reward.model import open_model_reward

    return open_model_reward(config.model, harmlessness=config.harmlessness, helpfulness=config.helpfulness)
