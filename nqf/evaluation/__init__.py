"""Full-catalogue evaluation: exact ranks, metrics with intervals, segments, baselines and the results of a run."""
