"""Opens the data sets of a run: each with its use, its share of rows, and a name of its own for files made from it."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from utils.data.formats.chat_template import AS_IS, ChatFormat
from utils.data.formats.custom import OwnFormatDataset, OwnOptions
from utils.data.mixture import BOTH, EVALUATION, TRAINING, DataSources
from utils.data.raw_datasets import PromptRawDataset, find_raw_dataset_class, known_name
from utils.data.reading.arrow_files import changed_message, hash_files, name_bad_text
from utils.data.reading.file_shapes import shape_advice
from utils.data.splits import split_boundaries
from utils.errors import UserError
from utils.logging.console import say
from utils.notation import parse_source


class Preparation(NamedTuple):
    """Where and how data are prepared."""

    local_rank: int  # rank on this node, -1 without ranks; only the first one prints what the data are
    cache_folder: str  # on the node's own or a shared disk
    phase: int  # 1: SFT, 2: reward, 3: RLHF; phase k uses part k of the split
    seed: int
    rebuild: bool = False  # build anew even where the cache fits
    num_proc: int | None = None  # tokenizing processes; None decides by the number of rows and cores

    @property
    def prints(self) -> bool:
        """Whether this process prints what the data are."""
        return self.local_rank <= 0


class OpenSet(NamedTuple):
    """One data set of a run."""

    raw: PromptRawDataset
    shares: str  # of the phases, such as "2,4,4"
    weight: float  # how often each training row of the phase is used
    use: str  # BOTH, TRAINING or EVALUATION


def get_raw_dataset(
    dataset_name: str,
    output_path: str,
    seed: int,
    local_rank: int,
    own: OwnOptions | None = None,
    streaming: bool = False,
) -> PromptRawDataset:
    """Open a data set: the known one whose name `dataset_name` contains (as a mirror's path does), else the user's own.

    Args:
        own: how the user's own data are read; None: in the Human/Assistant form, with the usual column names.
        streaming: read rows as they are needed, see `PromptRawDataset`.

    Raises:
        UserError: there is no such name or path, or its data can't be read or is malformed.
    """
    if known_name(dataset_name) is None and os.path.exists(dataset_name):
        if shape := shape_advice(dataset_name, is_certain=True):
            raise UserError(shape)
        try:
            return OwnFormatDataset(output_path, seed, local_rank, dataset_name, own, streaming)
        except UserError as err:
            if shape := shape_advice(dataset_name):
                is_unknown = "they are none of these formats" in str(err)
                raise UserError(shape if is_unknown else f"{shape} As records it can't be used: {err}") from err
            raise
        except UnicodeDecodeError as err:
            name_bad_text(dataset_name)
            raise UserError(f"{dataset_name} holds a text that is not UTF-8 ({err}): correct it.") from err
    return find_raw_dataset_class(dataset_name)(output_path, seed, local_rank, dataset_name, streaming=streaming)


def open_sets(
    sources: DataSources, preparation: Preparation, own: OwnOptions, streaming: bool = False
) -> list[OpenSet]:
    """Open the data sets that a phase uses, those of `--data_path` first and those for evaluation last.

    Raises:
        UserError: one of them can't be read or is malformed.
    """
    opened = []
    described = sources.of_phase(preparation.phase)
    for text, shares, use in described:
        name, weight = parse_source(text)
        how = own._replace(evaluates=use == EVALUATION, columns_of_others=len(described) > 1)
        raw = get_raw_dataset(name, preparation.cache_folder, preparation.seed, preparation.local_rank, how, streaming)
        if use != BOTH and raw.eval_split is None:
            raw.eval_split = raw.train_split  # no row is kept from training, or all are evaluated
        raw.eval_origin = {TRAINING: "the data of --eval_data_path", EVALUATION: "all rows"}.get(
            use, getattr(raw, "eval_origin", "")
        )
        opened.append(OpenSet(raw, shares, weight, use))
    owns = [one.raw for one in opened if isinstance(one.raw, OwnFormatDataset)]
    if own.columns and owns and all(raw.ignores_columns for raw in owns):
        names = ", ".join(own.columns.values())
        raise UserError(f"--columns: no data set of this run has a column {names}. Correct --columns.")
    _keep_names_apart([one.raw for one in opened], is_printed=preparation.prints and not streaming)
    return opened


def _keep_names_apart(raws: Sequence[PromptRawDataset], is_printed: bool) -> None:
    """Give a data set another name for its index files where an earlier one of other content has that name."""
    contents: dict[str, str] = {}
    for raw in raws:
        name = raw.dataset_name_clean
        content = "".join(data.fingerprint for data in raw.raw_datasets.values())
        if contents.setdefault(name, content) != content:
            raw.dataset_name_clean = f"{name}_{content[:8]}"
            if is_printed:
                say(
                    f"Data {raw.source}: its split indexes are named {raw.dataset_name_clean}, since another data set "
                    f"of this run has the name {name}"
                )


def check_unchanged(raw: PromptRawDataset) -> None:
    """Raise UserError where files that rows were read from are not what they were when the data set was opened."""
    for data in raw.raw_datasets.values():
        if data.files and hash_files(list(data.files), data.root) != data.fingerprint:
            raise UserError(changed_message(data.root))


def chat_of(opened: Sequence[OpenSet]) -> ChatFormat | None:
    """Return the format of the data that are trained on, of the first set that has one.

    None where there are only known data sets, whole texts and token ids, whose texts are what they are.
    """
    formats = [one.raw.chat for one in opened if one.use != EVALUATION and isinstance(one.raw, OwnFormatDataset)]
    return next((chat for chat in formats if chat.kind != AS_IS), None)


def describe_shares(opened: OpenSet, phase: int, given: str | None) -> str:
    """Return a line on how many training rows the phase uses.

    Args:
        given: `--data_split` as typed, None where it was left out.
    """
    rows = len(opened.raw.get_train_data())
    bounds = split_boundaries(opened.shares, rows).boundaries
    used = bounds[phase] - bounds[phase - 1]
    why = f"--data_split {opened.shares}"
    if given is None:
        own = isinstance(opened.raw, OwnFormatDataset)
        why = "all data of your own, as no --data_split is given" if own else f"{why}, the default of known data sets"
    return (
        f"Data {opened.raw.source}: {used} of {rows} training rows are for this phase ({why}), {rows - used} not used"
    )
