"""What a forked `prune-cli` finds done: its modules imported, its commands and the template of its page read."""

import gc
import importlib
import pkgutil
from functools import cache

import typer.main

import calibration
import methods
import prune_cli
import tests.warm  # noqa: F401
from prune_cli.cli import app
from prune_cli.report.html import page

for package in (prune_cli, methods, calibration):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
typer.main.get_command = cache(typer.main.get_command)
typer.main.get_command(app)
page._template()
gc.freeze()
