"""What `prune-cli prune` alone can be told; None stands for what the user did not say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_cli.commands.options import (
    OUTPUT,
    RUN,
    TEXT,
    complete_method,
    complete_pattern,
    complete_preset,
    complete_source,
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder of a Hugging Face checkpoint, or a model id of the hub.", show_default=False
    ),
]
Out = Annotated[
    Path | None, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.", show_default=False)
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Options from a YAML file, or from a prune_report.json to repeat that run; the command line wins. "
        "Where it names the model, a lone argument is OUT.",
        rich_help_panel=RUN,
    ),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe", metavar="FILE", help="Write the options of this run as a recipe.", rich_help_panel=OUTPUT
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none",
        help="Options for what neither command line nor recipe says, as in a recipe [default: the nearest "
        "prune-cli.yaml in this folder and those above it].",
        rich_help_panel=RUN,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="fast (wanda), balanced (admm), best (admm, dense target) or max (best, then --match-blocks); what else "
        "is said wins.",
        autocompletion=complete_preset,
        rich_help_panel=RUN,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="See prune-cli methods [default: wanda].",
        autocompletion=complete_method,
        rich_help_panel=RUN,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        help="Share of each tensor to remove [default: 0.5]; of blocks (depth), units (width) or experts [0.25].",
        rich_help_panel=RUN,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        help="N:M instead: keep N of every M inputs, as 2:4.", autocompletion=complete_pattern, rich_help_panel=RUN
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Spread the sparsity over the tensors: uniform, erk, owl, atp, sensitivity, global, or file:PATH (an "
        "allocation or a report). auto: sensitivity, or uniform with --pattern [default: uniform; auto with --preset "
        "best and max].",
        rich_help_panel=RUN,
    ),
]
Refine = Annotated[
    str | None,
    typer.Option(metavar="STEP", help="Improve the mask afterwards: swaps or dsnot.", rich_help_panel=RUN),
]
Reconstruct = Annotated[
    bool, typer.Option("--reconstruct", help="Fit the kept weights by least squares.", rich_help_panel=RUN)
]
MatchBlocks = Annotated[
    bool | None,
    typer.Option(
        "--match-blocks/--no-match-blocks",
        help="Train all kept weights of each block, once it is pruned, to do what the dense block did (as prune-cli "
        "recover does afterwards) [default: no; yes with --preset max].",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="An option of the method, or of a step or allocation as swaps.rounds=8, owl.spread=0.1.",
        rich_help_panel=RUN,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Glob on tensor names. One that matches linear layers of the blocks narrows the run to them; any other "
        "adds what it names (embeddings, head, norms, routers, biases).",
        rich_help_panel=RUN,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Glob on tensor names to keep as they are.", rich_help_panel=RUN),
]
AllowUnsupported = Annotated[
    bool,
    typer.Option("--allow-unsupported", help="Keep tensors that cannot be pruned (experts).", rich_help_panel=RUN),
]
DropExtraHeads = Annotated[
    bool,
    typer.Option(
        "--drop-extra-heads",
        help="With depth, width and experts: leave out extra heads (multi-token prediction) and count none in "
        "config.json.",
        rich_help_panel=RUN,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text: builtin, c4, wikitext2, ptb, hf:REPO[:CONFIG][:SPLIT][:COLUMN], a file or a folder "
        "[default: builtin].",
        autocompletion=complete_source,
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration samples [default: 128].", rich_help_panel=TEXT)]
Seed = Annotated[int, typer.Option(help="Of samples and of random choices.", rich_help_panel=TEXT)]
CalibrateBy = Annotated[
    str,
    typer.Option(
        help="sublayer: one pass, a layer sees the layers before it pruned; block: two passes, like the authors.",
        rich_help_panel=TEXT,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="What solvers, swaps and --reconstruct follow. pruned: what the dense one gives on its inputs now; dense: "
        "what it gave in the dense model (a second stream of hidden states; much better) [default: pruned].",
        rich_help_panel=TEXT,
    ),
]
SelfCalibration = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="So many more windows for each calibration window, sampled by the dense model (one more forward pass): "
        "solvers fit few tokens too closely. auto: as many as make 16 tokens for each input of the widest linear layer "
        "that is solved for, at most 3 [default: 0; auto with --preset best and max].",
        rich_help_panel=TEXT,
    ),
]
Evaluation = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="SOURCE",
        help="Perplexity on this text, before and after.",
        autocompletion=complete_source,
        rich_help_panel=TEXT,
    ),
]
EvalWindows = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="So many windows of --eval, drawn with --seed, or all [default: no more than take as long as pruning].",
        rich_help_panel=TEXT,
    ),
]
Generate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="N tokens after a few prompts, by the dense and the pruned model, into report, page and card.",
        rich_help_panel=TEXT,
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Of depth, experts or width -o uniform=false: use what a run with --save-statistics measured on the same "
        "model and text. The text is still read: by what fits, and to see that it is the same.",
        rich_help_panel=TEXT,
    ),
]
SaveStatistics = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Keep what the choice measures, for other sparsities.", rich_help_panel=TEXT),
]
CompareCalibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Of experts: the report also tells how this text, or these images, would use them.",
        rich_help_panel=TEXT,
    ),
]
Into = Annotated[
    str,
    typer.Option(
        "--format",
        help="dense, or sparse: files without the zeros, exact, which load after import prune_cli "
        "(docs/sparse-safetensors.md).",
        rich_help_panel=OUTPUT,
    ),
]
SelfContained = Annotated[
    bool,
    typer.Option(
        "--self-contained",
        help="With --format sparse: a loader beside the files, which trust_remote_code=True runs without this package.",
        rich_help_panel=OUTPUT,
    ),
]
Packed = Annotated[
    str | None,
    typer.Option(
        help="Of a model in FP8, FP4 or INT4. keep: the output is packed as the input, on its scales; bf16: plain "
        "16-bit weights [default: keep].",
        rich_help_panel=OUTPUT,
    ),
]
TextOnly = Annotated[
    bool,
    typer.Option(
        "--text-only",
        help="Of a vision or audio model: write its language model alone, as a causal LM.",
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.", rich_help_panel=OUTPUT)
]
KeepListOnly = Annotated[
    bool,
    typer.Option(
        "--keep-list-only",
        help="Of experts: write no weights but the list of those that stay, into OUT (.json or .jsonl) or -o "
        "save_keep_list=; --allocate global lets their number differ by layer.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would happen and stop.", rich_help_panel=OUTPUT)]
