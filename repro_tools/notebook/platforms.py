"""What is known of the notebook platforms: where files lie, and the limits as somebody reported them on a date.

None of the limits is a promise: both platforms change them, and Colab gives different ones to different people. A notebook plans
with them and survives being wrong about them, because every session goes on from the last saved state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A limit as it was reported: by whom, and when."""

    what: str
    value: str
    source: str
    date: str


@dataclass(frozen=True)
class Platform:
    """A notebook platform.

    device: the GPU to plan with, by its name in `repro_tools.memory.devices`. hours: of a session, the shortest that was reported.
    memory_gib: of the host. work: where code and runs lie while a session lasts. output: what outlives the session. inputs: where
    archives of earlier sessions, code and data sets are looked for. metadata: the notebook's settings.
    before: what to do by hand, in Markdown, with {archive} for the name of the archive. mount: code that makes `output` appear.
    """

    name: str
    title: str
    device: str
    hours: float
    weekly_hours: float | None
    memory_gib: float
    work: Path
    output: Path
    inputs: tuple[Path, ...]
    metadata: Mapping[str, Any]
    before: tuple[str, ...]
    next_session: str
    mount: str
    facts: tuple[Fact, ...]


_COLAB_FAQ = "Colab's FAQ, quoted in github.com/googlecolab/colabtools/issues/1436"

PLATFORMS = {
    "kaggle": Platform(
        name="kaggle",
        title="Kaggle",
        device="T4",
        hours=9.0,
        weekly_hours=30.0,
        memory_gib=31.4,
        work=Path("/tmp/session"),
        output=Path("/kaggle/working"),
        inputs=(Path("/kaggle/input"),),
        metadata={
            "kaggle": {
                "accelerator": "nvidiaTeslaT4",
                "dataSources": [],
                "isGpuEnabled": True,
                "isInternetEnabled": True,
                "language": "python",
                "sourceType": "notebook",
            }
        },
        before=(
            "*Settings*: Accelerator **GPU T4 x2** (one of the two is used), Internet **on**. Both need a verified account.",
            "From the second session on: *Add Input*, *Your Work*, the last finished version of this notebook. Its `{archive}` is then "
            "found below `/kaggle/input`.",
            "*Save Version*, *Save & Run All (Commit)*: the session goes on without your browser.",
        ),
        next_session="add the output of this version as input (Add Input, Your Work) and save & run all again",
        mount="",
        facts=(
            Fact(
                "GPU session",
                "9 hours (the platform's own message). Overviews of its documentation say 12; the shorter one is planned with",
                "github.com/Kaggle/kaggle-benchmarks/issues/79",
                "2026-03-18",
            ),
            Fact("GPU quota", "30 hours a week", "github.com/Kaggle/kaggle-benchmarks/issues/79", "2026-03-18"),
            Fact(
                "GPU",
                "2 x Tesla T4 of 15.0 GiB",
                "wandb-metadata.json of huggingface.co/Femboyuwu2000/working",
                "2024-04-30",
            ),
            Fact(
                "P100",
                "offered too, and of no use: torch 2.10.0+cu128 of the default image has no kernels for it",
                "github.com/Kaggle/kaggle-cli/issues/1151",
                "2026-07-28",
            ),
            Fact(
                "memory",
                "31.4 GiB, 4 logical processors",
                "wandb-metadata.json of huggingface.co/Narkantak/working",
                "2024-04-30",
            ),
            Fact(
                "output",
                "20 GB in /kaggle/working",
                "an overview of Kaggle's documentation (portal.yandex.com.tr, Kaggle Notebooks)",
                "undated",
            ),
        ),
    ),
    "colab": Platform(
        name="colab",
        title="Colab",
        device="T4",
        hours=12.0,
        weekly_hours=None,
        memory_gib=12.7,
        work=Path("/content/session"),
        output=Path("/content/drive/MyDrive/repro"),
        inputs=(Path("/content/drive/MyDrive/repro"),),
        metadata={"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}},
        before=(
            "*Runtime*, *Change runtime type*: **T4 GPU**.",
            "The archive `{archive}` is kept in the folder `repro` of your Google Drive, of which the next cell asks for access. "
            "It is found there in the next session; nothing needs to be attached.",
            "*Runtime*, *Run all*. Keep the browser open: a session without it is ended early.",
        ),
        next_session="run all again; the archive is taken from your Drive",
        mount="from google.colab import drive\n\ndrive.mount('/content/drive')\n",
        facts=(
            Fact("session", "at most 12 hours, varies with use and load; ended when idle", _COLAB_FAQ, "2020-07-25"),
            Fact(
                "session, idle",
                "12 hours; about 90 minutes when idle; both only as far as anybody outside knows",
                "github.com/api-evangelist/google-colab, rate-limits",
                "2026-05-05",
            ),
            Fact(
                "GPU",
                "one Tesla T4 of 15.0 GiB, when one is free",
                "wandb-metadata.json of huggingface.co/Kinjal123/content",
                "2024-02-27",
            ),
            Fact(
                "memory",
                "12.7 GiB, 2 logical processors",
                "wandb-metadata.json of huggingface.co/Kinjal123/content",
                "2024-02-27",
            ),
            Fact(
                "disk",
                "78 GiB in all, 51 GiB of them free",
                "wandb-metadata.json of huggingface.co/Kinjal123/content",
                "2024-02-27",
            ),
        ),
    ),
}
