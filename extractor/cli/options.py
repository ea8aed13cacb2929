"""Options that several commands have, each with one name, one parser and one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extractor.encoding.names import ExpertsDtype, TrunkDtype
from extractor.planning.sizes import parse_share, parse_size

CountOption = Annotated[int | None, typer.Option(metavar="N", help="Number of deep experts.")]
KeepOption = Annotated[
    float | None, typer.Option(parser=parse_share, metavar="SHARE", help="Share of the experts, such as 25%.")
]
BudgetOption = Annotated[
    int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Size of the whole store, such as 12GiB.")
]
ExpertsDtypeOption = Annotated[
    ExpertsDtype | None,
    typer.Option(
        help="Experts as shipped, which is the default; dequantised to 16 bits; or made smaller: fp8 and int8 in "
        "groups of 128 columns, int4 and mxfp4 of 32, int4-g64 of 64, nvfp4 of 16; int4-int8 has down_proj in int8."
    ),
]
TrunkDtypeOption = Annotated[
    TrunkDtype | None,
    typer.Option(
        help="Linear layers of the trunk: those that the checkpoint has in FP8 as shipped, which is the default; all "
        "in 16 bits, the default with --experts-dtype 16bit; or all in fp8, with a scale for each row."
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Say what would be changed, and change nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object instead of text.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Directory of the store.")]
