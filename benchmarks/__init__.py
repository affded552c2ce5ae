"""Speed and memory against what users would take instead, as ratios measured in one run."""
