"""Loads and checks the splits of a data set on the Hugging Face hub; errors tell how to make a local copy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import datasets
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from utils.data.reading.arrow_files import SplitData, only_columns
from utils.data.reading.find_files import pick_split
from utils.data.reading.parquet_files import check_texts
from utils.data.reading.schema import Schema, check_dataset
from utils.errors import UserError

PARQUET_REVISION = "refs/convert/parquet"
PROBE_SECONDS = 5.0

_SCRIPT_MESSAGE = "Dataset scripts are no longer supported"
# Raised without network, access or disk space, and for missing or unreadable data sets and configurations.
_HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError, DatasetsError)


def load_from_hub(
    name: str, splits: Iterable[str], schema: Schema, argument: str, config: str | None = None
) -> dict[str, SplitData]:
    """Return the wanted splits of a data set on the hub, or of its copy in the local hub cache.

    Their fingerprints are those `datasets` makes from name, configuration, version and commit; a commit's data never
    change.

    Args:
        name: the name on the hub.
        splits: the names of the wanted splits.
        schema: which columns are read and checked.
        argument: what the path of a local copy must contain to be recognized as this data set, for the message.
        config: the configuration to read, where the data set has several.

    Raises:
        UserError: the hub cannot be reached or refuses, a split or column is missing, or a type is wrong.
    """
    found = open_on_hub(name, argument, config)
    loaded = {}
    for split in splits:
        dataset = found[pick_split(found, split, f"{name} on the Hugging Face hub")]
        check_dataset(dataset, schema, name)
        check_texts(dataset, schema, name)
        loaded[split] = SplitData(only_columns(dataset, schema), dataset._fingerprint)
    return loaded


def open_on_hub(
    name: str, argument: str, config: str | None = None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Return the splits of a data set on the hub, downloaded, or (`streaming`) read as they are needed.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    try:
        return _ask_hub(name, config, streaming)
    except _HUB_ERRORS as err:
        raise UserError(_advice(name, argument, err)) from err


def _ask_hub(name: str, config: str | None, streaming: bool) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    with _no_retries(unreachable_reason(name)):
        try:
            return load_dataset(name, config, streaming=streaming)
        except RuntimeError as err:
            if _SCRIPT_MESSAGE not in str(err):
                raise
        try:
            # The hub has a parquet copy of most data sets that were scripts, with one folder per configuration.
            return load_dataset(name, data_dir=config, revision=PARQUET_REVISION, streaming=streaming)
        except _HUB_ERRORS as err:
            raise RuntimeError(f"{_SCRIPT_MESSAGE}, and no parquet copy can be read ({err})") from err


def unreachable_reason(name: str) -> str | None:
    """Ask the hub once, with a short time-out; return the error where it does not answer, else None."""
    try:
        HfApi().dataset_info(name, timeout=PROBE_SECONDS)
    except HfHubHTTPError:
        return None  # the hub answered; what it refuses, `load_dataset` reports
    except (OSError, HTTPError) as err:
        return f"{type(err).__name__}: {err}"
    return None


@contextmanager
def _no_retries(reason: str | None) -> Iterator[None]:
    """Where the hub is unreachable for this reason, have `datasets` use its cache or fail at once, without retries."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield
    except ConnectionError as err:
        raise ConnectionError(reason or str(err)) from err
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _advice(name: str, argument: str, err: Exception) -> str:
    script = _SCRIPT_MESSAGE in str(err)
    revision = f" --revision {PARQUET_REVISION}" if script else ""
    load = f'load_dataset("{name}", trust_remote_code=True) of datasets<4' if script else f'load_dataset("{name}")'
    return (
        f"The data set {name} cannot be read from the Hugging Face hub: {type(err).__name__}: {err}\n"
        f"Make a local copy: on a machine with network, run\n"
        f"    hf download {name} --repo-type dataset{revision} --local-dir copies/{name}\n"
        f'or {load} and then .save_to_disk("copies/{name}"). Bring the folder here and pass its path as '
        f"--data_path. The path must contain {argument}."
    )
