"""Which model and data a run used: the commits of those from the hub, fingerprints of those on disk."""

import os
from argparse import Namespace
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from utils.distributed.ranks import print_rank_0
from utils.files import read_run_file
from utils.model.fingerprint import base_fingerprint, files_fingerprint
from utils.notation import parse_source


def sources_of(args: Namespace) -> dict[str, Any]:
    """Return name, and revision or fingerprint, of the model and of each data set, as run.json holds them."""
    name = args.model_name_or_path
    model = {"name": name, **({} if os.path.exists(name) else {"revision": hub_revision(name, "model")})}
    names = dict.fromkeys(
        parse_source(text).name for text in (*args.data_path, *args.sft_only_data_path, *args.eval_data_path)
    )
    return {"model": {**model, "weights": base_fingerprint(name)}, "data": [_data_source(name) for name in names]}


def hub_revision(name: str, kind: str) -> str | None:
    """Return the commit that the cache of the hub holds as the newest of a model or dataset; None where it has none."""
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    try:
        with open(os.path.join(constants.HF_HUB_CACHE, folder, "refs", "main"), encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None


def say_what_differs(like: str, then: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Print where model or data are not those of the run that `--like` names; `then` is None for an older run."""
    if then is None:
        print_rank_0(f"--like {like}: that run did not record its model's and data's versions, so they aren't compared")
        return
    before = {source["name"]: source for source in (then["model"], *then["data"])}
    for source in (now["model"], *now["data"]):
        if source["name"] in before and before[source["name"]] != source:
            print_rank_0(f"--like {like}: {source['name']} has changed since: {_version(before[source['name']])} then, "
                         f"{_version(source)} now")  # fmt: skip


def read_sources(folder: str) -> dict[str, Any] | None:
    """Return the sources in the run.json of a run's folder; None where it has none."""
    return read_run_file(folder).get("sources")


def _data_source(name: str) -> dict[str, Any]:
    if os.path.exists(name):
        return {"name": name, "files": files_fingerprint([name])}
    return {"name": name, "revision": hub_revision(name, "dataset")}


def _version(source: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items() if key != "name")
