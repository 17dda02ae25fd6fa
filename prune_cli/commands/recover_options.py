"""What `prune-cli recover` alone can be told; None stands for what the user did not say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_cli.commands.options import MACHINE, TEXT

_TRAINING = "Training"

Model = Annotated[str, typer.Argument(help="Folder of a pruned checkpoint, or a model id of the hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")]
Teacher = Annotated[
    str, typer.Option(metavar="DENSE", help="The dense model that MODEL was made from: a folder or a model id.")
]
How = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="block: one block after the other learns to do what the dense model's did. full: all kept weights "
        "together learn what the dense model predicts; lora: low-rank updates of them, folded in; router: the rows "
        "of experts' routers alone.",
        rich_help_panel=_TRAINING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        help="Times that the text is seen; the best state is kept [default: 2 for block, else 4].",
        rich_help_panel=_TRAINING,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="All but block: so many tokens to train on, in place of --epochs.", rich_help_panel=_TRAINING),
]
Train = Annotated[
    str | None,
    typer.Option(
        metavar="PARTS",
        help="full, lora: what moves, of norms, biases, attention and mlp, with commas; all is every one "
        "[default: all].",
        rich_help_panel=_TRAINING,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(help="lora: of the updates of each matrix [default: 16].", rich_help_panel=_TRAINING),
]
Rate = Annotated[
    float | None,
    typer.Option(
        help="Learning rate, as a share of each tensor's size at width 256; less for wider ones "
        "[default: 0.02 for block, else 0.01].",
        rich_help_panel=_TRAINING,
    ),
]
Kl = Annotated[
    float | None,
    typer.Option(
        help="All but block: weight of the divergence from the teacher's predictions [default: 1].",
        rich_help_panel=_TRAINING,
    ),
]
SquareHead = Annotated[
    float | None,
    typer.Option(
        help="All but block: weight of the distance to the teacher's hidden states behind each block, which need "
        "much room in --store [default: 0].",
        rich_help_panel=_TRAINING,
    ),
]
NextToken = Annotated[
    float | None,
    typer.Option(help="All but block: weight of the loss on the text itself [default: 0].", rich_help_panel=_TRAINING),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="All but block: so many of the teacher's most probable tokens are kept of each position [default: 50].",
        rich_help_panel=_TRAINING,
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="All but block: keep what the teacher predicts here, for other runs with it and the same text "
        "[default: in OUT while it is made].",
        rich_help_panel=_TRAINING,
    ),
]
Every = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help="All but block: look at the held-out samples, and save the state for --resume, so often "
        "[default: 20 times].",
        rich_help_panel=_TRAINING,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="All but block: less memory, a third more time: activations inside the blocks are computed twice.",
        rich_help_panel=_TRAINING,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Samples; one of eight is held out [default: 128].", rich_help_panel=TEXT),
]
Seed = Annotated[int, typer.Option(help="Of samples, and of the order of batches.", rich_help_panel=TEXT)]
SelfCalibration = Annotated[
    int,
    typer.Option(
        help="So many more windows for each one that is fitted, sampled by the teacher.",
        rich_help_panel=TEXT,
    ),
]
Evaluation = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="SOURCE",
        help="Text that the three losses are measured on: dense, pruned, recovered [default: the part of builtin "
        "that is never calibrated on].",
        rich_help_panel=TEXT,
    ),
]
EvalWindows = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="So many windows of that text, drawn with --seed, or all [default: 256].",
        rich_help_panel=TEXT,
    ),
]
BatchSize = Annotated[
    str,
    typer.Option(help="Samples per step of the training, or auto.", rich_help_panel=MACHINE),
]
