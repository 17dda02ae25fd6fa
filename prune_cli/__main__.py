from prune_cli.cli import app

app()
