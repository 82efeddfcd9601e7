"""The object that every asset receives: configuration, store, ledger and models of one run."""

from dataclasses import dataclass
from functools import cached_property

import ray
from ray.data import Dataset

from cluster.runtime import anchor, local_part
from cluster.storage import AssetStore
from flows.asset_io import AssetIO
from flows.config import ConfigError, RunConfig
from flows.graph import (
    INSTRUCTION_REFLECTIONS,
    RAW_INSTRUCTIONS,
    RESPONSE_REFLECTIONS,
    STUDENT,
    Specs,
)
from flows.leftovers import prune_leftovers
from flows.placement import STAGE_OF, demands
from flows.refresh_requests import Requests
from flows.retractions import Retractions
from flows.staleness import Staleness
from operators.chat_markup import special_tokens_of
from operators.files.places import use_endpoint
from operators.models import model_revision, resolve_model
from operators.read.archive import rows_of_files
from operators.read.drop_contaminated import EvaluationIndex, drop_contaminated, evaluation_index
from operators.read.own_steps import apply_steps
from operators.read.read_instructions import count_ignored_columns
from operators.read.read_refresh import read_refresh
from operators.read.source_files import files_of_other_splits, shown
from operators.reflect.reflect import Reflection
from operators.report.costs import StageCost, stage_costs
from operators.select.judge import Judge
from operators.select.reward import KEY as REWARD_MODEL
from operators.select.score_store import Scorer
from operators.student.config import templated
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import make_room
from operators.teacher.ledger import Ledger
from operators.teacher.variants import every_teacher, resolved

HELD_ROWS = 100_000  # of earlier refreshes, 2 KB each, that are kept in Ray's object store while a refresh is made
MOST_NAMED = 5  # files in a message
FILES_OF_OTHER_SPLITS = "files_of_other_splits"  # in the metrics of raw_instructions
PROMPTS = "prompts"  # folder next to the ledger, with the prompts by key of the call
REFLECTIONS = frozenset({INSTRUCTION_REFLECTIONS, RESPONSE_REFLECTIONS})


def open_run(config: RunConfig, specs: Specs, settle_s: float = 0, *, reparse: bool = False) -> "Run":
    """Open the storage of a configuration.

    Args:
        config: of the run.
        specs: the assets.
        settle_s: source files that changed less than this many seconds ago are left out.
        reparse: make the reflections again from stored replies, without a teacher call.
    """
    try:
        config = config.model_copy(update={"storage": anchor(config.storage)})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    use_endpoint(config.storage_endpoint)
    store = AssetStore(config.storage)
    requests, retractions = Requests(config.storage), Retractions(config.storage)
    staleness = Staleness(config, specs, store, settle_s, requests, retractions)
    return Run(config, specs, store, staleness, requests, retractions, reparse)


