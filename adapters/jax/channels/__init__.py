"""Find the channels of a traced network that are zero, and cut them out of its arrays."""

from .groups import ChannelGroups, ZeroChannels
from .state import check_base_state, cut_state

__all__ = ["ChannelGroups", "ZeroChannels", "check_base_state", "cut_state"]
