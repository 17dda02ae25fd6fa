from prune_cli.cli import run

run()