@dataclass(frozen=True)
class Run:
    """A configuration and its storage: it knows where things are, not what to do with them."""

    config: RunConfig
    specs: Specs
    store: AssetStore
    staleness: Staleness
    requests: Requests
    retractions: Retractions
    reparse: bool = False  # the reflections are read from the ledger again, without a call

    def asset_io(self) -> AssetIO:
        """The IO manager through which Dagster writes and reads assets."""
        made_again = REFLECTIONS if self.reparse else frozenset[str]()
        return AssetIO(self.store, self.staleness, self.specs, made_again, self.make_room_for)

    def tidy(self) -> None:
        """Bundle the small refreshes of each asset if there are many, and remove old rows of remade ones from bundles.

        What killed processes left is deleted (`flows.leftovers`).

        The caller holds the storage's lease, and this process has no data set that it will still read.
        """
        for asset, spec in self.specs.items():
            if spec.partitions_def is not None:
                self.store.tidy(asset)
        prune_leftovers(self.config.storage)

    def make_room_for(self, asset: str) -> None:
        """Stop the teacher's engines, which run on between its stages, if they leave no room for an asset's actors.

        The tasks that feed these actors need one more CPU.
        """
        for demand in demands(self.config):
            if demand.stage == STAGE_OF.get(asset):
                whole = {name: demand.count * amount for name, amount in demand.each.items()}
                make_room(whole | {"CPU": whole.get("CPU", 0) + 1})

    @cached_property
    def teacher(self) -> TeacherConfig:
        """The teacher with its models resolved to what the engine loads."""
        return resolved(self.config.teacher)

    @cached_property
    def student(self) -> str:
        """Folder or hub id of the student before training."""
        return resolve_model(self.config.student.model, "student.model")

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Control tokens of all models that read texts, which no text may contain."""
        models = {teacher.model for _, teacher in every_teacher(self.teacher) if teacher.backend == "vllm"}
        models |= {self.student} | ({self.reward_model} if self.reward_model else set())
        return frozenset[str]().union(*(special_tokens_of(model) for model in models))

    def ledger(self, *, offline: bool = False) -> Ledger:
        """The teacher ledger, with metrics of its own for the asset that asks for it."""
        return Ledger(self.path("ledger"), self.config.budget, offline=offline, prompts=self.path(PROMPTS))

    def asking(self) -> Ledger:
        """The ledger for a stage with teacher calls; with `--reparse` it makes no call."""
        return self.ledger(offline=self.reparse)

    def reflection(self, ledger: Ledger) -> Reflection:
        """The arguments of a reflection. Loads tokenizers, which takes three seconds; up-to-date assets avoid it."""
        return Reflection(self.config.reflect, self.teacher, ledger, self.special_tokens)

    @cached_property
    def scorer(self) -> Scorer:
        """The student before training as a judge of texts, with its score ledger."""
        template = self.config.student.template
        return Scorer(self.student, self.config.score, self.path("scores"), self.reward_model, template)

    @cached_property
    def student_revision(self) -> str:
        """What identifies the student before training, with its chat template."""
        return templated(model_revision(self.student), self.config.student.template)

    def judge(self, ledger: Ledger) -> Judge:
        """The teacher as a judge, for `select.policy: judge`; loads tokenizers, see `reflection`."""
        select = self.config.select
        return Judge(self.teacher, ledger, select.judge_max_tokens, self.special_tokens, select.judge_prompt)

    @cached_property
    def reward_model(self) -> str:
        """Folder or hub id of the reward model; "" if the policy uses none."""
        select = self.config.select
        return resolve_model(select.reward_model, REWARD_MODEL) if select.policy == "reward" else ""

    def costs(self) -> list[StageCost]:
        """Counts and cost of the ledger's calls by stage, over all runs."""
        return stage_costs(self.ledger().files, self.config.budget)

    def source(self, refresh: str) -> list[str]:
        """Paths of the readable files of a refresh; may be empty if the refresh was made before.

        Raises:
            ValueError: there is no such file, and the refresh never had one.
        """
        if self.staleness.files.taken(refresh):
            there = {(file.name, file.identity) for file in self.staleness.files.there()}
            return [file.path for file in self.staleness.files.files_of(refresh)] if there else []
        paths = [file.path for file in self.staleness.files.files_of(refresh)]
        if not paths:
            raise ValueError(f"source.path: {shown(self.config.source.path)} has no file for refresh {refresh}")
        return paths

    def archived(self, refresh: str) -> Dataset | None:
        """The stored rows of the files of a refresh that are gone or changed; None if there is no such file.

        Raises:
            StorageError: the rows are damaged.
        """
        gone = self.staleness.files.gone(refresh)
        if not gone:
            return None
        names = [name for name, _ in self.staleness.files.taken(refresh)]
        only = f"the rows of {', '.join(gone[:5])}{' and others' if gone[5:] else ''} are nowhere else"
        cure = f"{only}: restore it from a backup, or take them out by --retract FILE"
        return rows_of_files(self.store.held_rows(RAW_INSTRUCTIONS, refresh, cure), gone, names)

    def raw_rows(self, refresh: str) -> Dataset:
        """The rows of a refresh from the source, one per record, with the outcomes of all steps before the teacher."""
        files, config = self.source(refresh), self.config
        earlier, archived = self.earlier(refresh), self.archived(refresh)
        rows = read_refresh(files, earlier, config.source, config.deduplicate, self.special_tokens, archived)
        rows = apply_steps(rows, config.steps, self.special_tokens)
        return drop_contaminated(rows, self.build_evaluation_index(rows, refresh))

    def raw_metrics(self, refresh: str, rows: Dataset) -> dict[str, object]:
        """What `raw_rows` read and compared: unread columns, files of other splits, and evaluation texts."""
        split = self.config.source.split
        try:
            left_out = files_of_other_splits(self.config.source.path, split)
        except (ValueError, OSError):  # the source went away while it was read
            left_out = {}
        files = {split: len(names) for split, names in left_out.items()}
        texts = self.evaluation_index(rows, refresh).num_texts()
        return count_ignored_columns(rows) | {FILES_OF_OTHER_SPLITS: files, "evaluation_texts": texts}

    def earlier(self, refresh: str) -> Dataset | None:
        """The raw instructions of all refreshes that were first made before this one; None if this is the first."""
        earlier = self.staleness.files.earlier(refresh)
        if not earlier:
            return None
        rows = self.store.rows(RAW_INSTRUCTIONS, earlier)
        made = [self.store.manifest(RAW_INSTRUCTIONS, key) for key in earlier]
        # Duplicates, near-duplicates and contamination read them six times.
        return rows.materialize() if sum(one.rows or 0 for one in made if one) <= HELD_ROWS else rows

    def evaluation_index(self, rows: Dataset, refresh: str) -> EvaluationIndex:
        """The index of a refresh; it is built from `rows`, its raw instructions, if this run has none yet."""
        return self._indices.get(refresh) or self.build_evaluation_index(rows, refresh)

    def build_evaluation_index(self, rows: Dataset, refresh: str) -> EvaluationIndex:
        """Build the index of a refresh from `rows`, its raw instructions, and keep it for `evaluation_index`."""
        self._indices[refresh] = evaluation_index(rows, self.earlier(refresh), self.config.decontaminate)
        return self._indices[refresh]

    @cached_property
    def _indices(self) -> dict[str, EvaluationIndex]:
        return {}

    def student_version(self) -> str:
        """Name of the student that results from the current packs and configuration."""
        return self.staleness.fingerprint(STUDENT)

    @property
    def dagster_home(self) -> str:
        """Folder of Dagster's run history, on a disk of this machine."""
        return f"{local_part(self.config.storage)}/dagster"

    @property
    def logs(self) -> str:
        """Folder for the output of engines and libraries, on a disk of this machine."""
        return f"{local_part(self.config.storage)}/logs"

    def path(self, *parts: str) -> str:
        """A path or URI under the storage."""
        return "/".join([self.config.storage, *parts])


def rows_where(rows: Dataset, outcome: str) -> Dataset:
    """The rows with exactly this outcome."""
    return rows.filter(expr=ray.data.expressions.col("outcome") == outcome)
