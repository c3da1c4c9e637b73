"""The terminal command ``dlp-plugin``; its commands share the module ``common``."""

from __future__ import annotations

from collections.abc import Callable

from dlp_plugin.cli.checkpoints import export_gptq, inspect, pack, unpack
from dlp_plugin.cli.common import app
from dlp_plugin.cli.measure import compare, ppl, zero_shot
from dlp_plugin.cli.plans import score, show
from dlp_plugin.cli.prune import merge, oneshot
from dlp_plugin.cli.speed import speed

__all__ = ["app"]

# In the order that --help shows, which is that of a typical workflow.
_COMMANDS: tuple[Callable[..., None], ...] = (
    oneshot,
    score,
    show,
    inspect,
    ppl,
    zero_shot,
    speed,
    compare,
    merge,
    pack,
    unpack,
    export_gptq,
)

for _command in _COMMANDS:
    app.command()(_command)
