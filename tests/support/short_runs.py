"""A mark for tests of runs that are too short to end near the constraint."""

import pytest

short_run = pytest.mark.filterwarnings("ignore::safe_core.FinalizeWarning")
"""Allow `finalize` to warn. The tests of its warnings do without this mark."""
