"""prune_report.html: what one report, or several side by side, tell a person, in one file that needs nothing else."""
