"""What a run looked like: metrics, result files, tables, plots and timelines, all made from a RunRecord."""
