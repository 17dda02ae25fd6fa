"""What a forked `prune-cli` finds done: its modules imported, its commands and its page read, and no charts drawn."""

import gc
import importlib
import pkgutil
from functools import cache

import typer.main

import calibration
import methods
import prune_cli
from prune_cli.cli import app
from prune_cli.report.html import page
from tests.drawing import draw_charts

for package in (prune_cli, methods, calibration):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
typer.main.get_command = cache(typer.main.get_command)
typer.main.get_command(app)
page._template()
draw_charts(really=False)
gc.freeze()
